"""One pass over the tokens: whole rows in vector memory, reduced, scaled and rounded there."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mpqdiff.kernels import tpu
from mpqdiff.kernels.quantize_activations.reference import scale_from
from mpqdiff.quantize.numerics import qmax


def rounded(x, reciprocal, low, high, zero):
    """Inside a kernel: int8 of round(x reciprocal) saturated to [low, high], plus `zero`.

    x float [m,K]; the others float32, broadcastable, `low` and `high` already less `zero`.
    The integers are those of `numerics.quantize_activation`.
    """
    steps = x.astype(jnp.float32) * reciprocal
    steps = jnp.clip(jnp.where(steps == steps, steps, 0.0), low, high)
    return (jnp.round(steps) + zero).astype(jnp.int32).astype(jnp.int8)


def _kernel(x_ref, limits_ref, q_ref, scale_ref):
    step, low, high = (limits_ref[:, i : i + 1] for i in range(3))
    scale = scale_from(x_ref[...], step)
    scale_ref[...] = scale
    q_ref[...] = rounded(x_ref[...], 1.0 / scale, low, high, 0.0)


def _rows(rows: int, contraction: int, itemsize: int) -> int:
    """Rows at a time: all of few, else the most that fit in vector memory."""
    # Both ends twice, for one block to move while another is worked on, and the float32 steps.
    one = tpu.round_up(contraction, tpu.LANES) * (2 * itemsize + 2 + 3 * 4)
    most = max(32, min(256, tpu.VMEM_BUDGET // one // 32 * 32))
    return min(rows, most)


def quantize_activations(x, *, bits, interpret=False):
    """See the package. Raises InputError off a TPU unless interpreted."""
    if not interpret:
        tpu.require_tpu("quantize_activations")
    flat = x.reshape(-1, x.shape[-1])
    rows, contraction = flat.shape
    limit = jnp.float32(qmax(bits))
    limits = jnp.stack([1.0 / limit, -limit - 1.0, limit])[None]
    if not flat.size:
        return jnp.zeros(x.shape, jnp.int8), jnp.ones((*x.shape[:-1], 1), jnp.float32)
    block = _rows(rows, contraction, x.dtype.itemsize)
    whole = pl.BlockSpec((block, contraction), lambda i: (i, 0))
    qvalue, scale = pl.pallas_call(
        _kernel,
        out_shape=(
            jax.ShapeDtypeStruct(flat.shape, jnp.int8),
            jax.ShapeDtypeStruct((rows, 1), jnp.float32),
        ),
        grid=(pl.cdiv(rows, block),),
        in_specs=[whole, pl.BlockSpec((1, 3), lambda i: (0, 0))],
        out_specs=(whole, pl.BlockSpec((block, 1), lambda i: (i, 0))),
        compiler_params=tpu.compiler_params("parallel"),
        interpret=interpret,
        name="quantize_activations",
    )(flat, limits)
    return qvalue.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)


interpreted = partial(quantize_activations, interpret=True)
