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

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff import record
from mpqdiff import sites as site_list
from mpqdiff.artifacts import Store, chunked, digest, load_arrays, save_arrays, tree_digest
from mpqdiff.config import Config
from mpqdiff.denoiser import Denoise, from_linen
from mpqdiff.diffusion.guidance import guide
from mpqdiff.diffusion.samplers import (
    SAMPLERS,
    draws_noise,
    initial_noise,
    step_keys,
    uniform_timesteps,
)
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.plan import Plan, with_choices
from mpqdiff.quantize import activations
from mpqdiff.quantize.numerics import BITS
from mpqdiff.recipe import check_features, check_names, load_model, recipes
from mpqdiff.records import Statistics

# Bumped when a stage's results change.
VERSIONS = {
    "calibrate": 1, "record": 3, "score": 3, "seconds": 1, "plan": 4, "sample": 1, "features": 2,
    "trajectory": 1, "downstream": 1,
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
        self.denoise: Denoise = from_linen(self.module)
        self.image_shape = (self.module.image_size,) * 2 + (self.module.channels,)
        found, self.remainder = site_list.list_sites(
            self.denoise, self.params, *site_list.example_inputs(self.image_shape)
        )
        self.all_sites = site_list.tie(site_list.pin(found, config.plan.pins), config.plan.ties)
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
        d = self.config.diffusion
        keys = step_keys(seed, start, count) if draws_noise(d.sampler, d.eta) else None
        return noise, jnp.asarray(self.labels(start, count)), keys

    @property
    def num_classes(self) -> int:
        """Classes of the model's labels, the null label apart."""
        return self.module.num_classes

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

    def mixed_labels(self, labels: np.ndarray) -> np.ndarray:
        """`labels`, int32 [N], every other one null under guidance: it is evaluated as often."""
        if self.halves == 2:
            labels = np.where(np.arange(len(labels)) % 2, self.module.num_classes, labels)
        return labels.astype(np.int32)

    @cached_property
    def statistics(self) -> tuple[Path, Statistics]:
        """(folder, Statistics) of one pass over the calibration set."""
        calibration, data = self.calibration

        def compute(folder):
            stats = record.record(
                self.denoise,
                self.params,
                data["x_ts"],
                data["timesteps"],
                self.mixed_labels(data["labels"]),
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
        )

    def asymmetric(self, config: Config) -> list[bool]:
        """[L]: which sites read an activation with a zero point; none where scales are online."""
        if config.quantize.mode == "online":
            return [False] * len(self.sites)
        return activations.lopsided(self.statistics[1], self.sites)

    def draft(self, config: Config) -> Plan:
        """The plan of the recipe but for its widths, all the widest, and what led to them."""
        mode, timesteps = config.quantize.mode, self.steps(config.diffusion.num_steps)
        nothing = {"lhs": None, "rhs": None}
        bare = Plan(
            model={"hash": self.model_hash, "name": self.model["name"]},
            w_bits=dict.fromkeys(site.path for site in self.all_sites),
            a_bits={
                site.path: nothing if site.kind == "product" else None for site in self.all_sites
            },
            mode=mode,
            groups=activations.groups(self.statistics[1].timesteps, timesteps, mode),
            timesteps=tuple(int(t) for t in timesteps),
            system="",
        )
        widest = (max(BITS), max(config.plan.a_bits))
        return with_choices(bare, self.sites, dict.fromkeys((s.path for s in self.sites), widest))

    def evaluations(self, config: Config) -> int:
        """Denoiser evaluations that an image of the recipe takes."""
        return config.diffusion.num_steps * self.halves
