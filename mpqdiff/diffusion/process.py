"""Forward process and the conversions between eps and x_0 (Ho et al. 2020, eqs. 4 and 15).

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
"""

import jax.numpy as jnp


def _at(table, t, x):
    """`table[t]` with trailing axes, so that it scales `x` for a scalar t or one t per sample."""
    value = jnp.asarray(table)[t]
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value


def q_sample(x_0, t, eps, alphas_cumprod):
    """Noise `x_0` to step `t`. x_0, eps [B,H,W,C]; t [] or [B]; returns x_t [B,H,W,C]."""
    abar = _at(alphas_cumprod, t, x_0)
    return jnp.sqrt(abar) * x_0 + jnp.sqrt(1.0 - abar) * eps


def x_0_from_eps(x_t, t, eps, alphas_cumprod):
    """x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)."""
    abar = _at(alphas_cumprod, t, x_t)
    return (x_t - jnp.sqrt(1.0 - abar) * eps) / jnp.sqrt(abar)


def eps_from_x_0(x_t, t, x_0, alphas_cumprod):
    """The inverse of `x_0_from_eps` in its third argument."""
    abar = _at(alphas_cumprod, t, x_t)
    return (x_t - jnp.sqrt(abar) * x_0) / jnp.sqrt(1.0 - abar)


def snr(alphas_cumprod):
    """Signal-to-noise ratio abar / (1 - abar), [F] (Kingma et al. 2021)."""
    abar = jnp.asarray(alphas_cumprod)
    return abar / (1.0 - abar)
