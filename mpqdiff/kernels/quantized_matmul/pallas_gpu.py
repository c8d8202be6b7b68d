"""The product as one Triton kernel: integers or floats and packed integers in, float tokens out.

Each program makes one block of the output and loops over K. Weights packed in planes
(`quantize.pack`) stay packed up to the registers: the product is the sum over planes of x[:, plane]
times the opened plane. int8 x int8 -> int32 on tensor cores, then zero point, scales, bias and
activation before the block is written.

Hopper's tensor cores read int8 only with K contiguous, so the kernel takes the packed weights
transposed, [N,R]. XLA makes that copy, unless it is given the transpose of such an array already.

Who quantises x is decided by the bytes that are read. A program for every block of channels reads
its tokens anew: few such blocks read floats and quantise them in the loop, many read integers that
were made once. A token's own scale needs the whole token first, so there x always comes quantised.
"""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mpqdiff.kernels import gpu
from mpqdiff.kernels.epilogue import finish
from mpqdiff.kernels.quantize_activations import pallas_gpu as own_scales
from mpqdiff.quantize.numerics import qmax, quantize_activation
from mpqdiff.quantize.pack import container_bits

# Rows and channels of a block, the largest first: larger ones read less, smaller ones make more.
BLOCKS = ((128, 256), (128, 128), (64, 128), (64, 64), (64, 32), (32, 64), (16, 64), (16, 32))
# Bytes of K that a step of the loop takes from each plane.
DEPTHS = (128, 64, 32)
ALONG_K = (((1,), (1,)), ((), ()))
# Rows of the operand "tokens", each with an entry for every token or one for all: what follows the
# product, and what quantises before it.
TOKEN_ROWS = ("scale", "zero", "reciprocal", "low", "high")


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
    """See the package. Raises InputError off a GPU unless interpreted, and without Triton."""
    if not interpret:
        gpu.require_gpu("quantized_matmul")
    rows, channels = prod(x.shape[:-1]), weight.shape[1]
    zero = jnp.int32(0) if x_zero_point is None else x_zero_point.astype(jnp.int32)
    if x_scale is None:
        x, x_scale = own_scales.quantize_activations(x, bits=x_bits, interpret=interpret)
    elif not in_prologue(rows, channels, x.dtype.itemsize):
        x = quantize_activation(x, x_scale, zero, x_bits)
    operands = {
        "tokens": _tokens(x, x_scale, zero, x_bits),
        "w_scale": jnp.asarray(w_scale, jnp.float32),
        "bias": bias,
        "colsum": None if x_zero_point is None else w_colsum,
    }
    return blocked_product(
        x, weight, operands, w_bits=w_bits, activation=activation, interpret=interpret
    )


def accumulate(xq, wq, *, w_bits=8, interpret=False):
    """xq int8 [..., K] and packed wq int8 [R,N] -> the int32 sums [..., N], by the same kernel.

    Raises InputError off a GPU unless interpreted, and without Triton.
    """
    if not interpret:
        gpu.require_gpu("quantized_matmul")
    return blocked_product(xq, wq, {}, w_bits=w_bits, interpret=interpret)


def in_prologue(rows: int, channels: int, itemsize: int) -> bool:
    """Whether the kernel quantises x: where that reads and writes fewer bytes of x in all."""
    count = pl.cdiv(channels, _block(rows, channels)[1])
    return count * itemsize <= itemsize + 1 + count


def _tokens(x, scale, zero, bits):
    """float32 [2 or 5, rows or 1], its rows the first of TOKEN_ROWS; all five for a float x."""
    scale, zero = jnp.asarray(scale, jnp.float32), zero.astype(jnp.float32)
    entries = [scale, zero]
    if x.dtype != jnp.int8:
        limit = jnp.asarray(qmax(bits), jnp.float32)
        entries += [1.0 / scale, -limit - 1.0 - zero, limit - zero]
    lead = (*x.shape[:-1], 1) if max(entry.ndim for entry in entries) else (1,)
    return jnp.stack([jnp.broadcast_to(entry, lead).reshape(-1) for entry in entries])


