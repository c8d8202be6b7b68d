"""Round trips of both packings at every width, their exact sizes, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.quantize.pack import (
    container_bits,
    pack,
    pack_bits,
    packed_bytes,
    packed_shape,
    unpack,
    unpack_bits,
)

WIDTHS = st.sampled_from(range(2, 9))
SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


def _integers(seed, shape, bits):
    limit = 1 << (bits - 1)
    return np.random.default_rng(seed).integers(-limit, limit, shape).astype(np.int8)


def test_containers_are_the_next_packed_width():
    assert [container_bits(bits) for bits in range(2, 9)] == [2, 4, 4, 8, 8, 8, 8]


@settings(max_examples=25, deadline=None)  # every new shape is compiled
@given(seed=st.integers(0, 2**32 - 1), shape=SHAPES, bits=WIDTHS)
def test_device_packing_round_trips(seed, shape, bits):
    qvalue = _integers(seed, shape, bits)
    packed = pack(qvalue, bits)
    assert packed.dtype == np.int8 and packed.shape == packed_shape(shape, bits)
    assert packed.nbytes == packed_bytes(shape, bits)
    restored = unpack(jnp.asarray(packed), bits, shape)
    assert restored.dtype == jnp.int8
    np.testing.assert_array_equal(restored, qvalue)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_unpacking_compiled_equals_eager(bits):
    qvalue = _integers(0, (33, 40), bits)
    compiled = jax.jit(lambda packed: unpack(packed, bits, qvalue.shape))
    np.testing.assert_array_equal(compiled(pack(qvalue, bits)), qvalue)


@pytest.mark.parametrize(
    ("bits", "share"), [(2, 0.25), (3, 0.5), (4, 0.5), (5, 1), (6, 1), (7, 1), (8, 1)]
)
def test_device_bytes_are_the_share_of_a_byte_and_odd_sizes_are_padded(bits, share):
    assert packed_bytes((96, 384), bits) == 96 * 384 * share
    assert packed_bytes((3, 3, 5, 7), bits) == int(np.ceil(45 * share)) * 7


def test_four_bit_bytes_hold_the_upper_half_of_the_rows_in_the_high_nibble():
    packed = pack(np.array([[1], [-1], [-8], [7]], np.int8), 4).view(np.uint8)
    np.testing.assert_array_equal(packed, [[0x81], [0x7F]])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=SHAPES, bits=WIDTHS)
def test_file_packing_round_trips_at_its_exact_size(seed, shape, bits):
    qvalue = _integers(seed, shape, bits)
    data = pack_bits(qvalue, bits)
    assert data.dtype == np.uint8 and data.shape == (-(-qvalue.size * bits // 8),)
    restored = unpack_bits(data, bits, shape)
    assert restored.dtype == np.int8
    np.testing.assert_array_equal(restored, qvalue)


def test_file_packing_is_twos_complement_lowest_bit_first():
    # 3 bits each: 001, 111, 100 -> 100 111 001 read from the top, in two bytes.
    np.testing.assert_array_equal(pack_bits(np.array([1, -1, -4]), 3), [0b00111001, 0b1])


def test_non_contiguous_and_wider_integers_pack_alike():
    qvalue = _integers(1, (6, 10), 3)
    for other in (np.asfortranarray(qvalue), qvalue.astype(np.int64)):
        np.testing.assert_array_equal(pack(other, 3), pack(qvalue, 3))
        np.testing.assert_array_equal(pack_bits(other, 3), pack_bits(qvalue, 3))


@pytest.mark.parametrize("packer", [pack, pack_bits])
def test_values_that_do_not_fit_are_refused(packer):
    for qvalue in (np.array([[8]]), np.array([[-9]]), np.array([[0.5]])):
        with pytest.raises(InputError, match="do not fit 4 bits"):
            packer(qvalue, 4)
    with pytest.raises(InputError, match="2 to 8 bits"):
        packer(np.zeros((2, 2), np.int8), 1)


def test_data_of_another_size_is_refused():
    qvalue = _integers(2, (5, 6), 4)
    with pytest.raises(InputError, match="truncated"):
        unpack_bits(pack_bits(qvalue, 4)[:-1], 4, (5, 6))
    with pytest.raises(InputError, match="is not a kernel of shape"):
        unpack(jnp.asarray(pack(qvalue, 4)), 4, (9, 6))
    with pytest.raises(InputError, match="is not a kernel of shape"):
        unpack(jnp.asarray(pack(qvalue, 4)), 8, (5, 6))
