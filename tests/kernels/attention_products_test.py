"""The products of attention: exact sums and outputs in every implementation, and their refusals.

Scales are powers of two, so that a float32 output is exact as well and compared bit for bit.
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
from mpqdiff.evaluate import verify
from mpqdiff.intercept import scope
from mpqdiff.kernels import attention_products, tpu
from mpqdiff.kernels.attention_products import pallas_gpu, pallas_tpu, pv, qk, reference, xla
from mpqdiff.models.product import Product
from mpqdiff.quantize.operate import integer_site
from mpqdiff.sites import Site

ACCUMULATE = {
    "reference": reference.accumulate,
    "xla": xla.accumulate,
    "pallas_interpret": partial(pallas_tpu.accumulate, interpret=True),
    "pallas_gpu_interpret": partial(pallas_gpu.accumulate, interpret=True),
}
SUMS = {name: jax.jit(run, static_argnames="transposed") for name, run in ACCUMULATE.items()}
QK = jax.jit(qk, static_argnames=("bits", "implementation"))
PV = jax.jit(pv, static_argnames=("bits", "implementation"))


class Case(NamedTuple):
    """(images, heads, rows, contraction, outputs), widths, scales by image, and a zero point."""

    size: tuple[int, int, int, int, int]
    bits: tuple[int, int] = (8, 8)
    by_image: bool = False
    zero: bool = False


# Blocks are of 32 rows: one of all, one more than a block, a block, an odd number of blocks.
CASES = [
    Case((1, 1, 1, 1, 1), zero=True),
    Case((2, 3, 33, 7, 5), by_image=True, zero=True),
    Case((3, 2, 32, 49, 17), (4, 8), by_image=True),
    Case((2, 1, 77, 10, 64), (8, 5), zero=True),
]
FEW = settings(max_examples=8, deadline=None)


@pytest.fixture(scope="class")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu, "ROWS", (32,))
        patch.setattr(pallas_gpu, "BLOCKS", ((32, 32),))
        yield


def _values(rng, shape):
    """float32 on a grid of eighths, some of it out of range or not finite."""
    x = rng.integers(-1200, 1200, shape).astype(np.float32) / 8
    strange = rng.choice([np.nan, np.inf, -np.inf], shape)
    return np.where(rng.random(shape) < 0.03, strange, x).astype(np.float32)


def _integers(x, scale, zero, bits=8):
    """The definition, in float64: int64 of round(x / scale) + zero, saturated, NaN as 0."""
    limit = (1 << (bits - 1)) - 1
    steps = np.round(np.nan_to_num(x.astype(np.float64) / scale, posinf=1e6, neginf=-1e6))
    return np.clip(steps + zero, -limit - 1, limit).astype(np.int64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("implementation", ACCUMULATE)
class TestEveryImplementation:
    @FEW
    @given(case=st.sampled_from(CASES[1:]), transposed=st.booleans(), seed=st.integers(0, 99))
    def test_sums_equal_int64(self, implementation, case, transposed, seed):
        rng = np.random.default_rng(seed)
        images, heads, rows, contraction, outputs = case.size
        left = rng.integers(-128, 128, (images, heads, rows, contraction)).astype(np.int8)
        right = rng.integers(-128, 128, (images, heads, contraction, outputs)).astype(np.int8)
        zero = rng.integers(-128, 128, (images, 1, 1, 1) if case.by_image else ()).astype(np.int32)
        given = right.swapaxes(2, 3) if transposed else right
        total = SUMS[implementation](left, given, zero, transposed=transposed)
        assert total.dtype == jnp.int32
        expected = (left.astype(np.int64) - zero) @ right.astype(np.int64)
        np.testing.assert_array_equal(total, expected)

    def test_sums_are_exact_where_float32_is_not(self, implementation):
        left = np.full((1, 1, 2, 9001), 127, np.int8)
        left[0, 0, 1, 0] = 126
        right = np.full((1, 1, 9001, 3), -127, np.int8)
        total = SUMS[implementation](left, right, np.int32(-128), transposed=False)
        expected = (left.astype(np.int64) + 128) @ right.astype(np.int64)
        assert np.abs(expected).min() > 2**24
        np.testing.assert_array_equal(total, expected)

    @FEW
    @given(case=st.sampled_from(CASES), seed=st.integers(0, 99))
    def test_outputs_are_their_integers_bit_for_bit(self, implementation, case, seed):
        rng = np.random.default_rng(seed)
        images, heads, rows, contraction, outputs = case.size
        bits = case.bits
        left = _values(rng, (images, heads, rows, contraction))
        right = _values(rng, (images, heads, contraction, outputs))
        shape = (images,) if case.by_image else ()
        scales = [np.exp2(rng.integers(-2, 3, shape)).astype(np.float32) for _ in range(2)]
        limit = (1 << (bits[0] - 1)) - 1
        point = rng.integers(-limit - 1, limit + 1, shape).astype(np.int8) if case.zero else None

        def spread(value):
            return np.reshape(value, (-1, 1, 1, 1)).astype(np.float64)

        each = spread(0 if point is None else point)
        integers = _integers(left, spread(scales[0]), each, bits[0]) - each
        others = _integers(right, spread(scales[1]), 0, bits[1])
        expected = integers @ others * spread(scales[0]) * spread(scales[1])
        options = {"bits": bits, "implementation": implementation}
        tokens_first = right.transpose(0, 2, 1, 3)  # [B,K,H,N], as values come
        y = PV(left, tokens_first, scales[0], point, scales[1], **options)
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(y, expected.transpose(0, 2, 1, 3))
        queries, keys = left.transpose(0, 2, 1, 3), right.transpose(0, 3, 1, 2)
        y = QK(queries, keys, scales[0], point, scales[1], **options)
        np.testing.assert_array_equal(y, expected)

    def test_without_scales_each_image_has_its_own_and_a_softmax_all_levels(self, implementation):
        rng = np.random.default_rng(0)
        logits = 3 * rng.standard_normal((2, 2, 9, 11))
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        p[1] /= 4
        v = rng.standard_normal((2, 11, 2, 6)).astype(np.float32)
        v[0] *= 100
        p = p.astype(np.float32)
        v[0, 0, 0, :2] = np.nan, np.inf  # no part of the range
        y = PV(p, v, implementation=implementation)
        scale = p.max((1, 2, 3), keepdims=True).astype(np.float64) / 255
        finite = np.where(np.isfinite(v), np.abs(v), 0).max((1, 2, 3), keepdims=True)
        other = finite.astype(np.float64) / 127
        integers, others = _integers(p, scale, -128) + 128, _integers(v, other, 0)
        expected = np.einsum("bhmn,bnhd->bmhd", integers, others) * scale * other
        assert integers.max() == 255
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        alone = PV(p[1:], v[1:], implementation=implementation)
        np.testing.assert_array_equal(alone, y[1:])
        zeros = PV(np.zeros_like(p), v, implementation=implementation)
        np.testing.assert_array_equal(zeros, 0)

    @pytest.mark.parametrize("size", [(0, 2, 3, 5, 4), (2, 2, 0, 5, 4), (2, 2, 3, 0, 4)])
    @pytest.mark.parametrize("scale", [None, np.float32(1)])
    def test_nothing_in_a_batch_in_rows_or_to_sum(self, implementation, size, scale):
        images, heads, rows, contraction, outputs = size
        p = np.zeros((images, heads, rows, contraction), np.float32)
        v = np.zeros((images, contraction, heads, outputs), np.float32)
        y = PV(p, v, scale, None, scale, implementation=implementation)
        np.testing.assert_array_equal(y, np.zeros((images, rows, heads, outputs)))
        q, k = np.zeros((images, rows, heads, 0)), np.zeros((images, contraction, heads, 0))
        y = QK(q, k, scale, None, scale, implementation=implementation)
        np.testing.assert_array_equal(y, np.zeros((images, heads, rows, contraction)))


def _site(equation, *, attention=None):
    """`integer_site` of one product with the step's row: (left, right, row) -> float32."""
    site = Site("pv", "product", (), 0, 0, 1, "pv")
    bits = {"lhs": 8, "rhs": 8}

    def run(left, right, row):
        module = Product(equation)
        return integer_site(site, module, (left, right), {}, row, (0, 1), bits, attention=attention)

    return run


