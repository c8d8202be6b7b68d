"""AQT as a back end: equal accumulators, equal outputs to rounding, its containers, its product."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.kernels.quantized_matmul import quantized_matmul, xla
from mpqdiff.quantize import aqt
from mpqdiff.quantize.numerics import activation_scale, column_sums, quantize_weight


def _integers(seed, *shape):
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def _compiled_dots(function, *args):
    """(lhs, rhs, result) element types of every dot in the compiled program."""
    found = []
    for computation in jax.jit(function).lower(*args).compile().as_text().split("\n}"):
        types = dict(re.findall(r"%([\w.-]+) = (\w+)\[", computation))
        dots = re.findall(r" = (\w+)\[\S* dot\(%([\w.-]+), %([\w.-]+)\)", computation)
        found += [(types[lhs], types[rhs], result) for result, lhs, rhs in dots]
    return found


@pytest.mark.parametrize("lead", [(), (7,), (2, 5)])
def test_accumulators_equal_ours(lead):
    xq, wq = _integers(0, *lead, 4096), _integers(1, 4096, 6)
    ours, theirs = jax.jit(xla.accumulate)(xq, wq), jax.jit(aqt.accumulate)(xq, wq)
    assert theirs.dtype == jnp.int32
    np.testing.assert_array_equal(theirs, ours)
    np.testing.assert_array_equal(theirs, xq.astype(np.int64) @ wq.astype(np.int64))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_layer_equals_ours_to_float_rounding(bits, asymmetric, per_sample):
    rng = np.random.default_rng(bits)
    x = (rng.standard_normal((3, 5, 40)) + 0.7).astype(np.float32)
    qvalue, scale = quantize_weight(rng.standard_normal((40, 12)).astype(np.float32), bits)
    axes = (1, 2) if per_sample else None
    x_scale, zero = activation_scale(x.min(axes), x.max(axes), 8, asymmetric=asymmetric)
    arguments = x_scale, zero if asymmetric else None, scale, column_sums(qvalue)
    bias = rng.standard_normal(12).astype(np.float32)
    opened = aqt.open_(aqt.hold(qvalue, bits), bits=bits, shape=qvalue.shape)
    for term in (bias, None):
        ours = jax.jit(quantized_matmul)(x, qvalue, *arguments, term)
        theirs = jax.jit(aqt.aqt_matmul)(x, opened, *arguments, term)
        assert theirs.dtype == jnp.float32
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
def test_containers_give_the_integers_back(bits):
    limit = 1 << (bits - 1)
    qvalue = np.random.default_rng(2).integers(-limit, limit, (9, 10)).astype(np.int8)
    held = aqt.hold(qvalue, bits)
    assert held.dtype == (jnp.int4 if bits == 4 else jnp.int8)
    opened = jax.jit(lambda held: aqt.open_(held, bits=bits, shape=(9, 10)))(held)
    assert opened.dtype == jnp.int8
    np.testing.assert_array_equal(opened, qvalue)


def test_containers_report_what_the_device_holds():
    qvalue = np.zeros((32, 48), np.int8)
    assert aqt.container_bytes(aqt.hold(qvalue, 8)) == 32 * 48
    assert aqt.container_bytes(aqt.hold(qvalue, 2)) == 32 * 48  # ours packs these to a quarter
    assert aqt.container_bytes(aqt.hold(qvalue, 4)) in (32 * 48 // 2, 32 * 48)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_compiled_product_is_int8_by_int8_into_int32(bits):
    x, scale = np.ones((16, 96), np.float32), np.ones(48, np.float32)

    def layer(x, held):
        opened = aqt.open_(held, bits=bits, shape=(96, 48))
        return aqt.aqt_matmul(x, opened, 0.02, None, scale, None, None)

    held = aqt.hold(np.ones((96, 48), np.int8), bits)
    assert _compiled_dots(layer, x, held) == [("s8", "s8", "s32")]


def test_unusable_operands_are_refused_as_ours_are():
    wq, scale = _integers(3, 8, 4), np.ones(4, np.float32)
    with pytest.raises(InputError, match="unpack and flatten"):
        aqt.aqt_matmul(np.ones((2, 7), np.float32), wq, 1.0, None, scale, None, None)
    with pytest.raises(InputError, match="column_sums"):
        aqt.aqt_matmul(np.ones((2, 8), np.float32), wq, 1.0, jnp.int8(1), scale, None, None)
    with pytest.raises(InputError, match="2 to 8 bits"):
        aqt.container_dtype(9)
