"""The definition."""

import jax.numpy as jnp
from jax.lax import Precision


def gram(x):
    """x [N,F] -> ([N,N], [N]); see the package."""
    x = x.astype(jnp.float32)
    mean = x.mean(axis=0)
    centred = x - mean
    total = jnp.matmul(centred, centred.T, precision=Precision.HIGHEST)
    return total, x.shape[0] * jnp.matmul(x, mean, precision=Precision.HIGHEST)
