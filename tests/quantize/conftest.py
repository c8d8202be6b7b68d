"""A very small DiT with every parameter random, its sites, and the ranges of their inputs."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest

from mpqdiff import models, record, weights
from mpqdiff import sites as site_list
from mpqdiff.denoiser import from_linen
from mpqdiff.plan import Plan
from mpqdiff.quantize import activations, apply
from mpqdiff.records import Statistics

TIMESTEPS = np.array([900, 500, 30], np.int32)


@dataclass(frozen=True)
class Tiny:
    """A denoiser with all that `quantize` needs; `inputs` are (x_t [4,8,8,1], labels [4])."""

    denoise: Any
    params: Any
    every: list  # all sites
    ranges: dict  # path -> (input_min [T,2], input_max [T,2])
    inputs: tuple

    def sites(self, *, products: bool = False) -> list:
        return site_list.planned(self.every, products=products)

    def statistics(self, sites) -> Statistics:
        low, high = (np.stack([self.ranges[s.path][i] for s in sites], 1) for i in (0, 1))
        return Statistics(TIMESTEPS, None, None, None, None, None, low, high)

    def plan(self, widths=(8,), *, mode="step_table", products=False, a_bits=8) -> Plan:
        """Every weight site takes the next of `widths` in turn."""
        sites = self.sites(products=products)
        bits = {s.path: widths[i % len(widths)] for i, s in enumerate(self.sites())}
        pair = {"lhs": a_bits, "rhs": a_bits} if products else {"lhs": None, "rhs": None}
        planned = {s.path for s in sites}
        return Plan(
            model={"hash": "tiny"},
            w_bits={s.path: bits.get(s.path) for s in self.every},
            a_bits={
                s.path: pair if s.kind == "product" else a_bits if s.path in planned else None
                for s in self.every
            },
            mode=mode,
            groups=activations.groups(TIMESTEPS, TIMESTEPS, mode),
            timesteps=tuple(TIMESTEPS.tolist()),
            system="test",
        )

    def tensors(self, plan: Plan, sites):
        """(table, asymmetric flags, integer tensors) of `plan`."""
        stats = self.statistics(sites)
        table = activations.table(stats, sites, mode=plan.mode, a_bits=plan.a_bits)
        flags = activations.lopsided(stats, sites)
        return table, flags, apply.quantize(self.params, sites, plan, table, flags)

    def build(self, plan: Plan, *, products=False, backend="kernels") -> apply.QuantizedModel:
        sites = self.sites(products=products)
        table, _, tensors = self.tensors(plan, sites)
        return apply.build(self.denoise, self.params, sites, plan, tensors, table, backend=backend)

    def float_eps(self, t):
        x_t, labels = self.inputs
        return jax.jit(self.denoise)(self.params, x_t, t, labels).eps


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    module = models.build(
        "dit", image_size=8, channels=1, patch=4, width=16, depth=1, num_heads=2, num_classes=3
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    params = jax.tree.map(
        lambda leaf: (rng.standard_normal(leaf.shape) * 0.2).astype(np.float32), shapes
    )
    denoise = from_linen(module)
    every, _ = site_list.list_sites(denoise, params, *site_list.example_inputs((8, 8, 1)))
    sites = site_list.planned(every, products=True)
    x_t = rng.standard_normal((4, 8, 8, 1)).astype(np.float32)
    labels = np.array([0, 1, 2, 1], np.int32)
    one = jax.jit(record.one_timestep(denoise, sites, grams=False))
    rows = [one(params, x_t, np.full(4, t), labels) for t in TIMESTEPS]
    low = np.stack([row["input_min"] for row in rows])
    high = np.stack([row["input_max"] for row in rows])
    ranges = {site.path: (low[:, i], high[:, i]) for i, site in enumerate(sites)}
    return Tiny(denoise, params, every, ranges, (x_t, labels))
