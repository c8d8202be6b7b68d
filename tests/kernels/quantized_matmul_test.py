"""Every implementation against the definition and against float64, its scales and its refusals."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.kernels.quantized_matmul import (
    MAX_CONTRACTION,
    quantized_matmul,
    reference,
    xla,
)
from mpqdiff.quantize.numerics import (
    activation_scale,
    column_sums,
    quantize_activation,
    quantize_weight,
)

RUNNABLE = ("reference", "xla", "pallas_interpret", "pallas_gpu_interpret")
COMPILED = jax.jit(
    quantized_matmul, static_argnames=("x_bits", "w_bits", "activation", "implementation")
)


def _layer(seed, lead, inputs, outputs, bits=8):
    """x float32 [*lead, inputs] shifted off zero, and the integer layer's arguments."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((*lead, inputs)) + 0.7).astype(np.float32)
    kernel = rng.standard_normal((inputs, outputs)).astype(np.float32)
    qvalue, scale = quantize_weight(kernel, bits)
    bias = rng.standard_normal(outputs).astype(np.float32)
    return x, qvalue, scale, column_sums(qvalue), bias


def _float64(x, qvalue, scale, bias, x_scale, zero, bits=8):
    """What the layer must give, in float64 from its integers."""
    integers = np.asarray(quantize_activation(x, x_scale, zero, bits), np.float64)
    total = (integers - np.asarray(zero, np.float64)) @ np.asarray(qvalue, np.float64)
    y = total * np.asarray(x_scale, np.float64) * np.asarray(scale, np.float64)
    return y if bias is None else y + np.asarray(bias, np.float64)


def _compiled_dots(function, *args):
    """(lhs, rhs, result) element types of every dot in the compiled program."""
    found = []
    for computation in jax.jit(function).lower(*args).compile().as_text().split("\n}"):
        types = dict(re.findall(r"%([\w.-]+) = (\w+)\[", computation))
        dots = re.findall(r" = (\w+)\[\S* dot\(%([\w.-]+), %([\w.-]+)\)", computation)
        found += [(types[lhs], types[rhs], result) for result, lhs, rhs in dots]
    return found


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize(
    ("lead", "inputs", "outputs"), [((7,), 16, 33), ((3, 5), 96, 24), ((), 8, 4)]
)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_layer_is_its_integers_dequantised(
    implementation, lead, inputs, outputs, asymmetric, with_bias
):
    x, qvalue, scale, colsum, bias = _layer(0, lead, inputs, outputs)
    bias = bias if with_bias else None
    x_scale, zero = activation_scale(x.min(), x.max(), 8, asymmetric=asymmetric)
    y = COMPILED(
        x,
        qvalue,
        x_scale,
        zero if asymmetric else None,
        scale,
        colsum if asymmetric else None,
        bias,
        implementation=implementation,
    )
    assert y.dtype == jnp.float32 and y.shape == (*lead, outputs)
    expected = _float64(x, qvalue, scale, bias, x_scale, zero)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "x_bits"), list(itertools.product([2, 4, 8], [4, 8])))
def test_implementations_agree_at_every_width(bits, x_bits):
    x, qvalue, scale, colsum, bias = _layer(bits, (4, 9), 40, 21, bits)
    x_scale, zero = activation_scale(x.min(), x.max(), x_bits, asymmetric=True)
    results = [
        COMPILED(x, qvalue, x_scale, zero, scale, colsum, bias, x_bits=x_bits, implementation=name)
        for name in RUNNABLE
    ]
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [reference, xla])
def test_accumulators_are_exact_where_float32_would_not_be(backend):
    contraction = 4096  # 127 * 127 * 4096 is beyond 2^24
    rng = np.random.default_rng(1)
    xq = rng.integers(100, 128, (3, contraction)).astype(np.int8)
    wq = rng.integers(100, 128, (contraction, 5)).astype(np.int8)
    total = jax.jit(backend.accumulate)(xq, wq)
    assert total.dtype == jnp.int32
    np.testing.assert_array_equal(total, xq.astype(np.int64) @ wq.astype(np.int64))


def test_reference_integers_are_those_of_the_contract():
    x = np.random.default_rng(2).standard_normal(2000).astype(np.float32) * 9
    x[:5] = [np.nan, np.inf, -np.inf, 1e30, 0.5]
    for bits, zero in itertools.product([2, 5, 8], [0, 1, -2]):
        plain = reference.quantize(x, jnp.float32(0.125), jnp.int32(zero), bits)
        np.testing.assert_array_equal(plain, quantize_activation(x, 0.125, zero, bits))


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_a_scale_for_each_sample_or_token_equals_the_samples_alone(implementation):
    x, qvalue, scale, colsum, bias = _layer(3, (4, 6), 12, 8)
    low, high = x.min(axis=-1), x.max(axis=-1)

    def run(x, low, high):
        x_scale, zero = activation_scale(low, high, 8, asymmetric=True)
        return COMPILED(
            x, qvalue, x_scale, zero, scale, colsum, bias, implementation=implementation
        )

    by_token = run(x, low, high)
    by_sample = run(x, low.min(1), high.max(1))
    np.testing.assert_array_equal(run(x, low[..., None], high[..., None]), by_token)
    for i in (0, 3):
        alone = run(x[i], low[i].min(), high[i].max())
        np.testing.assert_allclose(by_sample[i], alone, rtol=1e-6, atol=1e-6)
        for j in (0, 5):
            alone = run(x[i, j], low[i, j], high[i, j])
            np.testing.assert_allclose(by_token[i, j], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [16, 64 * 49])
def test_the_compiled_product_is_int8_by_int8_into_int32(rows):
    x, qvalue, scale, colsum, bias = _layer(4, (rows,), 96, 48)
    arguments = x, qvalue, np.float32(0.02), jnp.int8(3), scale, colsum, bias
    assert _compiled_dots(quantized_matmul, *arguments) == [("s8", "s8", "s32")]


def test_unusable_operands_are_refused():
    x, qvalue, scale, colsum, bias = _layer(5, (2,), 8, 4)

    def run(x=x, qvalue=qvalue, zero=None, colsum=colsum, **rest):
        return quantized_matmul(x, qvalue, 1.0, zero, scale, colsum, bias, **rest)

    with pytest.raises(InputError, match="reference, xla"):
        run(implementation="fastest")
    with pytest.raises(InputError, match="unpack and flatten"):
        run(qvalue=qvalue.astype(jnp.int32))
    with pytest.raises(InputError, match="unpack and flatten"):
        run(x=x[:, :-1])
    with pytest.raises(InputError, match="column_sums"):
        run(zero=jnp.int8(3), colsum=None)
    with pytest.raises(InputError, match="2 to 8 bits"):
        run(x_bits=16)


def test_a_contraction_that_could_overflow_is_refused_when_traced():
    def run(contraction):
        shapes = (
            jax.ShapeDtypeStruct((1, contraction), jnp.float32),
            jax.ShapeDtypeStruct((contraction, 2), jnp.int8),
        )
        return jax.eval_shape(
            lambda x, w: quantized_matmul(x, w, 1.0, None, jnp.ones(2), None, None), *shapes
        )

    assert run(MAX_CONTRACTION).shape == (1, 2)
    assert MAX_CONTRACTION * 255 * 127 < 2**31 <= (MAX_CONTRACTION + 1) * 255 * 127
    with pytest.raises(InputError, match="can overflow int32"):
        run(MAX_CONTRACTION + 1)
