"""What all recipes of an experiment share: model, sites, calibration set and statistics.

    load -> sites -> calibrate -> record -> score -> aggregate -> problem -> solve -> plan
         -> quantize -> sample -> evaluate -> results

A system is the recipe in the config; an arm is a recipe that differs from it in a few keys
(`config.for_arm`). `scoring.py` and `planning.py` turn recipes into plans, `arms.py` plans into
models and samples, `results.py` measures them, `outcome.py` writes files. Each stage is cached by
content.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpqdiff import conditioning, latents, record, timesteps
from mpqdiff import sites as site_list
from mpqdiff.artifacts import Store, chunked, digest, load_arrays, save_arrays, tree_digest
from mpqdiff.config import Config
from mpqdiff.denoiser import Denoise
from mpqdiff.diffusion.guidance import guide
from mpqdiff.diffusion.process import predict_eps
from mpqdiff.diffusion.samplers import (
    SAMPLERS,
    draws_noise,
    initial_noise,
    step_keys,
)
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.errors import InputError
from mpqdiff.plan import Plan, with_choices
from mpqdiff.program.configured import denoiser
from mpqdiff.quantize import activations
from mpqdiff.quantize.numerics import BITS
from mpqdiff.recipe import check_features, check_names, load_model, recipes
from mpqdiff.records import Statistics

# Bumped when a stage's results change.
VERSIONS = {
    "calibrate": 1, "record": 4, "score": 3, "seconds": 2, "plan": 6, "sample": 2, "features": 2,
    "gram": 1, "decode": 1, "trajectory": 1, "downstream": 1, "manifold": 2,
    "drift": 2, "student": 2, "steps": 1, "rollout": 1, "joint": 2, "health": 1,
}  # fmt: skip


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
        size, channels = self.module.image_size, self.module.channels
        self.image_shape: tuple[int, int, int] = (size, size, channels)
        self.conditions = conditioning.load(config, self.module)
        self.denoise: Denoise
        self.denoise, self.params = denoiser(self.module, self.params, *self.input_shapes(2))
        found, self.remainder = site_list.list_sites(
            self.denoise, self.params, *self.input_shapes(1)
        )
        self.all_sites = site_list.tie(site_list.pin(found, config.plan.pins), config.plan.ties)
        self.sites = site_list.planned(self.all_sites, products=config.quantize.products)
        self.conditions_hash = tree_digest(self.conditions)
        self.autoencoder = latents.load(config, self.module)
        check_features(config, self.pixel_shape)
        d = config.diffusion
        self.abar = alphas_cumprod(d.schedule, d.num_timesteps, d.betas)
        self._steps: dict[tuple, np.ndarray] = {}  # selected once each

    @cached_property
    def timesteps(self) -> np.ndarray:
        """The kept timesteps of arm 0, int32 [S], descending."""
        return self.steps(self.config)

    def steps(self, config: Config) -> np.ndarray:
        """The kept timesteps of the recipe's sampler, int32 [S], descending: those of the teacher
        alone, even ones where only a student, who comes later (`student`), can tell."""
        name = config.timesteps.name if config.timesteps.name != "drift" else "uniform"
        taken = timesteps.arguments(name)
        given = {key: config.timesteps[key] for key in config.timesteps if key in taken}
        asked = (config.diffusion.num_steps, name, *sorted(given.items()))
        if asked not in self._steps:
            if "gram" in taken:
                given["gram"] = self.eps_gram
            self._steps[asked] = timesteps.select(self.abar, *asked[:2], **given)
        return self._steps[asked]

    @cached_property
    def eps_gram(self) -> np.ndarray:
        """Gram of the float model's eps over the whole schedule, float64 [F,F]: what the steps of
        `shortest_path` and `drift_edges` are chosen by."""
        c = self.config

        def compute(folder):
            noise, cond, _ = self.inputs(c.seed, 0, c.timesteps.samples)
            found = timesteps.gram.record_gram(
                self.predicted(self.denoise),
                self.params,
                noise,
                cond,
                alphas_cumprod=self.abar,
                clip=c.diffusion.clip,
                memory_gb=c.calibration.memory_gb,
                chunks=chunked(folder, "gram"),
            )
            save_arrays(folder / "gram.npz", {"gram": found})

        diffusion = c.diffusion.to_dict()
        key = {
            "model": self.model_hash,
            "conditions": self.conditions_hash,
            "diffusion": {key: diffusion[key] for key in diffusion if key != "num_steps"},
            "samples": c.timesteps.samples,
            "memory_gb": c.calibration.memory_gb,
            "seed": c.seed,
        }
        folder = self.store.get("gram", version=VERSIONS["gram"], key=key, compute=compute)
        return load_arrays(folder / "gram.npz")["gram"]

    def predicted(self, denoise: Denoise) -> Denoise:
        """`denoise` under the config's guidance, giving eps."""
        d = self.config.diffusion
        guided = guide(denoise, scale=d.guidance_scale, null=self.conditions.null)
        return predict_eps(guided, d.prediction_type, self.abar)

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images: what the model makes, or what its latents are decoded to."""
        if self.autoencoder is None:
            return self.image_shape
        return self.autoencoder.image_shape(self.image_shape)

    def input_shapes(self, batch: int):
        """Shapes of (x_t, t, cond) of one batched call, t of shape []."""
        return self.conditions.input_shapes(self.image_shape, batch)

    def inputs(self, seed: int, start: int, count: int):
        """(x_T, cond, step keys or None) of images start..start+count-1."""
        noise = initial_noise(seed, start, count, self.image_shape)
        d = self.config.diffusion
        keys = step_keys(seed, start, count) if draws_noise(d.sampler, d.eta) else None
        return noise, self.conditions.take(start, count), keys

    def labels(self, count: int) -> tuple[np.ndarray, int]:
        """(class labels int32 [count] of images 0.., number of classes).

        Raises InputError for a model that is not conditioned on classes.
        """
        pool = self.conditions.pool
        if not isinstance(pool, np.ndarray) or pool.dtype != np.int32 or len(pool) < 2:
            raise InputError(
                "config.evaluate.downstream needs a class-conditional model: set it to False"
            )
        return np.asarray(self.conditions.take(0, count)), len(pool)

    @property
    def halves(self) -> int:
        """Denoiser evaluations per image and step: 2 under guidance."""
        return 1 if self.config.diffusion.guidance_scale == 1.0 else 2

    def sampler(self, denoise: Denoise, timesteps: np.ndarray, *, trajectory: bool = False):
        """`(params, x_T, cond, keys) -> x_0`, guided, over `timesteps`: what is timed.

        `keys` [B] draw the noise of the steps; without eta they are None.
        """
        d, predicted = self.config.diffusion, self.predicted(denoise)

        def run(params, x_T, cond, keys=None):
            return SAMPLERS[d.sampler](
                predicted,
                params,
                x_T,
                cond,
                timesteps=timesteps,
                alphas_cumprod=self.abar,
                keys=keys,
                eta=d.eta,
                clip=d.clip,
                trajectory=trajectory,
            )

        return run

    @cached_property
    def key(self) -> dict:
        """What every stage depends on: model, conditions, diffusion settings, arm 0's timesteps."""
        return {
            "model": self.model_hash,
            "conditions": self.conditions_hash,
            "diffusion": self.config.diffusion.to_dict(),
            "timesteps": self.timesteps.tolist(),
        }

    @cached_property
    def calibration(self) -> tuple[Path, dict]:
        """(folder, {x_ts [T,N,H,W,C], timesteps [T]}): the float model's own path."""
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
                {"x_ts": x_ts, "timesteps": self.timesteps[chosen]},
            )

        key = {
            **self.key,
            "samples": c.samples,
            "recorded": c.timesteps,
            "seed": self.config.seed,
            "batch": batch,
        }
        folder = self.store.get(
            "calibrate", version=VERSIONS["calibrate"], key=key, compute=compute
        )
        return folder, load_arrays(folder / "calibration.npz")

    @cached_property
    def calibrated(self) -> tuple[np.ndarray, np.ndarray, Any]:
        """(x_ts [T,N,H,W,C], timesteps [T], cond [N]): what the denoiser is called with."""
        data, count = self.calibration[1], self.config.calibration.samples
        take = self.conditions.take if self.halves == 1 else self.conditions.mixed
        return data["x_ts"], data["timesteps"], take(0, count)

    @cached_property
    def statistics(self) -> tuple[Path, Statistics]:
        """(folder, Statistics) of one pass over the calibration set."""
        calibration = self.calibration[0]

        def compute(folder):
            stats = record.record(
                self.denoise,
                self.params,
                *self.calibrated,
                self.sites,
                memory_gb=self.config.calibration.memory_gb,
                chunks=chunked(folder, "record"),
            )
            save_arrays(folder / "statistics.npz", vars(stats))

        key = {
            "calibration": calibration.name,
            "sites": [site.path for site in self.sites],
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

    def table(self, config: Config, a_bits: dict | int | None = None) -> activations.Table:
        """The activation table at a plan's own `a_bits`, or at one width (default: the widest)."""
        if not isinstance(a_bits, dict):
            bits = a_bits or max(config.plan.a_bits)
            a_bits = {
                site.path: {"lhs": bits, "rhs": bits} if site.kind == "product" else bits
                for site in self.sites
            }
        return activations.table(
            self.statistics[1],
            self.sites,
            mode=config.quantize.mode,
            a_bits=a_bits,
            groups=config.quantize.groups,
            beta=config.quantize.beta,
        )

    def served(self, config: Config, steps) -> tuple[tuple[int, int], ...]:
        """The range of the sampler's `steps` [S] that each row of the recipe's table serves."""
        mode = config.quantize.mode
        kept = activations.rows(self.statistics[1].timesteps, mode, config.quantize.groups)
        return activations.groups(kept, steps, mode)

    def asymmetric(self, config: Config) -> list[bool]:
        """[L]: which sites read an activation with a zero point; none where scales are online."""
        if config.quantize.mode == "online":
            return [False] * len(self.sites)
        return activations.lopsided(self.statistics[1], self.sites)

    def draft(self, config: Config) -> Plan:
        """The plan of the recipe but for its widths, all the widest, and what led to them."""
        mode, timesteps = config.quantize.mode, self.steps(config)
        nothing = {"lhs": None, "rhs": None}
        bare = Plan(
            model={"hash": self.model_hash, "name": self.model["name"]},
            w_bits=dict.fromkeys(site.path for site in self.all_sites),
            a_bits={
                site.path: nothing if site.kind == "product" else None for site in self.all_sites
            },
            mode=mode,
            groups=self.served(config, timesteps),
            timesteps=tuple(int(t) for t in timesteps),
            system="",
        )
        widest = (max(BITS), max(config.plan.a_bits))
        return with_choices(bare, self.sites, dict.fromkeys((s.path for s in self.sites), widest))

    def evaluations(self, config: Config) -> int:
        """Denoiser evaluations that an image of the recipe takes."""
        return config.diffusion.num_steps * self.halves
