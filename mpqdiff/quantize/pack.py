"""Packed integers: planes of 2, 4 or 8 bits on the device, exact bit streams in the file.

On the device a kernel is packed along its contraction axis in planes: with f = 8 / bits values to
a byte, byte [k, n] holds rows k, k + R, ..., k + (f-1) R of column n, R = ceil(K / f) bytes down.
Unpacking is then two shifts of whole planes and a concatenation of contiguous blocks; values of
neighbouring columns in one byte would have to be interleaved, which XLA on CPU does at a fifth of
the speed.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.quantize.numerics import check_bits


def container_bits(bits: int) -> int:
    """The packed width that holds `bits` on the device: 2, 4 or 8 (3 takes 4; 5, 6, 7 take 8).

    Raises InputError on a width outside 2..8.
    """
    check_bits(bits)
    return next(width for width in (2, 4, 8) if bits <= width)


def packed_shape(shape: Sequence[int], bits: int) -> tuple[int, int]:
    """[R, out] of the bytes that hold a kernel of `shape` [in..., out]; K is padded to f R."""
    rows = math.prod(shape[:-1])
    return -(-rows // (8 // container_bits(bits))), shape[-1]


def packed_bytes(shape: Sequence[int], bits: int) -> int:
    """Bytes on the device of a kernel of `shape` at `bits`, padding included."""
    return math.prod(packed_shape(shape, bits))


def pack(qvalue, bits: int) -> np.ndarray:
    """Host packing: integers [in..., out] -> int8 [R, out] (`packed_shape`).

    Raises InputError on a width outside 2..8 or on values that do not fit it.
    """
    qvalue = _fitting(qvalue, bits)
    width = container_bits(bits)
    count, columns = packed_shape(qvalue.shape, bits)
    rows = qvalue.reshape(-1, columns)
    rows = np.pad(rows, ((0, count * (8 // width) - len(rows)), (0, 0))).view(np.uint8)
    packed = np.zeros((count, columns), np.uint8)
    for plane, values in enumerate(rows.reshape(-1, count, columns)):
        packed |= (values & ((1 << width) - 1)) << (plane * width)
    return packed.view(np.int8)


def unpack(packed, bits: int, shape: Sequence[int]):
    """The int8 values of `shape` [in..., out], sign-extended; the inverse of `pack`, for any jit.

    Raises InputError where `packed` is not what `shape` at `bits` packs to.
    """
    if tuple(packed.shape) != packed_shape(shape, bits) or packed.dtype != jnp.int8:
        raise InputError(
            f"packed {packed.dtype}{list(packed.shape)} is not a kernel of shape {list(shape)} at "
            f"{bits} bits, which is int8{list(packed_shape(shape, bits))}"
        )
    width = container_bits(bits)
    if width == 8:
        return packed.reshape(tuple(shape))
    down = jnp.int8(8 - width)
    planes = [
        jax.lax.shift_right_arithmetic(jax.lax.shift_left(packed, jnp.int8(up)), down)
        for up in range(8 - width, -1, -width)
    ]
    return jnp.concatenate(planes)[: math.prod(shape[:-1])].reshape(tuple(shape))


def pack_bits(qvalue, bits: int) -> np.ndarray:
    """The file's form: uint8 [ceil(n bits / 8)], two's complement, lowest bit first, no gaps.

    Raises InputError on a width outside 2..8 or on values that do not fit it.
    """
    values = _fitting(qvalue, bits).reshape(-1, 1).view(np.uint8)
    stream = np.unpackbits(values, axis=1, bitorder="little")[:, :bits]
    return np.packbits(stream, bitorder="little")


def unpack_bits(data, bits: int, shape: Sequence[int]) -> np.ndarray:
    """The inverse of `pack_bits`: int8 of `shape`.

    Raises InputError where `data` has another length than `shape` needs.
    """
    check_bits(bits)
    count = math.prod(shape)
    data = np.asarray(data, np.uint8)
    if data.shape != (-(-count * bits // 8),):
        raise InputError(
            f"bit-packed data of shape {list(data.shape)}: {count} values of {bits} bits take "
            f"{-(-count * bits // 8)} bytes; the file is truncated or its width is another"
        )
    stream = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    # Repeating the top bit up to bit 7 is the sign extension.
    whole = np.concatenate([stream, np.repeat(stream[:, -1:], 8 - bits, axis=1)], axis=1)
    return np.packbits(whole, axis=1, bitorder="little").view(np.int8).reshape(tuple(shape))


def _fitting(qvalue, bits: int) -> np.ndarray:
    """`qvalue` as int8, after checking that `bits` hold every value."""
    check_bits(bits)
    qvalue = np.asarray(qvalue)
    limit = 1 << (bits - 1)
    if qvalue.dtype.kind not in "iu" or (
        qvalue.size and (qvalue.min() < -limit or qvalue.max() >= limit)
    ):
        span = f"{qvalue.min()} to {qvalue.max()}" if qvalue.size else "nothing"
        raise InputError(
            f"{qvalue.dtype} values from {span} do not fit {bits} bits: expected integers from "
            f"{-limit} to {limit - 1}; quantise to the same width first"
        )
    return qvalue.astype(np.int8)
