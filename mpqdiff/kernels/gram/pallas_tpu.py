"""Centred and multiplied where it lies: x is read once, and no centred copy is ever written.

The grid runs over slices of features; the N x N sum stays in vector memory until the last one.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mpqdiff.errors import InputError
from mpqdiff.kernels import tpu

MAX_SAMPLES = 1536  # the float32 sum, twice, beside one slice of features
SLICES = (2048, 1024, 512, 256, 128)


def _kernel(x_ref, gram_ref, rows_ref, *, features: int):
    slice_ = x_ref.shape[1]
    first = pl.program_id(0) * slice_

    @pl.when(first == 0)
    def _():
        gram_ref[...] = jnp.zeros_like(gram_ref)
        rows_ref[...] = jnp.zeros_like(rows_ref)

    column = first + lax.broadcasted_iota(jnp.int32, x_ref.shape, 1)
    # Beyond the last feature a block holds anything, NaN too.
    x = jnp.where(column < features, x_ref[...].astype(jnp.float32), 0.0)
    mean = jnp.mean(x, axis=0, keepdims=True)
    centred = x - mean
    gram_ref[...] += lax.dot_general(
        centred,
        centred,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    rows_ref[...] += x.shape[0] * jnp.sum(x * mean, axis=1, keepdims=True)


def _slice(samples: int, features: int) -> int:
    """Features at a time: all of few, else the most whose float32 copies fit beside the sum."""
    if features <= SLICES[-1]:
        return features
    left = tpu.VMEM_BUDGET - 8 * samples * tpu.round_up(samples, tpu.LANES)
    fitting = [width for width in SLICES if 16 * samples * width <= left]
    return fitting[0] if fitting else SLICES[-1]


def gram(x, *, interpret=False):
    """x [N,F] -> ([N,N], [N]); see the package.

    Raises InputError above MAX_SAMPLES, and off a TPU unless interpreted.
    """
    if not interpret:
        tpu.require_tpu("gram")
    samples, features = x.shape
    if samples > MAX_SAMPLES:
        raise InputError(
            f"gram: {samples} samples; the TPU kernel holds the sum of at most {MAX_SAMPLES} in "
            "vector memory: take implementation 'xla', or fewer calibration samples"
        )
    width = _slice(samples, features)
    total, rows = pl.pallas_call(
        partial(_kernel, features=features),
        out_shape=(
            jax.ShapeDtypeStruct((samples, samples), jnp.float32),
            jax.ShapeDtypeStruct((samples, 1), jnp.float32),
        ),
        grid=(pl.cdiv(features, width),),
        in_specs=[pl.BlockSpec((samples, width), lambda i: (0, i))],
        out_specs=(
            pl.BlockSpec((samples, samples), lambda i: (0, 0)),
            pl.BlockSpec((samples, 1), lambda i: (0, 0)),
        ),
        compiler_params=tpu.compiler_params("arbitrary"),
        interpret=interpret,
        name="gram",
    )(x)
    return total, rows[:, 0]


interpreted = partial(gram, interpret=True)
