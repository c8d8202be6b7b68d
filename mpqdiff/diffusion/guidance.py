"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, eq. 6)."""

import jax
import jax.numpy as jnp

from mpqdiff.denoiser import Denoise, Prediction


def guide(denoise: Denoise, *, scale: float, null) -> Denoise:
    """eps = eps_null + scale (eps_cond - eps_null); scale 1 is the conditional model itself.

    `null`: the condition of no condition, for one image: a label, or a pytree like `cond` without
    its leading axis. The two halves run as one batch of 2B. `log_variance` is the conditional
    one's.
    """
    if scale == 1.0:
        return denoise

    def guided(params, x_t, t, cond) -> Prediction:
        both = jax.tree.map(_beside, cond, null)
        t = jnp.concatenate([t, t]) if jnp.ndim(t) else t
        out = denoise(params, jnp.concatenate([x_t, x_t]), t, both)
        eps, eps_null = jnp.split(out.eps, 2)
        log_variance = out.log_variance
        if log_variance is not None:
            log_variance = jnp.split(log_variance, 2)[0]
        return Prediction(eps_null + scale * (eps - eps_null), log_variance)

    return guided


def _beside(cond, null):
    """cond [B,...] and B times null [...], one after the other."""
    null = jnp.broadcast_to(jnp.asarray(null, cond.dtype), cond.shape)
    return jnp.concatenate([cond, null])
