"""Simulated against integer: the same int32 accumulators, one compile for every plan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.kernels.quantized_matmul import quantized_matmul, xla
from mpqdiff.quantize import apply, simulate
from mpqdiff.quantize.numerics import quantize_activation

WIDTHS = ((8,), (4, 8), (2, 3, 5, 6, 7))
T = np.int32(500)


def _bits(tiny, plan):
    return jnp.array([plan.w_bits[site.path] for site in tiny.sites()], jnp.int32)


def _listening(matmul, heard: list):
    """`matmul`, noting the int32 accumulator of each of its products in `heard`."""

    def listen(x, weight, x_scale, zero, w_scale, colsum, bias, *, x_bits):
        xq = quantize_activation(x, x_scale, 0 if zero is None else zero, x_bits)
        heard.append(xla.accumulate(xq, weight))
        return matmul(x, weight, x_scale, zero, w_scale, colsum, bias, x_bits=x_bits)

    return listen


def _with_accumulators(denoise, heard: list):
    def run(params, x_t, labels):
        heard.clear()
        return denoise(params, x_t, T, labels).eps, list(heard)

    return jax.jit(run)


@pytest.fixture(scope="module")
def compared(tiny):
    """[(integer (eps, accumulators), simulated (eps, accumulators))] per plan, and the traces."""
    patch, heard, traces = pytest.MonkeyPatch(), [], {"params": 0, "denoise": 0}
    sites = tiny.sites()
    table, flags, _ = tiny.tensors(tiny.plan(), sites)
    patch.setattr(simulate, "quantized_matmul", _listening(quantized_matmul, heard))
    patch.setitem(
        apply.BACKENDS,
        "listening",
        lambda: (*apply._kernels_backend()[:2], _listening(quantized_matmul, heard)),
    )

    def params_of(params, bits):
        traces["params"] += 1
        return simulate.simulated_params(params, sites, bits, table, flags)

    def counted(params, x_t, t, labels):
        traces["denoise"] += 1
        return denoise(params, x_t, t, labels)

    denoise = simulate.simulated_denoise(tiny.denoise, sites, a_bits=tiny.plan().a_bits)
    make, simulated = jax.jit(params_of), _with_accumulators(counted, heard)
    pairs = []
    for widths in WIDTHS:
        plan = tiny.plan(widths)
        model = tiny.build(plan, backend="listening")
        integer = _with_accumulators(model.denoise, heard)(model.params, *tiny.inputs)
        held = make(tiny.params, _bits(tiny, plan))
        pairs.append((integer, simulated(held, *tiny.inputs)))
    patch.undo()
    return pairs, traces


def test_accumulators_are_equal_and_outputs_within_a_thousandth(compared, tiny):
    for (eps, accumulators), (other_eps, other_accumulators) in compared[0]:
        assert len(accumulators) == len(other_accumulators) == len(tiny.sites())
        for one, other in zip(accumulators, other_accumulators, strict=True):
            assert one.dtype == other.dtype == jnp.int32
            np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(other_eps, eps, atol=1e-3, rtol=0)


def test_plans_differ_in_what_they_compute(compared):
    outputs = [np.asarray(integer[0]) for integer, _ in compared[0]]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-2
    assert np.abs(outputs[1] - outputs[2]).max() > 1e-2


def test_one_trace_serves_all_plans(compared):
    assert compared[1] == {"params": 1, "denoise": 1}


def test_plans_can_be_vmapped(tiny, compared):
    sites = tiny.sites()
    table, flags, _ = tiny.tensors(tiny.plan(), sites)
    denoise = simulate.simulated_denoise(tiny.denoise, sites, a_bits=tiny.plan().a_bits)

    @jax.jit
    @jax.vmap
    def every(bits):
        held = simulate.simulated_params(tiny.params, sites, bits, table, flags)
        return denoise(held, tiny.inputs[0], T, tiny.inputs[1]).eps

    found = every(jnp.stack([_bits(tiny, tiny.plan(widths)) for widths in WIDTHS]))
    for eps, (integer, _) in zip(found, compared[0], strict=True):
        np.testing.assert_allclose(eps, integer[0], atol=1e-3, rtol=0)
