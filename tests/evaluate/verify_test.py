"""Verification of compiled programs: it passes what runs as planned, and names what does not."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff import sites as site_list
from mpqdiff.denoiser import from_linen
from mpqdiff.diffusion.samplers import ddim
from mpqdiff.evaluate import verify
from mpqdiff.kernels.quantized_matmul import quantized_matmul
from mpqdiff.models.product import Product
from mpqdiff.plan import Plan
from mpqdiff.quantize import activations, apply, backends
from mpqdiff.records import Statistics

BATCH, SHAPE = 4, (4, 4, 1)
STEPS = np.array([9, 4, 0], np.int32)


class _Model(nn.Module):
    """A site that sees one row (time), two that see a batch, and a product of activations."""

    @nn.compact
    def __call__(self, x_t, t, label):
        h = nn.Dense(16, name="inner")(x_t.reshape(len(x_t), 16))
        h = h + nn.Dense(16, name="time")(jnp.atleast_1d(t)[:, None] * jnp.ones(6) / 10)
        h = nn.tanh(h) + Product("bi,bij->bj", name="mix")(h, jnp.tanh(h[:, :, None] * h[:, None]))
        return nn.Dense(16, name="outer")(h).reshape(x_t.shape)


def _plan(sites, w_bits):
    return Plan(
        model={"hash": "h"},
        w_bits={s.path: None if s.kind == "product" else w_bits for s in sites},
        a_bits={s.path: {"lhs": 8, "rhs": 8} if s.kind == "product" else 8 for s in sites},
        mode="step_table",
        groups=((9, 0),),
        timesteps=tuple(STEPS.tolist()),
        system="test",
    )


class _Built:
    """A quantised `_Model` and its compiled sampler."""

    def __init__(self, w_bits=4, *, matmul=None, left_out=(), backend="kernels"):
        module = _Model()
        x_t = jnp.zeros((BATCH, *SHAPE))
        start = jax.eval_shape(module.init, jax.random.key(0), x_t, jnp.zeros((), int), None)
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda leaf: rng.standard_normal(leaf.shape, np.float32), start["params"]
        )
        denoise = from_linen(module)
        examples = site_list.example_inputs(SHAPE)
        self.sites, _ = site_list.list_sites(denoise, params, *examples)
        count = len(self.sites)
        low, high = -np.ones((3, count, 2), np.float32), np.ones((3, count, 2), np.float32)
        stats = Statistics(STEPS, None, None, None, None, None, low, high)
        plan = _plan(self.sites, w_bits)
        plan = replace(plan, a_bits=plan.a_bits | dict.fromkeys(left_out))
        table = activations.table(stats, self.sites, mode="step_table", a_bits=plan.a_bits)
        flags = activations.lopsided(stats, self.sites)
        tensors = apply.quantize(params, self.sites, plan, table, flags)
        patch = pytest.MonkeyPatch()
        if matmul:
            hold, open_, _ = kernels_backend()
            patch.setitem(backends.BACKENDS, "kernels", lambda: (hold, open_, matmul))
        model = apply.build(denoise, params, self.sites, plan, tensors, table, backend=backend)
        patch.undo()
        self.bytes = model.bytes

        def sample(params, x_T, labels):
            return ddim(model.denoise, params, x_T, labels, timesteps=STEPS,
                        alphas_cumprod=np.linspace(0.99, 0.1, 10, dtype=np.float32))  # fmt: skip

        labels = jnp.zeros(BATCH, jnp.int32)
        self.compiled = jax.jit(sample).lower(model.params, x_t, labels).compile()
        self.execution = verify.read(self.compiled, images=[(BATCH, *SHAPE), (BATCH,)])

    def complaints(self, **changes):
        given = {
            "promised_bytes": self.bytes,
            "passed_bytes": self.bytes,
            "resident_bytes": self.execution.resident_bytes,
        }
        return verify.check(self.execution, self.sites, **given | changes)


kernels_backend = backends._kernels_backend


@pytest.fixture(scope="module")
def built():
    return _Built()


def test_a_built_plan_passes(built):
    assert built.complaints() == []
    assert set(built.execution.products) == {"inner", "time", "mix", "outer"}
    assert all(found[0][0] == "s32" for found in built.execution.products.values())


def test_one_row_products_are_read_as_integers(built):
    """XLA on the CPU lowers them without a dot: to converts, a multiply and a reduce."""
    products = built.execution.products["time"]
    assert {result for result, _ in products} <= set(verify.INTEGER)


def _float_where(x, weight, *rest, x_bits, columns):
    """A float product in the place of the integer one, for weights of `columns` inputs."""
    if weight.shape[0] != columns:
        return quantized_matmul(x, weight, *rest, x_bits=x_bits)
    return jnp.dot(x, weight.astype(jnp.float32) * rest[2]) + rest[4]


@pytest.mark.parametrize(("columns", "named"), [(6, {"time"}), (16, {"inner", "outer"})])
def test_a_site_that_runs_in_float_is_named(columns, named):
    complaints = _Built(matmul=partial(_float_where, columns=columns)).complaints()
    assert len(complaints) == len(named)
    for path, complaint in zip(sorted(named), sorted(complaints), strict=True):
        assert complaint.startswith(f"site {path!r}: planned as integer, runs")
        assert "f32" in complaint


def test_a_site_that_was_never_rewritten_is_named():
    complaints = _Built(left_out=["outer"]).complaints()
    assert complaints == ["site 'outer': no product of its own in the compiled program"]


def test_bytes_that_differ_are_told(built):
    complaints = built.complaints(passed_bytes=built.bytes + 4)
    assert complaints == [f"bytes passed {built.bytes + 4}, promised by the plan {built.bytes}"]


def test_resident_bytes_that_differ_are_told(built):
    resident = built.execution.resident_bytes
    (complaint,) = built.complaints(resident_bytes=resident - 1)
    assert f"keeps {resident} bytes" in complaint
    assert f"recorded resident_bytes {resident - 1}" in complaint
    assert built.complaints(resident_bytes=None) == []


def test_the_carry_holds_every_weight_at_its_width_or_wider(built):
    """4-bit weights are resident packed, or unpacked where XLA hoists that out of the loop."""
    weights = 16 * 16 * 2 + 6 * 16
    held = sum(built.execution.carry.get(kind, 0) for kind in ("s8", "s32", "s4"))
    assert held >= weights / 2
    assert built.execution.peak_bytes > built.bytes


def test_a_one_step_sampler_has_no_loop_and_carries_nothing():
    compiled = jax.jit(lambda x: x * 2).lower(jnp.ones(3)).compile()
    execution = verify.read(compiled, images=[])
    assert execution.carry == {}
    assert execution.resident_bytes == 0
    assert execution.peak_bytes >= 24


class _Text:
    """A compiled program of which only the text is known."""

    def __init__(self, text):
        self.text = text

    def as_text(self):
        return self.text

    def memory_analysis(self):
        class Memory:
            argument_size_in_bytes, output_size_in_bytes, temp_size_in_bytes = 100, 20, 3

        return Memory


PROGRAM = """
  %p.1 = s8[4,16]{1,0} parameter(0)
  %w.1 = s8[16,16]{1,0} parameter(1)
  %f.1 = f32[16,16]{1,0} parameter(2)
  %dot.1 = s32[4,16]{1,0} dot(%p.1, %w.1), metadata={op_name="jit(run)/site[a.b]/dot_general"}
  %k = f32[4,16]{1,0} custom-call(%f.1), metadata={op_name="site[e]/product_int8_w4/pallas_call"}
  %l = f32[4,9]{1,0} custom-call(%f.1), metadata={op_name="site[f]/product_bf16_w4/pallas_call"}
  ROOT %dot.2 = s32[4,16]{1,0} dot(%p.1, %f.1), metadata={op_name="jit(run)/site[c]/dot_general"}
  %add.1 = f32[4]{0} add(%p.1, %f.1), metadata={op_name="jit(run)/site[d]/add"}
  %while.0 = (s32[], f32[2]{0}) while(%t), condition=%c, body=%b
  %while.1 = (s32[], f32[2,3]{1,0}, s32[2]{0}, f32[2]{0}, s4[5]{0}, s8[7]{0}) while(%t), body=%b
