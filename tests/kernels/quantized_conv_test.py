"""Every form of the integer convolution against its definition and against a float64 one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.kernels.quantized_conv import pads, quantized_conv, reference, xla
from mpqdiff.kernels.quantized_conv.patches import by_patches, surround
from mpqdiff.kernels.quantized_matmul import pallas_gpu, pallas_tpu
from mpqdiff.kernels.quantized_matmul.xla import accumulate as dot
from mpqdiff.quantize.numerics import activation_scale, column_sums, quantize_weight
from mpqdiff.quantize.pack import pack

RUNNABLE = ("reference", "xla", "pallas_interpret", "pallas_gpu_interpret")
COMPILED = jax.jit(
    quantized_conv,
    static_argnames=(
        *("kernel_size", "strides", "padding", "split", "x_bits", "w_bits"),
        *("activation", "implementation"),
    ),
)


def _flat(form):
    """A private form of xla's, with the signature of an `accumulate`."""
    return lambda xq, wq, *, kernel_size, strides, w_bits: form(xq, wq, kernel_size, strides)


ACCUMULATE = {
    "reference": reference.accumulate,
    "xla": xla.accumulate,
    "rank one": _flat(xla._rank_one),
    "rows of taps": _flat(xla._rows_of_taps),
    "convolution": _flat(xla._convolution),
    "each tap everywhere": _flat(xla._each_tap_everywhere),
    "patches": by_patches(dot),
    "pallas_tpu": by_patches(partial(pallas_tpu.accumulate, interpret=True)),
    "pallas_gpu": by_patches(partial(pallas_gpu.accumulate, interpret=True)),
}


def _int64(xq, kernel, strides):
    """The sums by windows of NumPy, int64: xq [B,H,W,C], padded, kernel [kh,kw,C,N]."""
    size = kernel.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(xq.astype(np.int64), size, axis=(1, 2))
    windows = windows[:, :: strides[0], :: strides[1]]
    return np.einsum("bhwcij,ijcn->bhwn", windows, kernel.astype(np.int64))


@pytest.mark.parametrize("name", ACCUMULATE)
@pytest.mark.parametrize(
    ("shape", "outputs", "size", "strides"),
    [
        ((2, 9, 7, 5), 6, (3, 3), (1, 1)),
        ((1, 6, 6, 18), 20, (3, 3), (1, 1)),  # wide enough for XLA's own kernel as it is
        ((2, 8, 9, 17), 3, (3, 3), (2, 2)),
        ((1, 5, 5, 40), 1, (3, 3), (1, 1)),
        ((3, 5, 4, 1), 4, (2, 3), (1, 1)),
        ((2, 5, 6, 9), 7, (1, 1), (1, 1)),
        ((2, 5, 6, 9), 7, (1, 1), (2, 2)),
        ((1, 8, 8, 4), 5, (4, 4), (4, 4)),
        ((1, 3, 3, 2), 2, (3, 3), (1, 1)),  # one position
        ((0, 6, 6, 4), 5, (3, 3), (1, 1)),
    ],
    ids=str,
)
def test_sums_are_exact(name, shape, outputs, size, strides):
    rng = np.random.default_rng(0)
    xq = rng.integers(-128, 128, shape).astype(np.int8)
    kernel = rng.integers(-127, 128, (*size, shape[-1], outputs)).astype(np.int8)
    if name == "each tap everywhere":  # `accumulate` takes it for unit strides
        strides = (1, 1)
    found = jax.jit(partial(ACCUMULATE[name], kernel_size=size, strides=strides, w_bits=8))(
        xq, kernel.reshape(-1, outputs)
    )
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, _int64(xq, kernel, strides))


@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(0, 2),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    more=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    channels=st.integers(1, 40),
    outputs=st.integers(1, 24),
    bits=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 99),
)
def test_sums_of_any_shape_and_width_are_exact(
    batch, size, more, strides, channels, outputs, bits, seed
):
    rng = np.random.default_rng(seed)
    shape = batch, size[0] + more[0], size[1] + more[1], channels
    xq = rng.integers(-128, 128, shape).astype(np.int8)
    limit = 1 << (bits - 1)
    kernel = rng.integers(-limit, limit, (*size, channels, outputs)).astype(np.int8)
    packed, geometry = jnp.asarray(pack(kernel, bits)), dict(kernel_size=size, strides=strides)
    for form in (reference.accumulate, xla.accumulate):
        found = form(jnp.asarray(xq), packed, **geometry, w_bits=bits)
        np.testing.assert_array_equal(found, _int64(xq, kernel, strides))


