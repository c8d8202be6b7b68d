"""Health of activations: what was planted is what is counted, at its site and nowhere else."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff import intercept, models, record, weights
from mpqdiff import sites as site_list
from mpqdiff.denoiser import from_linen
from mpqdiff.errors import InputError
from mpqdiff.evaluate import health
from mpqdiff.plan import Plan
from mpqdiff.quantize import activations, apply
from mpqdiff.records import Statistics

TIMESTEPS = np.array([900, 30], np.int32)
BATCH = 3


class _Tiny:
    """A very small DiT in 8 bits; its inputs at every step, which are those it is calibrated on."""

    def __init__(self):
        module = models.build(
            "dit", image_size=8, channels=1, patch=4, width=8, depth=1, num_heads=2, num_classes=2
        )
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
        self.params = jax.tree.map(
            lambda leaf: (rng.standard_normal(leaf.shape) * 0.2).astype(np.float32), shapes
        )
        self.denoise = from_linen(module)
        every, _ = site_list.list_sites(
            self.denoise, self.params, *site_list.example_inputs((8, 8, 1))
        )
        self.sites = site_list.planned(every, products=True)
        self.x_ts = rng.standard_normal((2, BATCH, 8, 8, 1)).astype(np.float32)
        self.labels = np.array([0, 1, 1], np.int32)
        one = jax.jit(record.one_timestep(self.denoise, self.sites, grams=False))
        rows = [
            one(self.params, x_t, np.full(BATCH, t), self.labels)
            for x_t, t in zip(self.x_ts, TIMESTEPS, strict=True)
        ]
        low, high = (np.stack([row[f"input_{end}"] for row in rows]) for end in ("min", "max"))
        # Wider than what was seen: quantised layers before a site move its inputs a little.
        self.stats = Statistics(TIMESTEPS, None, None, None, None, None, 1.2 * low, 1.2 * high)
        self.plan = Plan(
            model={"hash": "tiny"},
            w_bits={s.path: 8 if s.parameters else None for s in self.sites},
            a_bits={s.path: {"lhs": 8, "rhs": 8} if s.kind == "product" else 8 for s in self.sites},
            mode="step_table",
            groups=activations.groups(TIMESTEPS, TIMESTEPS, "step_table"),
            timesteps=tuple(TIMESTEPS.tolist()),
            system="test",
        )

    def table(self, mode="step_table"):
        return activations.table(self.stats, self.sites, mode=mode, a_bits=self.plan.a_bits)

    def report(self, *, x_ts=None, table=None, plan=None):
        plan = plan or self.plan
        table = self.table(plan.mode) if table is None else table
        online = plan.mode == "online"
        flags = activations.lopsided(self.stats, self.sites)
        flags = [flag and not online for flag in flags]
        tensors = apply.quantize(self.params, self.sites, plan, table, flags)
        model = apply.build(self.denoise, self.params, self.sites, plan, tensors, table)
        trajectory = self.x_ts if x_ts is None else x_ts, TIMESTEPS, self.labels
        return health.report(
            health.count(model.denoise, model.params, self.sites, plan, trajectory)
        )


@pytest.fixture(scope="module")
def tiny():
    return _Tiny()


def test_a_calibrated_model_is_healthy_and_every_value_is_counted(tiny):
    found = tiny.report()
    assert found["clip_rate"]["max"] == found["not_finite"] == 0
    assert list(found["by_site"]) == [site.path for site in tiny.sites]
    values = {path: entry["values"] for path, entry in found["by_site"].items()}
    tokens = 2 * BATCH * 4  # steps, images, tokens
    assert values["patch_embed"] == tokens * 16
    assert values["block_0/attn/qkv"] == tokens * 8
    assert values["block_0/attn/qk"] == 2 * tokens * 8
    assert values["block_0/attn/pv"] == tokens * (2 * 4 + 8)


def test_planted_nan_and_infinities_are_counted_where_they_enter(tiny):
    x_ts = tiny.x_ts.copy()
    x_ts[1, 0, :2, 3] = np.nan
    x_ts[0, 2, 7, 7] = np.inf
    x_ts[1, 1, 0, 0] = -np.inf
    found = tiny.report(x_ts=x_ts)
    entry = found["by_site"]["patch_embed"]
    assert (entry["nan"], entry["inf"], entry["clipped"]) == (2, 2, 0)
    # The integers of the first product are finite again, which is why nobody would notice.
    assert found["not_finite"] == 4


@pytest.mark.parametrize("path", ["block_0/mlp/fc1", "block_0/mlp/fc2"])
def test_a_planted_small_scale_is_found_by_its_clip_rate(tiny, path):
    table = tiny.table()
    (column,) = activations.columns(tiny.sites)[path]
    planted = table._replace(scale=table.scale.at[1, column].multiply(0.1))  # at t = 30
    found = tiny.report(table=planted)
    assert found["clip_rate"]["site"] == path
    assert found["clip_rate"]["max"] == found["by_site"][path]["clip_rate"]

    inputs = []

    def reduce(at, module, kind, args, out):
        if at == path:
            inputs.append(args[0])

    # The float model's inputs at that step, which the integer one's are close to.
    intercept.observe(tiny.denoise, reduce)(tiny.params, tiny.x_ts[1], np.int32(30), tiny.labels)
    zero = float(table.zero_point[1, column])
    steps = np.asarray(inputs[0]) / float(planted.scale[1, column]) + zero
    outside = np.mean((steps < -128.5) | (steps > 127.5))
    assert outside > 0.1
    assert abs(found["by_site"][path]["clip_rate"] - outside / 2) < 0.03
    others = [entry for at, entry in found["by_site"].items() if at != path]
    assert np.mean([entry["clip_rate"] for entry in others]) < 0.02


def test_online_scales_clip_nothing_and_products_in_float_are_left_out(tiny):
    nothing = {"lhs": None, "rhs": None}
    left = {site.path: nothing for site in tiny.sites if site.kind == "product"}
    plan = replace(tiny.plan, mode="online", a_bits=tiny.plan.a_bits | left)
    found = tiny.report(plan=plan)
    assert found["clip_rate"]["max"] == 0
    assert set(found["by_site"]) == {site.path for site in tiny.sites} - left.keys()


def test_a_report_without_sites_or_scales_is_refused():
    with pytest.raises(InputError, match="no site runs in integers"):
        health.report({})


def test_counting_is_against_rounded_steps():
    row = jnp.array([[0.5]]), jnp.array([[3]], jnp.int8)
    x = jnp.array([62.2, 62.3, -65.7, -65.8, jnp.nan, jnp.inf, 0.0])
    counts = health._count(tuple(value[0] for value in row), x, 0, 8)
    # round(62.3 / 0.5) + 3 = 128, round(-65.8 / 0.5) + 3 = -129.
    np.testing.assert_array_equal(counts, [7, 2, 1, 1])
