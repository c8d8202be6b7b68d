"""The numerics contract against plain NumPy, its edges, and one compile for all widths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.quantize import numerics
from mpqdiff.quantize.numerics import (
    activation_scale,
    column_sums,
    dequantize_weight,
    is_lopsided,
    qmax,
    quantize_activation,
    quantize_weight,
)

WIDTHS = list(range(2, 9))


def _kernel(seed, shape=(24, 5)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _plain_activation(x, scale, zero_point, bits):
    """The contract in float64 NumPy, apart from the float32 reciprocal it prescribes."""
    inverse = np.float32(1) / np.asarray(scale, np.float32)
    steps = np.rint((np.asarray(x, np.float32) * inverse).astype(np.float64))
    return np.clip(steps + np.asarray(zero_point), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def test_qmax_of_every_width_python_numpy_and_traced():
    assert [qmax(bits) for bits in WIDTHS] == [1, 3, 7, 15, 31, 63, 127]
    np.testing.assert_array_equal(qmax(np.array(WIDTHS)), jax.jit(qmax)(jnp.array(WIDTHS)))


@pytest.mark.parametrize("bits", WIDTHS)
def test_absmax_weights_reach_qmax_and_round_to_the_nearest_step(bits):
    kernel = _kernel(0)
    qvalue, scale = quantize_weight(kernel, bits, clip="absmax")
    assert qvalue.dtype == jnp.int8 and scale.dtype == jnp.float32
    np.testing.assert_array_equal(np.abs(qvalue).max(axis=0), qmax(bits))
    error = np.abs(dequantize_weight(qvalue, scale) - kernel)
    assert np.all(error <= np.asarray(scale) * 0.5001)


@pytest.mark.parametrize("bits", WIDTHS)
def test_mse_scale_is_the_best_of_the_candidates_in_every_channel(bits):
    kernel = _kernel(1).astype(np.float64)
    scale = np.asarray(quantize_weight(kernel, bits)[1])
    limit = qmax(bits)
    largest = np.abs(kernel).max(axis=0) / limit

    def error(candidate):
        q = np.clip(np.rint(kernel / candidate), -limit, limit)
        return ((kernel - q * candidate) ** 2).sum(axis=0)

    best = np.min([error(largest * ratio) for ratio in numerics.SHRINK], axis=0)
    np.testing.assert_allclose(error(scale), best, rtol=1e-4)


def test_mse_clipping_gains_at_few_bits_and_never_loses():
    kernel = _kernel(2, (512, 8))

    def error(bits, clip):
        restored = dequantize_weight(*quantize_weight(kernel, bits, clip=clip))
        return np.asarray(((kernel - restored) ** 2).sum(axis=0))

    for bits in WIDTHS:
        assert np.all(error(bits, "mse") <= error(bits, "absmax") * (1 + 1e-5))
    assert np.all(error(2, "mse") < 0.5 * error(2, "absmax"))


def test_one_compile_serves_every_width_and_agrees_with_eager():
    traces = []

    @jax.jit
    def traced(kernel, bits):
        traces.append(bits)
        return quantize_weight(kernel, bits)

    kernel = _kernel(3, (3, 3, 4, 6))
    for bits in WIDTHS:
        for got, expected in zip(
            traced(kernel, jnp.int32(bits)), quantize_weight(kernel, bits), strict=True
        ):
            np.testing.assert_array_equal(got, expected)
    assert len(traces) == 1


def test_weights_vmapped_over_plans_equal_each_plan_alone():
    kernel, widths = _kernel(4), jnp.array([2, 4, 8])
    qvalues, scales = jax.vmap(lambda bits: quantize_weight(kernel, bits))(widths)
    for index, bits in enumerate(widths):
        qvalue, scale = quantize_weight(kernel, int(bits))
        np.testing.assert_array_equal(qvalues[index], qvalue)
        np.testing.assert_array_equal(scales[index], scale)


@pytest.mark.parametrize("clip", numerics.CLIPS)
def test_zero_and_vanishing_channels_have_scale_one_and_integers_zero(clip):
    kernel = _kernel(5)
    kernel[:, 1] = 0.0
    kernel[:, 3] = 1e-42
    qvalue, scale = quantize_weight(kernel, 4, clip=clip)
    assert scale[1] == 1.0 and scale[3] == 1.0 and not np.any(qvalue[:, 1::2])
    assert np.all(np.asarray(scale) > 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_channel_that_is_not_finite_shows_in_its_scale_alone(bad):
    kernel = _kernel(6)
    kernel[2, 3] = bad
    scale = np.asarray(quantize_weight(kernel, 8)[1])
    np.testing.assert_array_equal(np.isfinite(scale), [True, True, True, False, True])


def test_unusable_requests_are_refused():
    for bits in (1, 9):
        with pytest.raises(InputError, match="2 to 8 bits"):
            quantize_weight(_kernel(0), bits)
        with pytest.raises(InputError, match="2 to 8 bits"):
            activation_scale(0.0, 1.0, bits)
        with pytest.raises(InputError, match="2 to 8 bits"):
            quantize_activation(jnp.ones(3), 1.0, 0, bits)
    with pytest.raises(InputError, match="absmax, mse"):
        quantize_weight(_kernel(0), 8, clip="best")
    with pytest.raises(InputError, match="scalar"):
        quantize_weight(1.0, 8)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from(WIDTHS),
    log_scale=st.floats(-20, 20),
    zero=st.floats(0, 1),
)
def test_activations_equal_the_plain_rule(seed, bits, log_scale, zero):
    limit = qmax(bits)
    zero_point = round(zero * (2 * limit + 1)) - limit - 1
    scale = np.float32(2.0**log_scale)
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(257) * scale * limit).astype(np.float32)
    x[:40] = scale * (np.arange(40) - 20 + 0.5)  # ties, where the scale is a power of two
    got = jax.jit(quantize_activation)(x, scale, jnp.int8(zero_point), bits)
    assert got.dtype == jnp.int8
    np.testing.assert_array_equal(got, _plain_activation(x, scale, zero_point, bits))


def test_ties_go_to_even_and_values_beyond_the_range_saturate():
    x = jnp.array([0.5, 1.5, 2.5, -0.5, -1.5, 200.0, -200.0, 1e30, -1e30, np.inf, -np.inf])
    np.testing.assert_array_equal(
        quantize_activation(x, 1.0, 0, 8), [0, 2, 2, 0, -2, 127, -128, 127, -128, 127, -128]
    )
    np.testing.assert_array_equal(
        quantize_activation(x, 1.0, 1, 3), [1, 3, 3, 1, -1, 3, -4, 3, -4, 3, -4]
    )


@pytest.mark.parametrize("zero_point", [0, -128, 37])
def test_nan_becomes_the_zero_point(zero_point):
    got = jax.jit(quantize_activation)(jnp.full(40, np.nan), 0.1, jnp.int32(zero_point), 8)
    np.testing.assert_array_equal(got, zero_point)


def test_the_integers_do_not_depend_on_how_the_scale_is_passed():
    rng = np.random.default_rng(7)
    scale = np.float32(0.0317)
    x = (scale * (rng.integers(-127, 127, 4096) + 0.5)).astype(np.float32)  # next to ties
    expected = _plain_activation(x, scale, 3, 8)
    constant = jax.jit(lambda x: quantize_activation(x, float(scale), 3, 8))(x)
    passed = jax.jit(quantize_activation)(x, scale, jnp.int8(3), jnp.int32(8))
    by_element = jax.jit(quantize_activation)(x, np.full(4096, scale), jnp.int8(3), 8)
    for got in (constant, passed, by_element, quantize_activation(x, scale, 3, 8)):
        np.testing.assert_array_equal(got, expected)


@settings(max_examples=60, deadline=None)
@given(
    low=st.floats(-50, 50, width=32),
    high=st.floats(-50, 50, width=32),
    bits=st.sampled_from(WIDTHS),
    asymmetric=st.booleans(),
)
def test_the_scale_covers_the_range_and_real_zero_is_exact(low, high, bits, asymmetric):
    low, high = min(low, high), max(low, high)
    scale, zero = activation_scale(low, high, bits, asymmetric=asymmetric)
    assert scale > 0 and zero.dtype == jnp.int8
    limit = qmax(bits)
    assert -limit - 1 <= int(zero) <= limit and (asymmetric or zero == 0)
    ends = np.float32([low, high, 0.0])
    integers = np.asarray(quantize_activation(ends, scale, zero, bits), np.float64)
    restored = (integers - float(zero)) * float(scale)
    assert restored[2] == 0.0
    # An end may miss by half a step of its own and half a step of the zero point.
    assert np.all(np.abs(restored - ends) <= float(scale) * 1.001)


def test_asymmetric_scales_use_all_levels_of_a_one_sided_range():
    scale, zero = activation_scale(0.0, 25.5, 8, asymmetric=True)
    assert scale == pytest.approx(0.1) and zero == -128
    assert quantize_activation(jnp.float32(25.5), scale, zero, 8) == 127
    symmetric, zero = activation_scale(0.0, 25.5, 8)
    assert symmetric == pytest.approx(25.5 / 127) and zero == 0


def test_scales_of_a_table_row_by_row_with_a_mask():
    low, high = jnp.array([-1.0, -0.1, 0.0]), jnp.array([1.0, 3.0, 0.0])
    mask = jnp.array([False, True, True])
    scale, zero = activation_scale(low, high, 8, asymmetric=mask)
    for index in range(3):
        one = activation_scale(low[index], high[index], 8, asymmetric=bool(mask[index]))
        assert (scale[index], zero[index]) == one
    assert scale[2] == 1.0 and zero[2] == 0


def test_lopsided_ranges_are_those_with_a_side_under_a_quarter():
    low = np.array([-1.0, -0.26, -0.24, 0.0, -4.0, 0.0, -0.17])
    high = np.array([1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 3.0])
    np.testing.assert_array_equal(
        is_lopsided(low, high), [False, False, True, True, True, False, True]
    )


def test_column_sums_do_not_overflow_int8():
    np.testing.assert_array_equal(column_sums(jnp.full((2, 300, 3), 127, jnp.int8)), 600 * 127)
