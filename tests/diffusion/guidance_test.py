"""Classifier-free guidance against its formula, with the model called twice."""

import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.denoiser import Prediction
from mpqdiff.diffusion.guidance import guide

NULL = 9


def denoise(params, x_t, t, labels):
    t = jnp.broadcast_to(t, labels.shape)
    eps = params * x_t + (labels + 0.1 * t)[:, None, None, None]
    return Prediction(eps, 2.0 * eps)


@pytest.mark.parametrize("t", [5, np.array([5, 3, 1])])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_guided_noise_is_the_formula(scale, t):
    x_t = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 1)), jnp.float32)
    labels = jnp.array([0, 4, 2])
    out = guide(denoise, scale=scale, null=NULL)(0.7, x_t, t, labels)
    conditional = denoise(0.7, x_t, t, labels)
    unconditional = denoise(0.7, x_t, t, jnp.full_like(labels, NULL))
    expected = unconditional.eps + scale * (conditional.eps - unconditional.eps)
    np.testing.assert_allclose(out.eps, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.log_variance, conditional.log_variance, rtol=1e-6)


def test_scale_one_is_the_model_itself_at_one_call():
    assert guide(denoise, scale=1.0, null=NULL) is denoise


def test_without_variance_there_is_none():
    bare = lambda *args: Prediction(denoise(*args).eps)  # noqa: E731
    out = guide(bare, scale=2.0, null=NULL)(1.0, jnp.ones((1, 2, 2, 1)), 0, jnp.array([1]))
    assert out.log_variance is None
