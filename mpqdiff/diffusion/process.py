"""Forward process, and the conversions between eps, x_0 and v (Ho et al. 2020, eqs. 4 and 15).

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
v   = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0   (Salimans & Ho 2022, arXiv 2202.00512, section 4)
"""

import jax.numpy as jnp

from mpqdiff.denoiser import Denoise, Prediction
from mpqdiff.errors import unknown_name


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


def velocity(x_0, t, eps, alphas_cumprod):
    """v of an image and its noise: the target of a model that predicts v. All [B,H,W,C]."""
    abar = _at(alphas_cumprod, t, x_0)
    return jnp.sqrt(abar) * eps - jnp.sqrt(1.0 - abar) * x_0


def eps_from_v(x_t, t, v, alphas_cumprod):
    """eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t."""
    abar = _at(alphas_cumprod, t, x_t)
    return jnp.sqrt(abar) * v + jnp.sqrt(1.0 - abar) * x_t


def x_0_from_v(x_t, t, v, alphas_cumprod):
    """x_0 = sqrt(abar_t) x_t - sqrt(1 - abar_t) v."""
    abar = _at(alphas_cumprod, t, x_t)
    return jnp.sqrt(abar) * x_t - jnp.sqrt(1.0 - abar) * v


def _unchanged(x_t, t, eps, alphas_cumprod):
    return eps


# What a network may predict -> how that becomes eps.
PREDICTION_TYPES = {"eps": _unchanged, "x_0": eps_from_x_0, "v": eps_from_v}


def predict_eps(denoise: Denoise, prediction_type: str, alphas_cumprod) -> Denoise:
    """The `denoise` of a network whose output, in the field `eps`, is eps, x_0 or v.

    The conversions are affine in the output with weights that depend on t alone, so that guiding
    before or after them is the same. A sampler turns eps back into x_0: in float32 the way there
    and back costs about 1e-7 / sqrt(abar_t) of an x_0 near 1. Raises InputError for an unknown
    prediction type.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise unknown_name("prediction type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "eps":
        return denoise
    convert = PREDICTION_TYPES[prediction_type]

    def converted(params, x_t, t, cond) -> Prediction:
        out = denoise(params, x_t, t, cond)
        return Prediction(convert(x_t, t, out.eps, alphas_cumprod), out.log_variance)

    return converted


def snr(alphas_cumprod):
    """Signal-to-noise ratio abar / (1 - abar), [F] (Kingma et al. 2021)."""
    abar = jnp.asarray(alphas_cumprod)
    return abar / (1.0 - abar)
