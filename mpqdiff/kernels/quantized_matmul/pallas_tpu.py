"""The product as one Mosaic kernel: float tokens and packed integers in, float tokens out.

The grid runs over blocks of tokens, and within one over blocks of output channels. A block of
tokens is brought in whole, all K of it, and quantised once into int8 in vector memory, plane by
plane: with weights packed in planes (`quantize.pack`) the product is the sum over planes of
x[:, plane] times the opened plane, so unpacking moves nothing across lanes, and packed weights are
all that is read from memory. int8 x int8 -> int32 on the matrix unit, then zero point, scales,
bias and activation before the block is written. Nothing is padded outside: a last block of rows
or channels is partial, and K is never split.
"""

from functools import partial
from itertools import product
from math import prod

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mpqdiff.errors import InputError
from mpqdiff.kernels import tpu
from mpqdiff.kernels.epilogue import finish
from mpqdiff.kernels.quantize_activations.pallas_tpu import rounded
from mpqdiff.kernels.quantize_activations.reference import scale_from
from mpqdiff.quantize.numerics import qmax
from mpqdiff.quantize.pack import container_bits

ROWS = (512, 256, 128)
FEWER_ROWS = (64, 32)
CHANNELS = (512, 384, 256, 128)
# Columns of the operand "tokens": what the prologue needs for each token, or once for all.
TOKEN_COLUMNS = ("scale", "reciprocal", "low", "high", "zero")


def quantized_matmul(
    x,
    weight,
    x_scale,
    x_zero_point,
    w_scale,
    w_colsum,
    bias,
    *,
    x_bits,
    w_bits,
    activation,
    interpret=False,
):
    """See the package.

    Raises InputError off a TPU unless interpreted, and where K is too long for vector memory.
    """
    if not interpret:
        tpu.require_tpu("quantized_matmul")
    operands = {
        "tokens": _tokens(x, x_scale, x_zero_point, x_bits),
        "w_scale": jnp.asarray(w_scale, jnp.float32),
        "bias": bias,
        "colsum": None if x_zero_point is None else w_colsum,
    }
    return blocked_product(
        x,
        weight,
        operands,
        w_bits=w_bits,
        value_type=jnp.int8,
        online=x_scale is None,
        activation=activation,
        interpret=interpret,
    )


def accumulate(xq, wq, *, w_bits=8, interpret=False):
    """xq int8 [..., K] and packed wq int8 [R,N] -> the int32 sums [..., N], by the same kernel.

    Raises InputError off a TPU unless interpreted.
    """
    if not interpret:
        tpu.require_tpu("quantized_matmul")
    return blocked_product(xq, wq, {}, w_bits=w_bits, value_type=jnp.int8, interpret=interpret)


def _tokens(x, scale, zero_point, bits):
    """float32 [rows or 1, 5], its columns TOKEN_COLUMNS; online, `reciprocal` holds 1 / qmax."""
    limit = jnp.asarray(qmax(bits), jnp.float32)
    zero = jnp.float32(0) if zero_point is None else zero_point.astype(jnp.float32)
    if scale is None:
        scale, reciprocal = jnp.float32(1), 1.0 / limit
    else:
        scale = jnp.asarray(scale, jnp.float32)
        reciprocal = 1.0 / scale
    entries = [scale, reciprocal, -limit - 1.0 - zero, limit - zero, zero]
    lead = (*x.shape[:-1], 1) if max(entry.ndim for entry in entries) else (1, 1)
    columns = [jnp.broadcast_to(entry, lead).reshape(-1, 1) for entry in entries]
    return jnp.concatenate(columns, axis=1)


