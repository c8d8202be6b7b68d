"""One class for every implementation of the integer product: exact sums, then exact outputs.

Scales are powers of two and biases integers, so that a float32 output is exact as well and can be
compared bit for bit. Blocks are made small, for partial last ones to be common.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.kernels import tpu
from mpqdiff.kernels.quantized_matmul import (
    pallas_gpu,
    pallas_tpu,
    quantized_matmul,
    reference,
    xla,
)
from mpqdiff.quantize.numerics import quantize_activation
from mpqdiff.quantize.pack import pack

ACCUMULATE = {
    "reference": reference.accumulate,
    "xla": xla.accumulate,
    "pallas_interpret": partial(pallas_tpu.accumulate, interpret=True),
    "pallas_gpu_interpret": partial(pallas_gpu.accumulate, interpret=True),
}
SUMS = {name: jax.jit(run, static_argnames="w_bits") for name, run in ACCUMULATE.items()}
LAYER = jax.jit(
    quantized_matmul, static_argnames=("x_bits", "w_bits", "activation", "implementation")
)


class Case(NamedTuple):
    """Sizes and widths of a layer; scale and zero point of each token, or one of both."""

    rows: int
    inputs: int
    outputs: int
    bits: int
    x_bits: int = 8
    by_token: bool = False
    zero: bool = False
    bias: bool = True


# Blocks are of 32 or 16 rows and channels: one row, odd sizes, multiples, one more than them; one
# input to fewer planes than a byte has, contractions that planes do not divide, and a zero point
# that must not reach beyond the last input.
CASES = [
    Case(1, 1, 1, 2, zero=True),
    Case(1, 37, 33, 4, by_token=True, zero=True),
    Case(33, 10, 17, 2, x_bits=4, by_token=True),
    Case(32, 64, 32, 8, by_token=True, zero=True, bias=False),
    Case(50, 99, 49, 4, zero=True),
    Case(49, 98, 50, 8, x_bits=5),
    Case(9, 37, 30, 8, zero=True),
]
FEW = settings(max_examples=18, deadline=None)


@pytest.fixture(scope="class")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu, "ROWS", (32, 16))
        patch.setattr(pallas_tpu, "CHANNELS", (32, 16))
        patch.setattr(pallas_gpu, "BLOCKS", ((32, 32), (16, 32)))
        patch.setattr(pallas_gpu, "DEPTHS", (32,))
        yield


def _integers(rng, case):
    """(xq int8 [rows,inputs], w int8 [inputs,outputs] that fills its width, and w packed)."""
    limit = 1 << (case.bits - 1)
    xq = rng.integers(-128, 128, (case.rows, case.inputs)).astype(np.int8)
    w = rng.integers(-limit, limit, (case.inputs, case.outputs)).astype(np.int8)
    return xq, w, jnp.asarray(pack(w, case.bits))


def _tokens(rng, case):
    """float32 [rows, inputs] on a grid of eighths, some of it out of range or not finite."""
    shape = case.rows, case.inputs
    x = rng.integers(-1200, 1200, shape).astype(np.float32) / 8
    strange = rng.choice([np.nan, np.inf, -np.inf], shape)
    return np.where(rng.random(shape) < 0.02, strange, x).astype(np.float32)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("implementation", ACCUMULATE)
class TestEveryImplementation:
    @FEW
    @given(case=st.sampled_from(CASES), seed=st.integers(0, 99))
    def test_sums_equal_int64(self, implementation, case, seed):
        xq, w, packed = _integers(np.random.default_rng(seed), case)
        total = SUMS[implementation](xq, packed, w_bits=case.bits)
        assert total.dtype == jnp.int32
        np.testing.assert_array_equal(total, xq.astype(np.int64) @ w.astype(np.int64))

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_sums_are_exact_where_float32_is_not(self, implementation, bits):
        xq = np.full((3, 8209), -127, np.int8)
        xq[1] = -128
        w = np.full((8209, 5), -(1 << (bits - 1)), np.int8)
        total = SUMS[implementation](xq, jnp.asarray(pack(w, bits)), w_bits=bits)
        expected = xq.astype(np.int64) @ w.astype(np.int64)
        assert bits < 8 or expected.min() > 2**24
        np.testing.assert_array_equal(total, expected)

    @FEW
    @given(case=st.sampled_from(CASES), seed=st.integers(0, 99))
    def test_layers_are_their_integers_bit_for_bit(self, implementation, case, seed):
        rng = np.random.default_rng(seed)
        x, (_, w, packed) = _tokens(rng, case), _integers(rng, case)
        shape = (case.rows, 1) if case.by_token else ()
        limit = (1 << (case.x_bits - 1)) - 1
        zero = rng.integers(-limit - 1, limit + 1, shape) * case.zero
        scale = np.exp2(rng.integers(-2, 3, shape)).astype(np.float32)
        w_scale = np.exp2(rng.integers(-3, 4, case.outputs)).astype(np.float32)
        bias = rng.integers(-9, 9, case.outputs).astype(np.float32)
        y = LAYER(
            x,
            packed,
            scale,
            jnp.asarray(zero, jnp.int8) if case.zero else None,
            w_scale,
            w.sum(axis=0, dtype=np.int32) if case.zero else None,
            bias if case.bias else None,
            x_bits=case.x_bits,
            w_bits=case.bits,
            implementation=implementation,
        )
        integers = np.asarray(quantize_activation(x, scale, zero, case.x_bits), np.float64)
        expected = (integers - zero) @ w.astype(np.float64) * scale * w_scale
        np.testing.assert_array_equal(y, expected + bias * case.bias)

    @pytest.mark.parametrize("activation", ["gelu", "silu"])
    def test_a_scale_of_its_own_for_each_token_then_the_activation(
        self, implementation, activation
    ):
        case = CASES[4]
        rng = np.random.default_rng(3)
        x, (_, w, packed) = _tokens(rng, case), _integers(rng, case)
        x[0] = 0.0
        w_scale = np.full(case.outputs, 2.0**-8, np.float32)
        y = LAYER(
            x[None],
            packed,
            None,
            None,
            w_scale,
            None,
            w_scale,
            w_bits=4,
            activation=activation,
            implementation=implementation,
        )
        finite = np.where(np.isfinite(x), np.abs(x), 0).max(axis=1, keepdims=True)
        scale = np.where(finite > 0, finite * np.float32(1 / 127), 1).astype(np.float32)
        integers = np.asarray(quantize_activation(x, scale, 0, 8), np.float64)
        before = integers @ w.astype(np.float64) * scale * w_scale + w_scale
        expected = getattr(jax.nn, activation)(before.astype(np.float32))
        assert y.shape == (1, case.rows, case.outputs)
        np.testing.assert_allclose(y[0], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (2, 0)])
    def test_an_empty_batch_and_no_inputs(self, implementation, shape):
        bias = np.arange(3, dtype=np.float32) - 1
        y = quantized_matmul(
            jnp.zeros(shape),
            jnp.zeros((-(-shape[-1] // 2), 3), jnp.int8),
            jnp.float32(1),
            None,
            jnp.ones(3),
            None,
            bias,
            w_bits=4,
            activation="silu",
            implementation=implementation,
        )
        expected = np.broadcast_to(bias / (1 + np.exp(-bias)), (*shape[:-1], 3))
        assert y.shape == expected.shape
        np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_real_block_sizes_cover_what_they_do_not_divide():
    rng = np.random.default_rng(2)
    xq, w, packed = _integers(rng, Case(531, 131, 530, 4))
    assert pallas_tpu._blocks(531, 131, 530, 1, 1, 4) == (128, 128)
    total = pallas_tpu.accumulate(xq, packed, w_bits=4, interpret=True)
    np.testing.assert_array_equal(total, xq.astype(np.int64) @ w.astype(np.int64))


@pytest.mark.parametrize("contraction", [1152, 4608, 23040, 30720])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_blocks_fit_in_vector_memory_or_are_refused(contraction, bits):
    rows, channels = pallas_tpu._blocks(8192, contraction, 1152, 4, 1, bits)
    tokens = 9 * rows * contraction  # float32 twice and int8 once
    weights = contraction * channels * (2 if bits == 8 else 1 + bits / 4)
    assert tokens + weights + 16 * rows * channels <= tpu.VMEM_BUDGET
    assert rows >= 32 and channels >= 128
    with pytest.raises(InputError, match="65536 is too long for the TPU kernel"):
        pallas_tpu._blocks(8192, 65536, 1152, 4, 1, bits)


def test_a_tpu_is_asked_for_by_name_and_refused_elsewhere():
    x, weight = jnp.ones((2, 8)), jnp.ones((8, 4), jnp.int8)

    def run(**options):
        return quantized_matmul(x, weight, 1.0, None, jnp.ones(4), None, None, **options)

    with pytest.raises(
        InputError, match="needs a TPU and this machine's default back end is 'cpu'"
    ):
        run(implementation="pallas_tpu")
    with pytest.raises(InputError, match="needs a TPU"):
        pallas_tpu.accumulate(weight.T, weight[:, :1])
    with pytest.raises(InputError, match="symmetric scales"):
        quantized_matmul(x, weight, None, jnp.int8(1), jnp.ones(4), jnp.ones(4), None)
    with pytest.raises(InputError, match="gelu, silu"):
        run(activation="relu")
    with pytest.raises(InputError, match=r"at 4 bits: expected int8 \[4, N\]"):
        run(w_bits=4)
