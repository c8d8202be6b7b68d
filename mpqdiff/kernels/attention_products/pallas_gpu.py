"""The product as one Triton kernel: integers of every head of every image in, float32 out.

The grid runs over blocks of rows and of columns and over (images x heads), rows first, so that the
programs that share a right matrix follow each other. Hopper's tensor cores read int8 only with the
summed axis contiguous. Queries and keys come so; values are moved there, tokens last, by XLA, which
moves their heads together in any case.

XLA quantises every operand. Probabilities are made by the last loop of a softmax: if that writes
integers, a byte is written and a byte read, where floats are four and four. The column sum of a
zero point is XLA's as well, one number for each column, and is taken off the sums before they are
scaled. Nothing is padded outside: blocks are cut by masks.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mpqdiff.kernels import gpu
from mpqdiff.kernels.quantized_matmul import pallas_gpu as matmul
from mpqdiff.quantize.numerics import quantize_activation

# Without the widest: heads are narrow, so these sums are short and much of the time is writing,
# which a second program on the same multiprocessor can fill.
BLOCKS = matmul.BLOCKS[1:]


def product(
    left,
    right,
    left_scale,
    zero,
    right_scale,
    *,
    transposed,
    left_bits,
    right_bits,
    interpret=False,
):
    """See the package. Raises InputError off a GPU unless interpreted, and without Triton."""
    if not interpret:
        gpu.require_gpu("attention_products")
    left = quantize_activation(left, left_scale, 0 if zero is None else zero, left_bits)
    right = quantize_activation(right, right_scale, 0, right_bits)
    return _by_head(left, right, zero, left_scale * right_scale, transposed, interpret)


def accumulate(left, right, zero, *, transposed, interpret=False):
    """int8 left [B,H,M,K], right [B,H,K,N] or, transposed, [B,H,N,K] -> int32 [B,H,M,N], by the
    same kernel; zero as in `xla.accumulate`. Raises InputError off a GPU unless interpreted."""
    if not interpret:
        gpu.require_gpu("attention_products")
    return _by_head(left, right, zero, None, transposed, interpret)


def _by_head(left, right, zero, scale, transposed, interpret):
    """`accumulate` for scale None, else its sums times scale [] or [B,1,1,1], in float32."""
    right = right if transposed else right.swapaxes(2, 3)
    images, heads, rows, contraction = left.shape
    columns = right.shape[2]
    groups = images * heads
    operands = {}
    if zero is not None:
        excess = zero.astype(jnp.int32) * jnp.sum(right, 3, dtype=jnp.int32, keepdims=True)
        operands["excess"] = excess.reshape(groups, columns)
    if scale is not None:
        each = jnp.broadcast_to(scale.astype(jnp.float32), (images, heads, 1, 1))
        operands["scale"] = each.reshape(groups)
    y = blocked_product(
        left.reshape(groups, rows, contraction),
        right.reshape(groups, columns, contraction),
        operands,
        interpret=interpret,
    )
    return y.reshape(images, heads, rows, columns)


def blocked_product(left, right, operands, *, interpret=False):
    """int8 left [G,M,K] and right [G,N,K] -> [G,M,N]: the sums over K, int32 without "scale",
    else float32. operands: "excess" int32 [G,N], taken off the sums, and "scale" float32 [G]."""
    groups, rows, contraction = left.shape
    columns = right.shape[1]
    result = jnp.float32 if "scale" in operands else jnp.int32
    if 0 in (groups, rows, columns, contraction):  # a grid cannot be empty; every sum is
        return jnp.zeros((groups, rows, columns), result)
    block, width = _block(groups, rows, columns)
    depth = _depth(contraction)
    deep = pl.cdiv(contraction, depth) * depth
    specs = {
        "left": pl.BlockSpec((None, block, deep), lambda i, j, g: (g, i, 0)),
        "right": pl.BlockSpec((None, width, deep), lambda i, j, g: (g, j, 0)),
        "excess": pl.BlockSpec((None, width), lambda i, j, g: (g, j)),
        "scale": pl.BlockSpec((1,), lambda i, j, g: (g,)),
    }
    arrays = {"left": left, "right": right} | operands
    return pl.pallas_call(
        partial(_kernel, names=tuple(arrays), sizes=(rows, columns, contraction), depth=depth),
        out_shape=jax.ShapeDtypeStruct((groups, rows, columns), result),
        grid=(pl.cdiv(rows, block), pl.cdiv(columns, width), groups),
        in_specs=[specs[name] for name in arrays],
        out_specs=pl.BlockSpec((None, block, width), lambda i, j, g: (g, i, j)),
        compiler_params=gpu.triton().CompilerParams(
            num_warps=8 if block * width >= 128 * 128 else 4, num_stages=3
        ),
        interpret=interpret,
        name="product_int8_w8",
    )(*arrays.values())


def _kernel(*refs, names, sizes, depth):
    """refs: `names`, then the output [m,n]; sizes: all rows, columns and K."""
    ref, y_ref = dict(zip(names, refs, strict=False)), refs[-1]
    rows, columns, contraction = sizes
    block, width = y_ref.shape
    row_mask = gpu.inside(pl.program_id(0) * block, block, rows)
    column_mask = gpu.inside(pl.program_id(1) * width, width, columns)

    def step(i, total):
        span = pl.ds(i * depth, depth)
        within = gpu.inside(i * depth, depth, contraction)
        left = gpu.load(ref["left"].at[:, span], gpu.both(row_mask, within))
        right = gpu.load(ref["right"].at[:, span], gpu.both(column_mask, within))
        return total + lax.dot_general(
            left, right, matmul.ALONG_K, preferred_element_type=jnp.int32
        )

    zeros = jnp.zeros((block, width), jnp.int32)
    total = lax.fori_loop(0, pl.cdiv(contraction, depth), step, zeros)
    if "excess" in ref:
        total -= gpu.load(ref["excess"].at[:], column_mask)[None, :]
    if "scale" in ref:
        total = total.astype(jnp.float32) * ref["scale"][0]
    gpu.store(y_ref.at[:, :], total, gpu.both(row_mask, column_mask))


def _block(groups: int, rows: int, columns: int) -> tuple[int, int]:
    """The largest block that is no taller or wider than it need be and leaves enough programs."""
    tall = max(gpu.LEAST_ROWS, gpu.power_of_two(rows))
    wide = max(gpu.LEAST_DEPTH, gpu.power_of_two(columns))
    fitting = [(m, n) for m, n in BLOCKS if m <= tall and n <= wide] or BLOCKS[-1:]
    programs = {(m, n): groups * pl.cdiv(rows, m) * pl.cdiv(columns, n) for m, n in fitting}
    enough = [pair for pair, count in programs.items() if count >= gpu.ENOUGH_PROGRAMS]
    return enough[0] if enough else fitting[-1]


def _depth(contraction: int) -> int:
    """Of K at a time: what pads it least, and of these the most. Heads of 72 take 3 steps of 32."""
    return min(matmul.DEPTHS, key=lambda depth: (pl.cdiv(contraction, depth) * depth, -depth))


interpreted = partial(product, interpret=True)
