"""The product as one Mosaic kernel, a matrix for each head of each image.

The grid runs over (images x heads), and within one over blocks of rows of the left operand; the
right one is brought in whole, once, so that no sum is split. Probabilities, which are the large
operand, come in float and are quantised in vector memory; queries, keys and values are quantised by
XLA while it moves their heads together. Nothing is padded outside: last blocks are partial, and
every other axis is whole in its block, however odd.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mpqdiff.errors import InputError
from mpqdiff.kernels import tpu
from mpqdiff.kernels.quantize_activations.pallas_tpu import rounded
from mpqdiff.quantize.numerics import qmax, quantize_activation

ROWS = (512, 256, 128)
FEWER_ROWS = (64, 32)
# Entries of the operand "numbers" for each image, or once for all: what quantises the left operand,
# and what scales the sums.
NUMBERS = ("reciprocal", "low", "high", "zero", "scale")


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
    """See the package.

    Raises InputError off a TPU unless interpreted, and where rows are too long for vector memory.
    """
    if not interpret:
        tpu.require_tpu("attention_products")
    right = quantize_activation(right, right_scale, 0, right_bits)
    point = jnp.int32(0) if zero is None else zero
    if transposed:  # axes of the left operand were moved, too
        left = quantize_activation(left, left_scale, point, left_bits)
    numbers = _numbers(left_scale, point, right_scale, left_bits)
    return blocked_product(
        left, right, numbers, corrected=zero is not None, transposed=transposed, interpret=interpret
    )


def accumulate(left, right, zero, *, transposed, interpret=False):
    """int8 left [B,H,M,K], right [B,H,K,N] or, transposed, [B,H,N,K] -> int32 [B,H,M,N], by the
    same kernel; zero as in `xla.accumulate`. Raises InputError off a TPU unless interpreted."""
    if not interpret:
        tpu.require_tpu("attention_products")
    one = jnp.float32(1)
    numbers = _numbers(one, jnp.int32(0) if zero is None else zero, one, 8)
    return blocked_product(
        left,
        right,
        numbers,
        corrected=zero is not None,
        transposed=transposed,
        result=jnp.int32,
        interpret=interpret,
    )


def _numbers(left_scale, zero, right_scale, bits):
    """float32 [5 images] or [5], entries of an image together (NUMBERS)."""
    limit = jnp.asarray(qmax(bits), jnp.float32)
    zero = zero.astype(jnp.float32)
    entries = [1.0 / left_scale, -limit - 1.0 - zero, limit - zero, zero, left_scale * right_scale]
    flat = [jnp.asarray(entry, jnp.float32).reshape(-1) for entry in entries]
    return jnp.stack(jnp.broadcast_arrays(*flat), axis=-1).reshape(-1)


def blocked_product(
    left, right, numbers, *, corrected, transposed, result=jnp.float32, interpret=False
):
    """left [B,H,M,K], float (quantised here) or int8, times int8 right, `numbers` as `_numbers`
    gives them -> [B,H,M,N]: scaled float32, or int32 sums; `corrected` for the zero point."""
    images, heads, rows, contraction = left.shape
    outputs = right.shape[2 if transposed else 3]
    shape = images, heads, rows, outputs
    if 0 in (*shape, contraction):  # a grid cannot be empty; every sum is
        return jnp.zeros(shape, result)
    groups = images * heads
    block = _rows(rows, contraction, outputs, left.dtype.itemsize)
    each = len(numbers) > len(NUMBERS)
    arrays = {
        "numbers": numbers,
        "left": left.reshape(groups, rows, contraction),
        "right": right.reshape(groups, *right.shape[2:]),
    }
    specs = {
        "numbers": pl.BlockSpec(memory_space=pltpu.SMEM),
        "left": pl.BlockSpec((1, block, contraction), lambda g, i: (g, i, 0)),
        "right": pl.BlockSpec((1, *right.shape[2:]), lambda g, i: (g, 0, 0)),
    }
    if corrected:
        colsum = jnp.sum(right, axis=3 if transposed else 2, dtype=jnp.int32)
        arrays["colsum"] = colsum.reshape(groups, 1, outputs)
        specs["colsum"] = pl.BlockSpec((1, 1, outputs), lambda g, i: (g, 0, 0))
    y = pl.pallas_call(
        partial(
            _kernel, names=tuple(specs), heads=heads if each else groups, transposed=transposed
        ),
        out_shape=jax.ShapeDtypeStruct((groups, rows, outputs), result),
        grid=(groups, pl.cdiv(rows, block)),
        in_specs=list(specs.values()),
        out_specs=pl.BlockSpec((1, block, outputs), lambda g, i: (g, i, 0)),
        compiler_params=tpu.compiler_params("parallel", "parallel"),
        interpret=interpret,
        name="product_int8_w8",
    )(*(arrays[name] for name in specs))
    return y.reshape(shape)


def _kernel(*refs, names, heads, transposed):
    """refs: `names`, then the output [1,m,N]; `heads` of the grid's groups share their numbers."""
    ref, y_ref = dict(zip(names, refs, strict=False)), refs[-1]
    # Not `//`: the sign that it asks for cannot be lowered without a TPU.
    first = lax.div(pl.program_id(0), heads) * len(NUMBERS)

    def number(name):
        return ref["numbers"][first + NUMBERS.index(name)]

    left = ref["left"][0]
    if left.dtype != jnp.int8:
        left = rounded(left, *(number(name) for name in NUMBERS[:4]))
    numbers = (((1,), (1 if transposed else 0,)), ((), ()))
    total = lax.dot_general(left, ref["right"][0], numbers, preferred_element_type=jnp.int32)
    if "colsum" in ref:
        total -= number("zero").astype(jnp.int32) * ref["colsum"][0]
    y_ref[0] = total if y_ref.dtype == jnp.int32 else total.astype(jnp.float32) * number("scale")


def _rows(rows, contraction, outputs, itemsize) -> int:
    """Rows at a time: all of few, else of ROWS that fit in VMEM those of least padding, the most.

    Raises InputError where not even the fewest do.
    """
    deep, wide = (tpu.round_up(size, tpu.LANES) for size in (contraction, outputs))
    # Operands come twice, one block moving while another is worked on; float steps on the way.
    one = deep * (2 * itemsize + 1 + (2 * 4 if itemsize > 1 else 0)) + wide * (2 + 2) * 4
    left = tpu.VMEM_BUDGET - 2 * max(deep * tpu.round_up(outputs, 32), wide * contraction)
    sizes = [size for size in (*ROWS, *FEWER_ROWS) if size * one <= left]
    fitting = [size for size in sizes if size in ROWS] or sizes[:1]
    if not fitting:
        raise InputError(
            f"{contraction} by {outputs} is too large a matrix for the TPU kernel, which holds "
            "whole rows in vector memory; take implementation 'xla'"
        )
    if rows <= fitting[0]:
        return rows
    return min(fitting, key=lambda size: (tpu.round_up(rows, size), -size))


interpreted = partial(product, interpret=True)
