"""The forward process and the conversions between eps and x_0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.diffusion.process import eps_from_x_0, q_sample, snr, x_0_from_eps
from mpqdiff.diffusion.schedule import alphas_cumprod

ABAR = alphas_cumprod("linear", 100)


def pair(seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=(4, 3, 3, 2)), jnp.float32) for _ in range(2))


@pytest.mark.parametrize("t", [0, 40, 99])
def test_q_sample_is_equation_four(t):
    x_0, eps = pair()
    abar = float(ABAR[t])
    expected = abar**0.5 * np.asarray(x_0) + (1 - abar) ** 0.5 * np.asarray(eps)
    np.testing.assert_allclose(q_sample(x_0, t, eps, ABAR), expected, rtol=1e-5, atol=1e-6)


def test_one_timestep_per_sample_equals_sample_by_sample():
    x_0, eps = pair()
    t = jnp.array([0, 7, 50, 99])
    together = q_sample(x_0, t, eps, ABAR)
    for i in range(4):
        np.testing.assert_allclose(
            together[i], q_sample(x_0[i : i + 1], int(t[i]), eps[i : i + 1], ABAR)[0], rtol=1e-6
        )


@pytest.mark.parametrize("t", [3, np.array([0, 7, 50, 99])])
def test_round_trips(t):
    with jax.enable_x64(True):
        x_0, eps = (x.astype(jnp.float64) for x in pair())
        abar = ABAR.astype(np.float64)
        x_t = q_sample(x_0, t, eps, abar)
        np.testing.assert_allclose(x_0_from_eps(x_t, t, eps, abar), x_0, atol=1e-12)
        np.testing.assert_allclose(eps_from_x_0(x_t, t, x_0, abar), eps, atol=1e-12)


def test_snr_is_signal_over_noise_power():
    np.testing.assert_allclose(snr(np.float32([0.5, 0.8, 0.1])), [1.0, 4.0, 1 / 9], rtol=1e-6)
