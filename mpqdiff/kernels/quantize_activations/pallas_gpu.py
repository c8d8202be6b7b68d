"""A few tokens to a Triton program, read twice: for their largest magnitude, then to be rounded.

The second reading finds a token in cache; only integers and scales are written.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mpqdiff.kernels import gpu
from mpqdiff.kernels.quantize_activations.reference import scale_from
from mpqdiff.quantize.numerics import qmax

VALUES = 4096  # of one step of a program: 32 a thread
WIDEST = 2048


def _kernel(x_ref, limits_ref, q_ref, scale_ref, *, rows: int, contraction: int, width: int):
    block = x_ref.shape[0]
    step, low, high = (limits_ref[i] for i in range(3))
    below = gpu.inside(pl.program_id(0) * block, block, rows)

    def columns(i):
        first = i * width
        return pl.ds(first, width), gpu.both(below, gpu.inside(first, width, contraction))

    def largest(i, found):
        span, mask = columns(i)
        size = jnp.abs(gpu.load(x_ref.at[:, span], mask).astype(jnp.float32))
        return jnp.maximum(found, jnp.max(jnp.where(size < jnp.inf, size, 0.0), axis=1))

    def write(i, scale):
        span, mask = columns(i)
        x = gpu.load(x_ref.at[:, span], mask)
        q = gpu.rounded(x, (1.0 / scale)[:, None], low, high, jnp.float32(0))
        gpu.store(q_ref.at[:, span], q, mask)
        return scale

    count = pl.cdiv(contraction, width)
    found = lax.fori_loop(0, count, largest, jnp.zeros(block, jnp.float32))
    scale = scale_from(found[:, None], step)[:, 0]
    gpu.store(scale_ref.at[:], scale, below)
    lax.fori_loop(0, count, write, scale)


def quantize_activations(x, *, bits, interpret=False):
    """See the package. Raises InputError off a GPU unless interpreted, and without Triton."""
    if not interpret:
        gpu.require_gpu("quantize_activations")
    flat = x.reshape(-1, x.shape[-1])
    rows, contraction = flat.shape
    if not flat.size:
        return jnp.zeros(x.shape, jnp.int8), jnp.ones((*x.shape[:-1], 1), jnp.float32)
    limit = jnp.float32(qmax(bits))
    width = min(WIDEST, gpu.power_of_two(contraction))
    block = max(1, VALUES // width)
    whole = pl.BlockSpec((block, pl.cdiv(contraction, width) * width), lambda i: (i, 0))
    qvalue, scale = pl.pallas_call(
        partial(_kernel, rows=rows, contraction=contraction, width=width),
        out_shape=(
            jax.ShapeDtypeStruct(flat.shape, jnp.int8),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ),
        grid=(pl.cdiv(rows, block),),
        in_specs=[whole, pl.BlockSpec((3,), lambda i: (0,))],
        out_specs=(whole, pl.BlockSpec((block,), lambda i: (i,))),
        compiler_params=gpu.triton().CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="quantize_activations",
    )(flat, jnp.stack([1.0 / limit, -limit - 1.0, limit]))
    return qvalue.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)


interpreted = partial(quantize_activations, interpret=True)
