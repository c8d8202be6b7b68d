"""Centred where it is multiplied: no centred copy is written.

The mean over samples is XLA's, one reading of x; the Triton kernel is a second one. A program takes
one tile of the N x N sum over one part of the features. Parts are what keeps a GPU busy when
samples are few; their sums are added after it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mpqdiff.kernels import gpu

TILE = 64
SLICE = 32  # features of a step
LEAST_STEPS = 16  # of a part, for its sum to be worth writing


def _kernel(x_ref, other_ref, mean_ref, gram_ref, rows_ref, *, samples: int, features: int):
    tile, part = x_ref.shape
    first = pl.program_id(2) * part
    row_mask = gpu.inside(pl.program_id(0) * tile, tile, samples)
    other_mask = gpu.inside(pl.program_id(1) * tile, tile, samples)

    def step(i, sums):
        total, rows = sums
        span = pl.ds(i * SLICE, SLICE)
        within = gpu.inside(first + i * SLICE, SLICE, features)
        mean = gpu.load(mean_ref.at[span], within)[None, :]

        def centred(ref, mask):
            mask = gpu.both(mask, within)
            x = gpu.load(ref.at[:, span], mask).astype(jnp.float32)
            return x if mask is None else jnp.where(mask, x, 0.0), mask

        x, _ = centred(x_ref, row_mask)
        other, _ = centred(other_ref, other_mask)
        total += lax.dot_general(
            x - mean,
            other - mean,
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return total, rows + jnp.sum(x * mean, axis=1)

    zeros = jnp.zeros((tile, tile), jnp.float32), jnp.zeros(tile, jnp.float32)
    total, rows = lax.fori_loop(0, part // SLICE, step, zeros)
    gpu.store(gram_ref.at[:, :], total, gpu.both(row_mask, other_mask))
    gpu.store(rows_ref.at[:], rows, row_mask)


def _part(samples: int, features: int) -> int:
    """Features of one program: as few as keep a GPU busy, a multiple of SLICE."""
    tiles = pl.cdiv(samples, TILE) ** 2
    steps = pl.cdiv(features, SLICE)
    parts = max(1, min(pl.cdiv(gpu.ENOUGH_PROGRAMS, tiles), steps // LEAST_STEPS))
    return pl.cdiv(steps, parts) * SLICE


def gram(x, *, interpret=False):
    """x [N,F] -> ([N,N], [N]); see the package.

    Raises InputError off a GPU unless interpreted, and without Triton.
    """
    if not interpret:
        gpu.require_gpu("gram")
    samples, features = x.shape
    part = _part(samples, features)
    tiles, parts = pl.cdiv(samples, TILE), pl.cdiv(features, part)
    mean = jnp.mean(x, axis=0, dtype=jnp.float32)
    total, rows = pl.pallas_call(
        partial(_kernel, samples=samples, features=features),
        out_shape=(
            jax.ShapeDtypeStruct((parts, samples, samples), jnp.float32),
            jax.ShapeDtypeStruct((parts, tiles, samples), jnp.float32),
        ),
        grid=(tiles, tiles, parts),
        in_specs=[
            pl.BlockSpec((TILE, part), lambda i, j, k: (i, k)),
            pl.BlockSpec((TILE, part), lambda i, j, k: (j, k)),
            pl.BlockSpec((part,), lambda i, j, k: (k,)),
        ],
        out_specs=(
            pl.BlockSpec((None, TILE, TILE), lambda i, j, k: (k, i, j)),
            pl.BlockSpec((None, None, TILE), lambda i, j, k: (k, j, i)),
        ),
        compiler_params=gpu.triton().CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="gram",
    )(x, x, mean)
    # Every column of tiles has the same row sums.
    return total.sum(axis=0), samples * rows[:, 0].sum(axis=0)


interpreted = partial(gram, interpret=True)
