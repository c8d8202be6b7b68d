"""Rows taken out and put back: exact in every implementation and type, and how misuse ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.kernels import tpu
from mpqdiff.kernels.row_routing import gather_rows, pallas_gpu, pallas_tpu, scatter_rows

IMPLEMENTATIONS = ("reference", "xla", "pallas_interpret", "pallas_gpu_interpret")
OPTIONS = ("ordered", "unique", "implementation")
GATHER = jax.jit(gather_rows, static_argnames=OPTIONS)
SCATTER = jax.jit(scatter_rows, static_argnames=("add", *OPTIONS))
TYPES = (jnp.float32, jnp.bfloat16, jnp.int8)
# (images, rows, features, taken): one of each, odd ones, all rows, none, no image.
SIZES = [(1, 1, 1, 1), (2, 7, 5, 4), (3, 49, 131, 49), (2, 16, 130, 9), (2, 5, 3, 0), (0, 5, 3, 2)]
FEW = settings(max_examples=8, deadline=None)


def _case(size, dtype, seed, *, ordered=False):
    """(x [B,P,D] with NaN and infinities, an index without repeats)."""
    rng = np.random.default_rng(seed)
    images, rows, features, taken = size
    x = rng.integers(-128, 128, (images, rows, features)).astype(np.float32)
    if dtype != jnp.int8:
        strange = rng.choice([np.nan, np.inf, -np.inf], x.shape)
        x = np.where(rng.random(x.shape) < 0.1, strange, x)
    index = [rng.permutation(rows)[:taken] for _ in range(images)]
    index = np.array(index, np.int32).reshape(images, taken)
    return jnp.asarray(x, dtype), np.sort(index, axis=1) if ordered else index


@pytest.fixture(scope="class")
def small_tiles():
    """Tiles of 4 rows of 16 features, for which 16 indices are compared at a time."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("VALUES", 64), ("WIDEST", 16)):
            patch.setattr(pallas_gpu, name, value)
        yield


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestEveryImplementation:
    @FEW
    @given(
        size=st.sampled_from(SIZES),
        dtype=st.sampled_from(TYPES),
        ordered=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_what_is_taken_and_put_back_is_what_was_there(
        self, implementation, size, dtype, ordered, seed
    ):
        x, index = _case(size, dtype, seed, ordered=ordered)
        promises = {"ordered": ordered, "unique": True, "implementation": implementation}
        y = GATHER(x, index, **promises)
        assert y.dtype == x.dtype
        expected = np.take_along_axis(np.asarray(x, np.float32), index[..., None], axis=1)
        np.testing.assert_array_equal(np.asarray(y, np.float32), expected)
        back = SCATTER(x, index, y, **promises)
        assert back.dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(back, np.float32), np.asarray(x, np.float32))
        blank = np.full(x.shape, 77, np.float32)
        put = SCATTER(jnp.asarray(blank, dtype), index, y, **promises)
        np.put_along_axis(blank, index[..., None], expected, axis=1)
        np.testing.assert_array_equal(np.asarray(put, np.float32), blank)

    @FEW
    @given(dtype=st.sampled_from(TYPES), seed=st.integers(0, 99))
    def test_repeated_rows_add_up(self, implementation, dtype, seed):
        rng = np.random.default_rng(seed)
        into = rng.integers(-9, 9, (2, 6, 10)).astype(np.float32)
        rows = rng.integers(-9, 9, (2, 19, 10)).astype(np.float32)
        index = rng.integers(0, 6, (2, 19)).astype(np.int32)
        total = SCATTER(
            jnp.asarray(into, dtype),
            index,
            jnp.asarray(rows, dtype),
            add=True,
            implementation=implementation,
        )
        for image in range(2):
            np.add.at(into[image], index[image], rows[image])
        np.testing.assert_array_equal(np.asarray(total, np.float32), into)

    def test_a_repeated_row_is_one_of_those_given_and_whole(self, implementation):
        into, rows = np.full((2, 6, 40), -1, np.float32), np.empty((2, 19, 40), np.float32)
        rows[...] = np.arange(19)[:, None]
        index = np.random.default_rng(0).integers(0, 5, (2, 19)).astype(np.int32)
        put = np.asarray(SCATTER(into, index, rows, implementation=implementation))
        np.testing.assert_array_equal(put, np.broadcast_to(put[..., :1], put.shape))
        taken = put[:, :5, 0].astype(int)
        np.testing.assert_array_equal(np.take_along_axis(index, taken, 1), [np.arange(5)] * 2)
        np.testing.assert_array_equal(put[:, 5], -1)

    def test_traced_indices_outside_take_the_nearest_row_and_put_none(self, implementation):
        x = jnp.arange(24.0).reshape(2, 4, 3)
        index = np.array([[-1, 4, 2], [99, 0, -(2**31)]], np.int32)
        y = GATHER(x, index, implementation=implementation)
        np.testing.assert_array_equal(y[:, :, 0], [[0, 9, 6], [21, 12, 12]])
        for add in (False, True):
            put = SCATTER(x, index, 0 * y - 1, add=add, implementation=implementation)
            expected = np.array(x)
            expected[0, 2] = expected[0, 2] * add - 1
            expected[1, 0] = expected[1, 0] * add - 1
            np.testing.assert_array_equal(put, expected)

    def test_known_indices_outside_are_refused(self, implementation):
        x, index = jnp.ones((1, 4, 3)), np.array([[3, 4]], np.int32)
        with pytest.raises(InputError, match="gather_rows: index 4 of 4 rows; expected 0 to 3"):
            gather_rows(x, index, implementation=implementation)
        with pytest.raises(InputError, match="scatter_rows: index -1 of 4 rows"):
            scatter_rows(x, index - 4, jnp.ones((1, 2, 3)), implementation=implementation)
        with pytest.raises(InputError, match="of 0 rows"):
            GATHER(x[:, :0], index, implementation=implementation)