def _layer(seed, shape, outputs, size=(3, 3), bits=8):
    """x float32 `shape` shifted off zero, the flattened integers, scales, column sums, bias."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) + 0.7).astype(np.float32)
    kernel = rng.standard_normal((*size, shape[-1], outputs)).astype(np.float32)
    qvalue, scale = quantize_weight(kernel, bits)
    bias = rng.standard_normal(outputs).astype(np.float32)
    return x, qvalue.reshape(-1, outputs), scale, column_sums(qvalue), bias


def _float64(x, qvalue, scale, bias, x_scale, zero, *, size=(3, 3), strides=(1, 1), padding="SAME"):
    """`lax.conv_general_dilated` in float64 of the dequantised values."""
    with jax.enable_x64(True):
        integers = reference.quantize(x, x_scale, jnp.int32(zero), 8)
        values = (np.asarray(integers, np.float64) - np.asarray(zero)) * np.asarray(x_scale)
        kernel = np.asarray(qvalue, np.float64) * np.asarray(scale, np.float64)
        y = jax.lax.conv_general_dilated(
            jnp.asarray(values, jnp.float64),
            jnp.asarray(kernel.reshape(*size, x.shape[-1], -1), jnp.float64),
            strides,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        assert y.dtype == jnp.float64
        return np.asarray(y) + bias


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("shape", "strides", "padding"),
    [
        ((2, 7, 6, 18), (1, 1), "SAME"),
        ((2, 7, 6, 5), (2, 2), "SAME"),
        ((1, 8, 8, 5), (2, 2), ((0, 1), (0, 1))),
        ((2, 6, 5, 3), (1, 1), "VALID"),
        ((2, 6, 5, 20), (1, 1), ((2, 0), (1, 3))),
    ],
    ids=str,
)
def test_the_layer_is_its_integers_dequantised(implementation, asymmetric, shape, strides, padding):
    x, qvalue, scale, colsum, bias = _layer(1, shape, 6)
    x_scale, zero = activation_scale(x.min(), x.max(), 8, asymmetric=asymmetric)
    assert bool(zero) == asymmetric
    y = COMPILED(
        *(x, qvalue, x_scale, zero if asymmetric else None, scale, colsum, bias),
        kernel_size=(3, 3),
        strides=strides,
        padding=padding,
        implementation=implementation,
    )
    expected = _float64(x, qvalue, scale, bias, x_scale, zero, strides=strides, padding=padding)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_a_scale_for_each_image_equals_the_images_alone(implementation):
    x, qvalue, scale, colsum, bias = _layer(2, (3, 6, 6, 4), 5)
    x = x * np.array([1.0, 2.0, 5.0], np.float32)[:, None, None, None]
    run = partial(COMPILED, kernel_size=(3, 3), implementation=implementation)

    def scales(x):
        return activation_scale(x.min((1, 2, 3)), x.max((1, 2, 3)), 8, asymmetric=True)

    together = run(x, qvalue, *scales(x), scale, colsum, bias)
    own = run(x, qvalue, None, None, scale, None, bias)
    assert len({int(zero) for zero in scales(x)[1]}) == 3
    for i in range(3):
        one, (x_scale, zero) = x[i : i + 1], scales(x[i : i + 1])
        alone = run(one, qvalue, x_scale[0], zero[0], scale, colsum, bias)
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-6, atol=1e-6)
        symmetric = np.abs(one).max() * (np.float32(1) / np.float32(127))
        alone = run(one, qvalue, symmetric, None, scale, None, bias)
        np.testing.assert_allclose(own[i : i + 1], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize("bits", [4, 8])
def test_halves_with_scales_of_their_own_are_their_convolutions_added(implementation, bits):
    x, qvalue, scale, _, bias = _layer(3, (2, 6, 6, 9), 5, bits=bits)
    x[..., 6:] *= 20
    kernel = np.asarray(qvalue).reshape(3, 3, 9, 5)
    halves = [(x[..., :6], kernel[:, :, :6]), (x[..., 6:], kernel[:, :, 6:])]
    (scales, zeros), colsums = (
        zip(
            *(activation_scale(h.min(), h.max(), 8, asymmetric=True) for h, _ in halves),
            strict=True,
        ),
        [column_sums(k) for _, k in halves],
    )
    y = COMPILED(
        *(x, pack(kernel, bits), scales, zeros, scale, colsums, bias),
        kernel_size=(3, 3),
        split=6,
        w_bits=bits,
        implementation=implementation,
    )
    expected = sum(
        _float64(h, k.reshape(-1, 5), scale, 0.0, s, z)
        for (h, k), s, z in zip(halves, scales, zeros, strict=True)
    )
    np.testing.assert_allclose(y, expected + bias, rtol=1e-5, atol=1e-4)


def test_the_activation_follows_the_bias():
    x, qvalue, scale, _, bias = _layer(4, (1, 5, 5, 4), 3)
    run = partial(
        COMPILED, x, qvalue, np.float32(0.02), None, scale, None, bias, kernel_size=(3, 3)
    )
    np.testing.assert_allclose(run(activation="silu"), jax.nn.silu(run()), rtol=1e-6, atol=1e-6)


def test_a_wide_convolution_is_compiled_as_integers():
    x, qvalue, scale, colsum, bias = _layer(5, (2, 8, 8, 32), 32)
    run = partial(quantized_conv, kernel_size=(3, 3))
    operands = x, qvalue, 0.02, jnp.int8(3), scale, colsum, bias
    text = str(jax.jit(run).lower(*operands).compile().as_text())
    products = [line for line in text.splitlines() if " dot(" in line or " convolution(" in line]
    assert products and all("= s32[" in line for line in products)


def test_padding_is_resolved_as_xla_does():
    assert pads((7, 8), (3, 3), (2, 2), "SAME") == ((1, 1), (0, 1))
    assert pads((7, 8), (3, 3), (2, 2), "VALID") == ((0, 0), (0, 0))
    assert pads((7, 8), (3, 3), (1, 1), [(0, 1), (2, 0)]) == ((0, 1), (2, 0))
    around = surround(np.ones((1, 2, 2, 1), np.int8), ((1, 0), (0, 2)), 7)
    np.testing.assert_array_equal(around[0, ..., 0], [[7, 7, 7, 7], [1, 1, 7, 7], [1, 1, 7, 7]])


def test_unusable_operands_are_refused():
    x, qvalue, scale, colsum, bias = _layer(6, (2, 6, 6, 4), 3)

    operands = {"x": x, "qvalue": qvalue, "x_scale": 1.0, "zero": None, "colsum": colsum}

    def run(**changes):
        given = {**operands, "kernel_size": (3, 3), **changes}
        x, qvalue, x_scale, zero, colsum = (given.pop(name) for name in operands)
        return quantized_conv(x, qvalue, x_scale, zero, scale, colsum, bias, **given)

    with pytest.raises(InputError, match="reference, xla"):
        run(implementation="fastest")
    with pytest.raises(InputError, match="needs a TPU"):
        run(implementation="pallas_tpu")
    with pytest.raises(InputError, match=r"expected int8 \[36, N\]"):
        run(qvalue=qvalue[:-1])
    with pytest.raises(InputError, match=r"\[B,H,W,C\]"):
        run(x=x[0])
    with pytest.raises(InputError, match="column_sums"):
        run(zero=jnp.int8(3), colsum=None)
    with pytest.raises(InputError, match="symmetric"):
        run(x_scale=None, zero=jnp.int8(3))
    with pytest.raises(InputError, match="one for each image"):
        run(x_scale=jnp.ones((2, 6)))
    with pytest.raises(InputError, match="split=4: expected 1 to 3"):
        run(split=4)
    with pytest.raises(InputError, match="gelu, silu"):
        run(activation="tanh")
    long = jax.ShapeDtypeStruct((9 * 8000, 3), jnp.int8)
    with pytest.raises(InputError, match="can overflow int32"):
        jax.eval_shape(
            lambda x, w: run(x=x, qvalue=w),
            jax.ShapeDtypeStruct((1, 3, 3, 8000), jnp.float32),
            long,
        )
