"""The stages called in turn, each cached by content: what `mpqdiff run` does.

    load -> sites -> calibrate -> record -> score -> aggregate -> problem -> solve -> plan
         -> quantize -> sample -> evaluate -> results

A system is the recipe in the config; an arm is a recipe that differs from it in a few keys
(`config.for_arm`). `arms.py` turns recipes into models and samples, `results.py` measures
them, `outcome.py` writes files.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mpqdiff import aggregate, record, sensitivity, solve
from mpqdiff import plan as plans
from mpqdiff import sites as site_list
from mpqdiff.artifacts import Store, chunked, digest, load_arrays, save_arrays, tree_digest
from mpqdiff.config import Config
from mpqdiff.costs import RESOURCES, check_choices, problem
from mpqdiff.costs.bytes import total
from mpqdiff.denoiser import Denoise, from_linen
from mpqdiff.diffusion.guidance import guide
from mpqdiff.diffusion.samplers import SAMPLERS, initial_noise, step_keys, uniform_timesteps
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.errors import InputError
from mpqdiff.plan import Plan
from mpqdiff.quantize import activations
from mpqdiff.quantize.apply import dequantized, fixed_cost, float_leaves
from mpqdiff.quantize.store import header_bytes
from mpqdiff.recipe import check_features, check_names, load_model, recipes
from mpqdiff.records import Scores, Statistics
from mpqdiff.sites import Site

# Bumped when a stage's results change.
VERSIONS = {"calibrate": 1, "record": 2, "score": 2, "plan": 3, "sample": 1, "features": 1}


class Experiment:
    """One model under one config: the artifacts that arms share, each computed when first asked.

    `all_sites` are every site found, pinned; `sites` those a plan decides on; `remainder` the
    products left in float.
    """

    def __init__(self, config: Config, workdir: Path):
        self.config = config
        for arm in recipes(config):
            check_names(arm)
        self.store = Store(workdir)
        self.module, self.params, self.model = load_model(config)
        self.model_hash = digest(tree_digest(self.params), self.model)
        self.denoise: Denoise = from_linen(self.module)
        self.image_shape = (self.module.image_size,) * 2 + (self.module.channels,)
        found, self.remainder = site_list.list_sites(
            self.denoise, self.params, *site_list.example_inputs(self.image_shape)
        )
        self.all_sites = site_list.pin(found, config.plan.pins)
        self.sites = site_list.planned(self.all_sites, products=config.quantize.products)
        check_features(config, self.image_shape)
        self.abar = alphas_cumprod(config.diffusion.schedule, config.diffusion.num_timesteps)
        self.timesteps = self.steps(config.diffusion.num_steps)

    def steps(self, count: int) -> np.ndarray:
        """The kept timesteps of a sampler with `count` steps, descending."""
        return uniform_timesteps(self.config.diffusion.num_timesteps, count)

    def labels(self, start: int, count: int) -> np.ndarray:
        """Class labels of images start..: every class in turn."""
        return np.arange(start, start + count, dtype=np.int32) % self.module.num_classes

    def inputs(self, seed: int, start: int, count: int):
        """(x_T, labels, step keys or None) of images start..start+count-1."""
        noise = initial_noise(seed, start, count, self.image_shape)
        keys = step_keys(seed, start, count) if self.config.diffusion.eta else None
        return noise, jnp.asarray(self.labels(start, count)), keys

    @property
    def halves(self) -> int:
        """Denoiser evaluations per image and step: 2 under guidance."""
        return 1 if self.config.diffusion.guidance_scale == 1.0 else 2

    def sampler(self, denoise: Denoise, timesteps: np.ndarray, *, trajectory: bool = False):
        """`(params, x_T, labels, keys) -> x_0`, guided, over `timesteps`: what is timed.

        `keys` [B] draw the noise of the steps; without eta they are None.
        """
        d = self.config.diffusion
        guided = guide(denoise, scale=d.guidance_scale, null_label=self.module.num_classes)

        def run(params, x_T, labels, keys=None):
            return SAMPLERS[d.sampler](
                guided,
                params,
                x_T,
                labels,
                timesteps=timesteps,
                alphas_cumprod=self.abar,
                keys=keys,
                eta=d.eta,
                clip=d.clip,
                trajectory=trajectory,
            )

        return run

    @cached_property
    def _key(self) -> dict:
        """What every stage depends on: the model and the diffusion settings."""
        return {"model": self.model_hash, "diffusion": self.config.diffusion.to_dict()}

    @cached_property
    def calibration(self) -> tuple[Path, dict]:
        """(folder, {x_ts [T,N,H,W,C], timesteps [T], labels [N]}): the float model's own path."""
        c = self.config.calibration
        count = min(c.timesteps, len(self.timesteps))
        chosen = np.rint(np.linspace(0, len(self.timesteps) - 1, count)).astype(int)
        batch = min(self.config.sample.batch, c.samples)
        run = jax.jit(self.sampler(self.denoise, self.timesteps, trajectory=True))

        def chunk(index):
            _, x_ts = run(self.params, *self.inputs(self.config.seed, index * batch, batch))
            return {"x_ts": np.asarray(x_ts)[chosen]}

        def compute(folder):
            parts = chunked(folder, "calibrate")(-(-c.samples // batch), chunk)
            x_ts = np.concatenate([part["x_ts"] for part in parts], axis=1)[:, : c.samples]
            save_arrays(
                folder / "calibration.npz",
                {
                    "x_ts": x_ts,
                    "timesteps": self.timesteps[chosen],
                    "labels": self.labels(0, c.samples),
                },
            )

        key = {
            **self._key,
            "samples": c.samples,
            "timesteps": c.timesteps,
            "seed": self.config.seed,
            "batch": batch,
        }
        folder = self.store.get(
            "calibrate", version=VERSIONS["calibrate"], key=key, compute=compute
        )
        return folder, load_arrays(folder / "calibration.npz")

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Every width that some arm may choose: what damage scores are measured at."""
        used = (check_choices(arm.plan.w_bits) for arm in recipes(self.config))
        return tuple(sorted({int(w) for widths in used for w in widths}))

    def needs(self, score: str) -> bool:
        """Whether the config or one of its arms uses `score`."""
        return any(arm.score.name == score for arm in recipes(self.config))

    @cached_property
    def statistics(self) -> tuple[Path, Statistics]:
        """(folder, Statistics) of one pass over the calibration set."""
        calibration, data = self.calibration
        w_bits = self.widths if self.needs("output_error") else ()
        clip = self.config.quantize.clip
        labels = data["labels"]
        if self.halves == 2:  # under guidance the null label is evaluated as often
            labels = np.where(np.arange(len(labels)) % 2, self.module.num_classes, labels)

        def compute(folder):
            stats = record.record(
                self.denoise,
                self.params,
                data["x_ts"],
                data["timesteps"],
                labels.astype(np.int32),
                self.sites,
                memory_gb=self.config.calibration.memory_gb,
                w_bits=w_bits,
                requantize=lambda kernel, bits: dequantized(kernel, bits, clip=clip),
                chunks=chunked(folder, "record"),
            )
            save_arrays(folder / "statistics.npz", vars(stats))

        key = {
            "calibration": calibration.name,
            "sites": [site.path for site in self.sites],
            "w_bits": w_bits,
            "clip": clip if w_bits else None,
            "memory_gb": self.config.calibration.memory_gb,
        }
        folder = self.store.get("record", version=VERSIONS["record"], key=key, compute=compute)
        stats = Statistics(**load_arrays(folder / "statistics.npz"))
        if self.config.score.temporal_policy == "pin":  # in every arm, as all pins are
            self.sites = [
                replace(site, pin=site.pin or 8) if fixed else site
                for site, fixed in zip(self.sites, np.asarray(stats.time_only), strict=True)
            ]
        return folder, stats

    def kernels(self) -> list:
        """The float kernels of the planned sites, in order; a product's is a single zero."""
        flat = traverse_util.flatten_dict(self.params, sep="/")
        empty = jnp.zeros((1, 1))
        return [
            flat.get(f"{site_list.module_path(site.path)}/kernel", empty) for site in self.sites
        ]

    def scores(self, config: Config) -> Scores:
        """The scores of the recipe `config`, cached."""
        name = config.score.name
        recorded, stats = self.statistics
        arguments = {}
        if name == "orthogonality":
            arguments = {k: config.score[k] for k in ("estimator", "temporal_policy")}
            if not config.score.include_pinned:
                arguments["member"] = [site.pin is None for site in self.sites]
        elif name == "weight_error":
            arguments = {"w_bits": list(self.widths), "clip": config.quantize.clip}
        elif name == "random":
            arguments = {"seed": config.seed}

        def measure() -> Scores:
            if name == "orthogonality":
                return sensitivity.SCORES[name](stats, **arguments)
            if name == "weight_error":
                return sensitivity.SCORES[name](
                    self.kernels(),
                    self.widths,
                    lambda kernel, bits: dequantized(kernel, bits, clip=arguments["clip"]),
                )
            if name == "random":
                key = jax.random.key(config.seed)
                return sensitivity.SCORES[name](key, len(stats.timesteps), len(self.sites))
            return sensitivity.SCORES[name](stats)

        def compute(folder):
            scores = measure()
            save_arrays(folder / "scores.npz", {"value": scores.value, "matrix": scores.matrix})
            (folder / "kind.txt").write_text(scores.kind)

        key = {"record": recorded.name, "score": name, **arguments}
        folder = self.store.get("score", version=VERSIONS["score"], key=key, compute=compute)
        arrays = load_arrays(folder / "scores.npz")
        kind = (folder / "kind.txt").read_text()
        self.score_name = folder.name
        return Scores(arrays["value"], kind=kind, name=name, matrix=arrays.get("matrix"))

    def table(self, config: Config, a_bits: dict | None = None) -> activations.Table:
        """The activation table of the recipe, or of a plan's own `a_bits`."""
        bits = config.plan.a_bits
        if a_bits is None:
            a_bits = {site.path: self._a_bits(site, bits) for site in self.sites}
        return activations.table(
            self.statistics[1],
            self.sites,
            mode=config.quantize.mode,
            a_bits=a_bits,
        )

    def asymmetric(self, config: Config) -> list[bool]:
        """[L]: which sites read an activation with a zero point; none where scales are online."""
        if config.quantize.mode == "online":
            return [False] * len(self.sites)
        return activations.lopsided(self.statistics[1], self.sites)

    def fixed(self, config: Config) -> dict[str, float]:
        """Bytes no choice changes, by resource."""
        table = self.table(config)
        fixed = fixed_cost(self.params, self.sites, rows=len(table.timesteps))
        left = float_leaves(self.params, self.sites)
        fixed["file_bytes"] += header_bytes(self._draft(config), self.sites, left)
        return fixed

    def predict(self, w_bits: dict, config: Config) -> dict[str, float]:
        """Bytes on the device, and at most in the file, of the widths `w_bits`."""
        fixed = self.fixed(config)
        return {
            name: total(self.sites, w_bits, self.asymmetric(config), fixed[name], resource)
            for name, resource in RESOURCES.items()
        }

    def budget(self, config: Config) -> float:
        """The recipe's budget in its resource: given, or the ratio times uniform `ratio_bits`."""
        p = config.plan
        if p.budget:
            return float(p.budget)
        uniform = {site.path: site.pin or p.ratio_bits for site in self.sites}
        return float(np.floor(p.ratio * self.predict(uniform, config)[p.resource]))

    def plan(self, config: Config, system: str) -> Plan:
        """Solve the recipe `config` into a Plan, cached. InputError names an impossible budget."""
        p = config.plan
        scores = self.scores(config)
        key = {
            "record": self.statistics[0].name,
            "score": self.score_name,
            "aggregate": config.aggregate.to_dict(),
            "plan": p.to_dict(),
            "mode": config.quantize.mode,
            "clip": config.quantize.clip,
            "num_steps": config.diffusion.num_steps,
            "seed": config.seed,
            "system": system,
        }

        def compute(folder):
            plans.save(self._solve(config, system, scores), folder / "plan.json")

        folder = self.store.get("plan", version=VERSIONS["plan"], key=key, compute=compute)
        return plans.load(folder / "plan.json")

    def _solve(self, config: Config, system: str, scores: Scores) -> Plan:
        p = config.plan
        choices = check_choices(p.w_bits)
        value = aggregate.aggregate(
            scores,
            timesteps=self.statistics[1].timesteps,
            num_timesteps=config.diffusion.num_timesteps,
            method=config.aggregate.name,
            lam=config.aggregate.lam,
            beta=config.aggregate.beta,
        )
        if scores.kind == "redundancy":
            value = aggregate.lift(value, choices)
        else:
            value = value[:, [self.widths.index(w) for w in choices]]
        budget = self.budget(config)
        knapsack = problem(
            value,
            self.sites,
            w_bits=choices,
            a_bits=p.a_bits,
            budgets={p.resource: budget},
            fixed=self.fixed(config),
            asymmetric=self.asymmetric(config),
        )
        low, high = solve.budget_range(knapsack)
        if p.budget and budget > high:
            raise InputError(
                f"plan.budget={budget:.0f} {p.resource} is above the maximum {high:.0f}, what the "
                f"widest choices take; expected {low:.0f} to {high:.0f}"
            )
        arguments = {"key": jax.random.key(config.seed)} if p.solver == "random" else {}
        answer = solve.solve(knapsack, p.solver, **arguments)
        bits = [int(knapsack.w_bits[k]) for k in np.asarray(answer.choice)]
        pairs = zip(self.sites, bits, strict=True)
        w_bits = {site.path: width for site, width in pairs if site.parameters}
        draft = self._draft(config)
        return replace(
            draft,
            w_bits={path: w_bits.get(path) for path in draft.w_bits},
            system=system,
            budgets={p.resource: budget},
            predicted=self.predict(w_bits, config),
            objective=float(answer.objective),
            bound=float(answer.bound),
            gap=float(answer.gap),
            provenance={
                "config_hash": plans.digest(config.to_dict()),
                "calibration_hash": self.calibration[0].name,
                "versions": {"jax": jax.__version__},
                "seed": config.seed,
                "score": config.score.name,
                "solver": p.solver,
                "status": answer.status,
            },
        )

    def _draft(self, config: Config) -> Plan:
        """The plan of the recipe but for its widths, which are all 8, and what led to them."""
        mode, timesteps = config.quantize.mode, self.steps(config.diffusion.num_steps)
        decided = {site.path for site in self.sites if site.parameters}
        return Plan(
            model={"hash": self.model_hash, "name": self.model["name"]},
            w_bits={site.path: 8 if site.path in decided else None for site in self.all_sites},
            a_bits={site.path: self._a_bits(site, config.plan.a_bits) for site in self.all_sites},
            mode=mode,
            groups=activations.groups(self.statistics[1].timesteps, timesteps, mode),
            timesteps=tuple(int(t) for t in timesteps),
            system="",
        )

    def _a_bits(self, site: Site, bits: int):
        decided = any(site.path == other.path for other in self.sites)
        if site.kind == "product":
            width = bits if decided else None
            return {"lhs": width, "rhs": width}
        return bits if decided else None