# Attention by other letters, and equations that have no operation: rows of a matrix, a matrix for
# each vector, a right side without images, axes summed on one side.
@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bhpq,bqhd->bphd", (2, 3, 4, 5), (2, 5, 3, 6)),
        ("xhij,xjhc->xihc", (2, 3, 4, 5), (2, 5, 3, 6)),
        ("bphd,bqhd->bhpq", (2, 4, 3, 5), (2, 7, 3, 5)),
        ("bpq,bqd->bpd", (2, 4, 5), (2, 5, 3)),
        ("bi,bij->bj", (2, 5), (2, 5, 3)),
        ("bpq,qd->bdp", (2, 4, 5), (5, 3)),
        ("bspq,bqd->bpd", (2, 3, 4, 5), (2, 5, 6)),
    ],
)
@pytest.mark.parametrize("by_image", [False, True])
def test_a_site_with_a_left_zero_point_is_its_einsum(equation, left, right, by_image):
    rng = np.random.default_rng(0)
    left, right = _values(rng, left), _values(rng, right)
    by_image = by_image and len(right) == len(left)
    scale = np.array([[0.5, 2.0], [4.0, 0.25]], np.float32)[: 2 if by_image else 1]
    zero = np.array([[-128, 0], [17, 0]], np.int8)[: 2 if by_image else 1]
    row = (scale, zero) if by_image else (scale[0], zero[0])

    def spread(column, x):
        return np.reshape(column, (-1,) + (1,) * (x.ndim - 1)).astype(np.float64)

    point, scales = (
        spread(zero[:, 0], left),
        [spread(scale[:, i], x) for i, x in enumerate((left, right))],
    )
    integers = (_integers(left, scales[0], point) - point) * scales[0]
    others = _integers(right, scales[1], 0) * scales[1]
    y = jax.jit(_site(equation))(left, right, row)
    np.testing.assert_array_equal(y, np.einsum(equation, integers, others))