@pytest.mark.parametrize("unique", [False, True])
def test_gradients_of_xla_are_those_of_the_sums(unique):
    rng = np.random.default_rng(3)
    index = np.array([rng.permutation(7)[:4] for _ in range(2)], np.int32)
    weight, full = (rng.integers(-9, 9, (2, n, 5)).astype(np.float32) for n in (4, 7))
    at = index[..., None]

    def taken(x):
        return jnp.sum(weight * gather_rows(x, index, unique=unique))

    def put(into, rows, add):
        return jnp.sum(full * scatter_rows(into, index, rows, add=add, unique=unique))

    def repeated(x):
        return jnp.sum(weight * gather_rows(x, 0 * index))

    scatter = jax.grad(put, (0, 1))
    of_taken, replaced, added, of_repeated = jax.jit(
        lambda x, rows: (
            jax.grad(taken)(x),
            scatter(x, rows, False),
            scatter(x, rows, True),
            jax.grad(repeated)(x),
        )
    )(full, weight)
    expected, kept = np.zeros_like(full), np.array(full)
    np.put_along_axis(expected, at, weight, axis=1)
    np.put_along_axis(kept, at, 0.0, axis=1)
    np.testing.assert_array_equal(of_taken, expected)
    for (of_into, of_rows), whole in ((replaced, kept), (added, full)):
        np.testing.assert_array_equal(of_into, whole)
        np.testing.assert_array_equal(of_rows, np.take_along_axis(full, at, axis=1))
    np.testing.assert_array_equal(of_repeated[:, 0], weight.sum(1))
    np.testing.assert_array_equal(of_repeated[:, 1:], 0)


def test_what_does_not_fit_is_refused():
    x, index = jnp.ones((2, 4, 3)), jnp.zeros((2, 2), jnp.int32)
    with pytest.raises(InputError, match=r"expected float or int8 \[B,P,D\]"):
        gather_rows(x.astype(jnp.int32), index)
    with pytest.raises(InputError, match=r"expected int32 \[2, Q\]"):
        gather_rows(x, index.astype(jnp.int8))
    with pytest.raises(InputError, match=r"expected int32 \[2, Q\]"):
        gather_rows(x, index[:1])
    with pytest.raises(InputError, match=r"rows int8\[2, 2, 3\], expected float32\[2, 2, 3\]"):
        scatter_rows(x, index, jnp.ones((2, 2, 3), jnp.int8))
    with pytest.raises(InputError, match="implementation of scatter_rows"):
        scatter_rows(x, index, x[:, :2], implementation="cuda")
    with pytest.raises(InputError, match=r"gather_rows: .*needs a TPU"):
        gather_rows(x, index, implementation="pallas_tpu")


def test_features_come_in_blocks_that_fit_in_vector_memory():
    assert pallas_tpu._width("gather_rows", 1152, 300 * 12) == 1024
    assert pallas_tpu._width("gather_rows", 77, 300 * 12) == 77
    width = pallas_tpu._width("gather_rows", 1152, 6144 * 12)
    assert width == 256 and width * 6144 * 12 <= tpu.VMEM_BUDGET
    with pytest.raises(InputError, match="these are too many"):
        pallas_tpu._width("gather_rows", 1152, 40_000 * 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu, "FEATURES", (4,))
        x, index = _case((2, 7, 10, 4), jnp.float32, 5)
        y = gather_rows(x, index, implementation="pallas_interpret")
        np.testing.assert_array_equal(y, gather_rows(x, index))
        back = scatter_rows(jnp.zeros_like(x), index, y, implementation="pallas_interpret")
        np.testing.assert_array_equal(back, scatter_rows(jnp.zeros_like(x), index, y))