def blocked_product(x, weight, operands, *, w_bits, activation=None, interpret=False):
    """x [..., K] times packed weight int8 [R,N]: int32 sums without "w_scale", else float32.

    x int8 or bfloat16 is multiplied as it is, without and with "tokens" for int8; other floats are
    quantised by "tokens", float32 [2 or 5, M or 1] (TOKEN_ROWS). w_scale, bias, colsum: [N] or
    None.
    """
    lead, contraction = x.shape[:-1], x.shape[-1]
    rows, channels, bits = prod(lead), weight.shape[1], container_bits(w_bits)
    result = jnp.float32 if "w_scale" in operands else jnp.int32
    if 0 in (rows, channels, contraction):  # a grid cannot be empty; every sum is
        none = jnp.zeros((*lead, channels), result)
        return none if result == jnp.int32 else finish(none, operands["bias"], activation)
    operands = {name: value for name, value in operands.items() if value is not None}
    by_channel = [name for name in operands if name != "tokens"]
    block, width = _block(rows, channels)
    held = weight.shape[0]
    depth = _depth(held)
    deep = pl.cdiv(held, depth) * depth
    arrays = {"x": x.reshape(rows, contraction), "weight": weight.T} | operands
    specs = {
        # Wide enough for the last step of the last plane, which the masks end earlier.
        "x": pl.BlockSpec((block, (8 // bits - 1) * held + deep), lambda i, j: (i, 0)),
        "weight": pl.BlockSpec((width, deep), lambda i, j: (j, 0)),
    } | {name: pl.BlockSpec((width,), lambda i, j: (j,)) for name in by_channel}
    if "tokens" in operands:
        entries, count = operands["tokens"].shape
        specs["tokens"] = (
            pl.BlockSpec((entries, 1), lambda i, j: (0, 0))
            if count == 1
            else pl.BlockSpec((entries, block), lambda i, j: (0, i))
        )
    value_type = jnp.int8 if "tokens" in operands else x.dtype
    warps = 8 if block * width >= 128 * 128 else 4
    y = pl.pallas_call(
        partial(
            _kernel,
            names=tuple(specs),
            sizes=(rows, held, contraction, channels),
            depth=depth,
            value_type=value_type,
            w_bits=bits,
            activation=activation,
        ),
        out_shape=jax.ShapeDtypeStruct((rows, channels), result),
        grid=(pl.cdiv(rows, block), pl.cdiv(channels, width)),
        in_specs=list(specs.values()),
        out_specs=pl.BlockSpec((block, width), lambda i, j: (i, j)),
        compiler_params=gpu.triton().CompilerParams(num_warps=warps, num_stages=3),
        interpret=interpret,
        name=f"product_{jnp.dtype(value_type).name}_w{bits}",
    )(*(arrays[name] for name in specs))
    return y.reshape(*lead, channels)


def _kernel(*refs, names, sizes, depth, value_type, w_bits, activation):
    """refs: `names`, then the output [m,n]; sizes: rows of x, of the weight, K and channels."""
    ref, y_ref = dict(zip(names, refs, strict=False)), refs[-1]
    rows, held, contraction, channels = sizes
    block, width = y_ref.shape
    row_mask = gpu.inside(pl.program_id(0) * block, block, rows)
    column_mask = gpu.inside(pl.program_id(1) * width, width, channels)
    starts = range(0, contraction, held)
    quantised = value_type != ref["x"].dtype

    def token(name):
        row = TOKEN_ROWS.index(name)
        if ref["tokens"].shape[1] == 1:
            return ref["tokens"][row, 0]
        one = gpu.load(ref["tokens"].at[pl.ds(row, 1), :], gpu.both(None, row_mask))
        return one.reshape(block, 1)

    def channel(name):
        return gpu.load(ref[name].at[:], column_mask)[None, :]

    # A tensor core's left side may come from registers. It is the side that was changed there:
    # opened or converted weights, then, unless x is.
    turned = not quantised and (w_bits < 8 or value_type == jnp.bfloat16)
    prologue = [token(n) for n in ("reciprocal", "low", "high", "zero")] if quantised else None

    def step(i, total):
        first = i * depth
        packed_mask = gpu.inside(first, depth, held)
        packed = gpu.load(
            ref["weight"].at[:, pl.ds(first, depth)], gpu.both(column_mask, packed_mask)
        )
        for start, plane in zip(starts, gpu.planes(packed, w_bits), strict=False):
            # Where a plane is cut short, so is x; the packed zeros below it meet zeros of x.
            whole = held % depth == 0 and start + held <= contraction
            place = first + lax.iota(jnp.int32, depth)
            mask = None if whole else (place < held) & (start + place < contraction)
            x = gpu.load(ref["x"].at[:, pl.ds(start + first, depth)], gpu.both(row_mask, mask))
            if prologue:
                x = gpu.rounded(x, *prologue)
            plane = plane.astype(value_type)
            sides = (plane, x) if turned else (x, plane)
            total += lax.dot_general(*sides, ALONG_K, preferred_element_type=total.dtype)
        return total

    integer = value_type == jnp.int8
    shape = (width, block) if turned else (block, width)
    zeros = jnp.zeros(shape, jnp.int32 if integer else jnp.float32)
    total = lax.fori_loop(0, pl.cdiv(held, depth), step, zeros)
    total = total.T if turned else total
    if integer and w_bits < 8:
        total = total >> (8 - w_bits)
    if "colsum" in ref:
        total -= token("zero").astype(jnp.int32) * channel("colsum")
    if "w_scale" in ref:
        y = total.astype(jnp.float32)
        if "tokens" in ref:
            y = y * token("scale")
        y = y * channel("w_scale")
        total = finish(y, channel("bias") if "bias" in ref else None, activation)
    gpu.store(y_ref.at[:, :], total, gpu.both(row_mask, column_mask))


def _block(rows: int, channels: int) -> tuple[int, int]:
    """The largest block that is no taller or wider than it need be and leaves enough programs."""
    tall = max(gpu.LEAST_ROWS, gpu.power_of_two(rows))
    wide = max(gpu.LEAST_DEPTH, gpu.power_of_two(channels))
    fitting = [(m, n) for m, n in BLOCKS if m <= tall and n <= wide] or BLOCKS[-1:]
    programs = {(m, n): pl.cdiv(rows, m) * pl.cdiv(channels, n) for m, n in fitting}
    enough = [pair for pair, count in programs.items() if count >= gpu.ENOUGH_PROGRAMS]
    return enough[0] if enough else fitting[-1]


def _depth(held: int) -> int:
    """Rows of the packed weight at a time: the most that divide it, else a middling number."""
    fitting = [depth for depth in DEPTHS if depth <= gpu.power_of_two(held)] or DEPTHS[-1:]
    return next((depth for depth in fitting if held % depth == 0), fitting[len(fitting) // 2])


interpreted = partial(quantized_matmul, interpret=True)