@pytest.mark.parametrize("attention", [None, "pallas_interpret", "pallas_gpu_interpret"])
@pytest.mark.parametrize("equation", ["bphd,bqhd->bhpq", "bhpq,bqhd->bphd"])
def test_a_site_is_proven_to_multiply_integers(attention, equation):
    shapes = {"p": 4, "q": 4, "h": 2, "d": 8, "b": 3}
    left, right = (
        jnp.ones([shapes[letter] for letter in letters])
        for letters in equation.split("->")[0].split(",")
    )
    run = _site(equation, attention=attention)

    def sampler(left, right, row):
        with jax.named_scope(scope("pv")):
            return run(left, right, row)

    row = jnp.array([0.1, 0.1]), jnp.array([-128, 0], jnp.int8)
    kernel = "pallas_call" in str(jax.make_jaxpr(sampler)(left, right, row))
    assert kernel == (attention is not None)
    execution = verify.read(jax.jit(sampler).lower(left, right, row).compile(), images=[])
    assert {result for result, _ in execution.products["pv"]} <= {*verify.INTEGER}
    site = Site("pv", "product", (), 0, 0, 1, "pv")
    assert verify.check(execution, [site], promised_bytes=0, passed_bytes=0) == []


def test_real_blocks_cover_rows_that_they_do_not_divide():
    rng = np.random.default_rng(1)
    left = rng.integers(-128, 128, (1, 2, 601, 33)).astype(np.int8)
    right = rng.integers(-128, 128, (1, 2, 33, 40)).astype(np.int8)
    assert pallas_tpu._rows(601, 33, 40, 1) == 128
    total = pallas_tpu.accumulate(left, right, None, transposed=False, interpret=True)
    np.testing.assert_array_equal(total, left.astype(np.int64) @ right.astype(np.int64))


@pytest.mark.parametrize(("contraction", "outputs"), [(4096, 64), (64, 4096), (16384, 128)])
def test_blocks_fit_in_vector_memory_or_are_refused(contraction, outputs):
    rows = pallas_tpu._rows(16384, contraction, outputs, 4)
    matrices = 2 * contraction * max(outputs, tpu.LANES)
    assert rows * (9 * contraction + 8 * outputs) + matrices <= tpu.VMEM_BUDGET
    with pytest.raises(InputError, match="65000 by 256 is too large a matrix"):
        pallas_tpu._rows(16384, 65000, 256, 4)


def test_what_does_not_fit_is_refused():
    p, v = jnp.ones((2, 3, 4, 5)), jnp.ones((2, 5, 3, 6))
    q, k = jnp.ones((2, 4, 3, 6)), jnp.ones((2, 5, 3, 6))
    with pytest.raises(InputError, match=r"expected \[B,H,M,N\] and \[B,N,H,D\]"):
        pv(p, v[:, :4])
    with pytest.raises(InputError, match=r"expected \[B,M,H,D\] and \[B,N,H,D\]"):
        qk(q, k[..., :5])
    with pytest.raises(InputError, match="needs the scale that it belongs to"):
        pv(p, v, None, jnp.int8(1), 1.0)
    with pytest.raises(InputError, match=r"of shape \[3\] for 2 images"):
        qk(q, k, jnp.ones(3), None, 1.0)
    with pytest.raises(InputError, match="contraction of 65794 can overflow int32"):
        pv(jnp.ones((1, 1, 1, 65794)), jnp.ones((1, 65794, 1, 1)))
    with pytest.raises(InputError, match="width 9"):
        qk(q, k, bits=(8, 9))
    with pytest.raises(InputError, match=r"known: pallas_gpu, .*, reference, xla"):
        qk(q, k, implementation="cuda")
    with pytest.raises(InputError, match=r"attention_products: .*needs a TPU"):
        pv(p, v, implementation="pallas_tpu")
    assert attention_products.MAX_CONTRACTION * 255 * 128 < 2**31