def blocked_product(
    x, weight, operands, *, w_bits, value_type, online=False, activation=None, interpret=False
):
    """x [..., K] times packed weight int8 [R,N]: int32 sums without "w_scale", else float32.

    operands: "tokens" float32 [M or 1, 5] quantises x and scales the sums; w_scale, bias, colsum
    [N] or None. value_type: int8, or bfloat16 for weight-only products, which take no tokens.
    """
    lead, contraction = x.shape[:-1], x.shape[-1]
    rows, channels, bits = prod(lead), weight.shape[1], container_bits(w_bits)
    result = jnp.float32 if "w_scale" in operands else jnp.int32
    if 0 in (rows, channels, contraction):  # a grid cannot be empty; every sum is
        none = jnp.zeros((*lead, channels), result)
        return none if result == jnp.int32 else finish(none, operands["bias"], activation)
    operands = {name: value for name, value in operands.items() if value is not None}
    by_channel = [name for name in operands if name != "tokens"]
    operands |= {name: operands[name].reshape(1, -1) for name in by_channel}
    height = weight.shape[0] if bits == 8 else tpu.round_up(weight.shape[0], tpu.SUBLANES_INT8)
    block, width = _blocks(
        rows, contraction, channels, x.dtype.itemsize, jnp.dtype(value_type).itemsize, bits
    )
    arrays = {"x": x.reshape(rows, contraction), "weight": weight} | operands
    specs = {
        "x": pl.BlockSpec((block, contraction), lambda i, j: (i, 0)),
        "weight": pl.BlockSpec((height, width), lambda i, j: (0, j)),
    } | {name: pl.BlockSpec((1, width), lambda i, j: (0, j)) for name in by_channel}
    if "tokens" in operands:
        single = operands["tokens"].shape[0] == 1
        specs["tokens"] = pl.BlockSpec(
            (1 if single else block, len(TOKEN_COLUMNS)), lambda i, j: (0 if single else i, 0)
        )
    y = pl.pallas_call(
        partial(_kernel, names=tuple(specs), w_bits=bits, online=online, activation=activation),
        out_shape=jax.ShapeDtypeStruct((rows, channels), result),
        grid=(pl.cdiv(rows, block), pl.cdiv(channels, width)),
        in_specs=list(specs.values()),
        out_specs=pl.BlockSpec((block, width), lambda i, j: (i, j)),
        scratch_shapes=[
            pltpu.VMEM((8 // bits, block, weight.shape[0]), value_type),
            pltpu.VMEM((block, 1), jnp.float32),
        ],
        # Blocks of channels follow each other: all but the first reuse the quantised tokens.
        compiler_params=tpu.compiler_params("parallel", "arbitrary"),
        interpret=interpret,
        name=f"product_{jnp.dtype(value_type).name}_w{bits}",
    )(*(arrays[name] for name in specs))
    return y.reshape(*lead, channels)


def _kernel(*refs, names, w_bits, online, activation):
    """refs: `names`, the output [m,n], the values [planes,m,R], the tokens' own scales [m,1]."""
    ref, (y_ref, values_ref, scale_ref) = dict(zip(names, refs, strict=False)), refs[-3:]
    contraction, height = ref["x"].shape[1], values_ref.shape[2]
    starts = range(0, contraction, height)
    each = "tokens" in ref and ref["tokens"].shape[0] > 1

    def token(name, rows=slice(None)):
        column = TOKEN_COLUMNS.index(name)
        return ref["tokens"][rows if each else slice(None), column : column + 1]

    def quantise(rows):
        reciprocal = token("reciprocal", rows) if "tokens" in ref else None
        if online:
            scale = scale_from(ref["x"][rows, :], reciprocal)
            scale_ref[rows, :], reciprocal = scale, 1.0 / scale
        for plane, start in enumerate(starts):
            x = ref["x"][rows, start : min(start + height, contraction)]
            if reciprocal is not None:
                low, high, zero = (token(name, rows) for name in ("low", "high", "zero"))
                x = rounded(x, reciprocal, low, high, zero)
            values_ref[plane, rows, : x.shape[1]] = x.astype(values_ref.dtype)

    @pl.when(pl.program_id(1) == 0)
    def _():
        # Some rows at a time: the float32 steps of a whole block would not fit beside it.
        whole, rest = divmod(y_ref.shape[0], tpu.SUBLANES_INT8)
        if whole:
            pl.loop(0, whole)(lambda i: quantise(pl.ds(i * tpu.SUBLANES_INT8, tpu.SUBLANES_INT8)))
        if rest:
            quantise(slice(whole * tpu.SUBLANES_INT8, y_ref.shape[0]))

    integer = values_ref.dtype == jnp.int8
    total = jnp.zeros(y_ref.shape, jnp.int32 if integer else jnp.float32)
    opened = tpu.planes(ref["weight"][...], w_bits)
    for plane, start in enumerate(starts):
        rows = min(height, contraction - start)
        total += jnp.dot(
            values_ref[plane, :, :rows],
            opened[plane][:rows].astype(values_ref.dtype),
            preferred_element_type=total.dtype,
        )
    if integer:
        total = total >> (8 - w_bits)
    if "colsum" in ref:
        total -= token("zero").astype(jnp.int32) * ref["colsum"][...]
    if "w_scale" not in ref:
        y_ref[...] = total
        return
    y = total.astype(jnp.float32)
    if "tokens" in ref:
        y = y * (scale_ref[...] if online else token("scale"))
    y = y * ref["w_scale"][...]
    y_ref[...] = finish(y, ref["bias"][...] if "bias" in ref else None, activation)


def _blocks(rows, contraction, channels, x_bytes, value_bytes, bits) -> tuple[int, int]:
    """Rows and channels at a time: the least padding, then the largest, that fit in VMEM.

    Raises InputError where a contraction is too long for any.
    """
    tall = [*_by_padding(rows, ROWS), *(size for size in FEWER_ROWS if size < rows)]
    wide = _by_padding(channels, CHANNELS)
    lanes = tpu.round_up(contraction, tpu.LANES)
    opened = value_bytes if bits < 8 or value_bytes > 1 else 0

    def size(block, width):
        tokens = block * (2 * x_bytes + value_bytes) + tpu.SUBLANES_INT8 * 3 * 4  # and their steps
        weights = width * (bits / 4 + opened)
        return lanes * (tokens + weights) + block * width * 4 * 4

    for pair in product(tall, wide):
        if size(*pair) <= tpu.VMEM_BUDGET:
            return pair
    raise InputError(
        f"a contraction of {contraction} is too long for the TPU kernel, which holds whole rows in "
        "vector memory; take implementation 'xla'"
    )


def _by_padding(size: int, blocks: tuple[int, ...]) -> list[int]:
    """`size` whole where no block is larger, and the blocks below it, least padding first."""
    whole = [size] if size <= blocks[0] else []
    below = sorted(
        (block for block in blocks if block < size),
        key=lambda block: (tpu.round_up(size, block), -block),
    )
    return whole + below


interpreted = partial(quantized_matmul, interpret=True)
