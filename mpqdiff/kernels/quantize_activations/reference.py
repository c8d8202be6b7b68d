"""The definition, and the scale that other operations take from it."""

import jax.numpy as jnp
import numpy as np

from mpqdiff.quantize.numerics import qmax

_TINY = np.finfo(np.float32).tiny


def token_scale(x, bits):
    """max |x_k| / qmax over the finite entries of each token: x [..., K] -> float32 [..., 1].

    1 where that is zero, or too small to have a reciprocal. The division is a product with the
    float32 reciprocal of qmax, as everywhere (`quantize.numerics`).
    """
    return scale_from(x, jnp.float32(1) / jnp.float32(qmax(bits)))


def scale_from(x, step):
    """`token_scale` given step = 1 / qmax, for kernels that are handed it."""
    size = jnp.abs(x.astype(jnp.float32))
    finite = jnp.where(size < jnp.inf, size, 0.0)
    scale = jnp.max(finite, axis=-1, keepdims=True, initial=0.0) * step
    return jnp.where(scale < _TINY, 1.0, scale)


def quantize_activations(x, *, bits):
    """See the package."""
    limit, scale = qmax(bits), token_scale(x, bits)
    steps = jnp.round(x.astype(jnp.float32) * (1.0 / scale))
    steps = jnp.where(jnp.isnan(steps), 0.0, steps)
    return jnp.clip(steps, -limit - 1, limit).astype(jnp.int8), scale
