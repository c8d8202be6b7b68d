"""A small network with every kind of site, its supernet, and the integer model of one site."""

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from mpqdiff import record
from mpqdiff import sites as site_list
from mpqdiff.denoiser import Prediction, from_linen
from mpqdiff.models.product import Product
from mpqdiff.plan import Plan
from mpqdiff.quantize import activations, apply, simulate
from mpqdiff.records import Statistics

CHOICES = ((3, 4), (3, 8), (6, 8), (32, 32))
TIMESTEPS = np.array([90, 40, 3], np.int32)
LABELS = np.arange(6, dtype=np.int32) % 3


class Net(nn.Module):
    """A conv, a product of activations, a lopsided Dense, and one that nothing reads."""

    @nn.compact
    def __call__(self, x_t, t, label):
        batch = x_t.shape[0]
        x = nn.Conv(6, (3, 3), name="conv")(x_t).reshape(batch, 16, 6)
        nn.Dense(3, name="dead")(x)
        clock = nn.Embed(3, 6, name="label")(label) + 0.01 * t
        x = x + 0.1 * Product("bpq,bqd->bpd", name="mix")(x @ x.swapaxes(1, 2), x)
        x = nn.gelu(nn.Dense(8, name="wide")(x + clock[:, None]))
        return Prediction(nn.Dense(1, use_bias=False, name="last")(x).reshape(x_t.shape))


@dataclass(frozen=True)
class Small:
    """`denoise` with its parameters, planned sites, inputs [T,N,4,4,1] and recorded ranges."""

    denoise: Any
    params: Any
    sites: list
    x_ts: np.ndarray
    stats: Statistics
    net: Any  # the supernet of CHOICES
    built: dict = field(default_factory=dict)  # integer models, by (site, choice, back end)
    choices = CHOICES
    timesteps = TIMESTEPS
    labels = LABELS

    @property
    def legal(self):
        """Every choice at every site."""
        return np.ones((len(self.sites), len(CHOICES)), bool)

    def table(self, bits):
        """The activation table of one width."""
        entry = {"dense": bits, "conv": bits, "product": {"lhs": bits, "rhs": bits}}
        a_bits = {site.path: entry[site.kind] for site in self.sites}
        return activations.table(self.stats, self.sites, mode="step_table", a_bits=a_bits)

    def integer(self, index, choice, backend="kernels"):
        """(params, denoise) of the integer model of the plan that quantises one site alone."""
        key = index, choice, backend
        if key not in self.built:
            self.built[key] = self._build(*key)
        return self.built[key]

    def _build(self, index, choice, backend):
        w, a = CHOICES[choice]
        path, kind = self.sites[index].path, self.sites[index].kind
        nothing = dict.fromkeys((site.path for site in self.sites), None)
        plan = Plan(
            model={"hash": "small"},
            w_bits={**nothing, path: None if kind == "product" else w},
            a_bits={**nothing, path: {"lhs": a, "rhs": a} if kind == "product" else a},
            mode="step_table",
            groups=((90, 3),),
            timesteps=tuple(TIMESTEPS.tolist()),
            system="test",
        )
        table, flags = self.table(a), activations.lopsided(self.stats, self.sites)
        tensors = apply.quantize(self.params, self.sites, plan, table, flags)
        built = apply.build(
            self.denoise, self.params, self.sites, plan, tensors, table, backend=backend
        )
        return built.params, built.denoise

    def index(self, path):
        """Where the site called `path` is."""
        return [site.path for site in self.sites].index(path)


@pytest.fixture(scope="session")
def small() -> Small:
    rng = np.random.default_rng(0)
    module = Net()
    x_ts = rng.normal(size=(3, 6, 4, 4, 1)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x_ts[0], TIMESTEPS[0], LABELS)
    params = jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) * 0.3).astype(np.float32), shapes["params"]
    )
    denoise = from_linen(module)
    every, _ = site_list.list_sites(denoise, params, *site_list.example_inputs((4, 4, 1)))
    sites = site_list.planned(every, products=True)
    one = jax.jit(record.one_timestep(denoise, sites, grams=False))
    rows = [one(params, x_t, t, LABELS) for x_t, t in zip(x_ts, TIMESTEPS, strict=True)]
    low, high = (np.stack([row[name] for row in rows]) for name in ("input_min", "input_max"))
    empty = np.zeros(0)
    stats = Statistics(TIMESTEPS, empty, empty, empty, empty, empty, low, high)
    flags = activations.lopsided(stats, sites)
    assert flags == [site.path == "last" for site in sites]
    bare = Small(denoise, params, sites, x_ts, stats, None)
    tables = {bits: bare.table(bits) for bits in (4, 8)}
    net = simulate.supernet(params, sites, CHOICES, tables, flags)
    return Small(denoise, params, sites, x_ts, stats, net)