"""


def test_the_text_of_a_program_is_read():
    execution = verify.read(_Text(PROGRAM), images=[(2, 3), (2,)])
    assert execution.products == {
        "a.b": [("s32", ("s8", "s8"))],
        "c": [("s32", ("s8", "f32"))],
        "e": [("s32", ("s8", "s4"))],  # a Pallas kernel is told by its name
        "f": [("f32", ("?",))],
    }
    # The widest loop; scalars, x_t and the labels apart, but not a bias of the labels' shape.
    assert execution.carry == {"f32": 8, "s4": 3, "s8": 7}
    assert execution.resident_bytes == 18
    assert execution.peak_bytes == 123


def test_a_float_operand_is_enough_to_complain():
    execution = verify.read(_Text(PROGRAM), images=[(2, 3), (2,)])
    sites = [
        site_list.Site(path, "dense", (16, 16), 256, 16, 256, path) for path in ("a/b", *"cdef")
    ]
    complaints = verify.check(execution, sites, promised_bytes=1, passed_bytes=1)
    assert [complaint.split(":")[0] for complaint in complaints] == [
        "site 'c'",
        "site 'd'",
        "site 'f'",
    ]


def test_an_interpreted_kernel_of_packed_weights_passes():
    built = _Built(4, backend="pallas_interpret")
    assert built.complaints() == []
