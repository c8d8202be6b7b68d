"""DDIM against a plain loop in float64, and the contract of its inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.denoiser import Prediction
from mpqdiff.diffusion.ddim import ddim
from mpqdiff.diffusion.process import q_sample
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.errors import InputError

F = 100
ABAR = alphas_cumprod("linear", F)
SUBSETS = [[99], [99, 0], [80, 79, 31, 2], list(range(99, -1, -1)), [50, 49]]


def network(params, x_t, t, cond):
    """Something nonlinear in all of its inputs."""
    bias = cond[:, None, None, None] * 0.1
    return Prediction(jnp.tanh(params * x_t + bias) * (1.0 + 0.01 * t))


def noise(shape=(2, 3, 3, 1), seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def plain_ddim(x, labels, timesteps, *, eta=0.0, clip=True, draws=None):
    """Equation 12 step by step on NumPy float64; `draws` is the noise of each step."""
    abar = ABAR.astype(np.float64)
    inputs = []
    for index, t in enumerate(timesteps):
        inputs.append(x)
        eps = np.tanh(0.5 * x + labels[:, None, None, None] * 0.1) * (1.0 + 0.01 * t)
        a = abar[t]
        b = abar[timesteps[index + 1]] if index + 1 < len(timesteps) else 1.0
        x_0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        if clip:
            x_0 = np.clip(x_0, -1, 1)
            eps = (x - np.sqrt(a) * x_0) / np.sqrt(1 - a)
        sigma = eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
        x = np.sqrt(b) * x_0 + np.sqrt(1 - b - sigma**2) * eps
        if draws is not None:
            x = x + sigma * draws[index]
    return x, np.stack(inputs)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("timesteps", SUBSETS, ids=len)
def test_scan_equals_the_plain_loop(timesteps, clip):
    x, labels = noise(), np.array([0, 2])
    expected, inputs = plain_ddim(x, labels, timesteps, clip=clip)
    with jax.enable_x64(True):
        x_0, x_ts = ddim(
            network,
            0.5,
            jnp.asarray(x),
            jnp.asarray(labels),
            timesteps=np.array(timesteps),
            alphas_cumprod=ABAR.astype(np.float64),
            clip=clip,
            trajectory=True,
        )
        assert x_0.dtype == jnp.float64
    np.testing.assert_allclose(x_0, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(x_ts, inputs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_noisy_steps_equal_the_plain_loop_fed_the_same_draws(eta):
    timesteps, x, labels = [90, 60, 20, 1], noise(), np.array([0, 2])
    keys = jax.random.split(jax.random.key(7), len(x))
    with jax.enable_x64(True):
        draws = [
            np.stack([jax.random.normal(jax.random.fold_in(key, i), x.shape[1:]) for key in keys])
            for i in range(4)
        ]
        got = ddim(
            network,
            0.5,
            jnp.asarray(x),
            jnp.asarray(labels),
            timesteps=np.array(timesteps),
            alphas_cumprod=ABAR.astype(np.float64),
            keys=keys,
            eta=eta,
        )
    expected, _ = plain_ddim(x, labels, timesteps, eta=eta, draws=draws)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


def test_full_ddpm_noise_stays_finite_on_every_schedule():
    for name in ("linear", "scaled_linear", "cosine"):
        out = ddim(
            network,
            0.5,
            jnp.asarray(noise(), jnp.float32),
            jnp.array([0, 2]),
            timesteps=np.arange(F)[::-1],
            alphas_cumprod=alphas_cumprod(name, F),
            keys=jax.random.split(jax.random.key(0), 2),
            eta=1.0,
        )
        assert np.isfinite(out).all(), name


def test_full_ddpm_noise_stays_finite_over_a_wide_step():
    """1 - abar_s - sigma^2 is 0 there but for rounding, which makes it negative."""
    out = ddim(
        network,
        0.5,
        jnp.asarray(noise(), jnp.float32),
        jnp.array([0, 2]),
        timesteps=np.array([999, 3]),
        alphas_cumprod=alphas_cumprod("linear", 1000),
        keys=jax.random.split(jax.random.key(0), 2),
        eta=1.0,
    )
    assert np.isfinite(out).all()


@pytest.mark.parametrize("timesteps", SUBSETS, ids=len)
def test_the_true_noise_recovers_the_image(timesteps):
    x_0 = np.clip(noise(), -1, 1)
    with jax.enable_x64(True):
        eps, abar = jnp.asarray(noise(seed=1)), ABAR.astype(np.float64)
        got = ddim(
            lambda params, x_t, t, cond: Prediction(eps),
            None,
            q_sample(jnp.asarray(x_0), timesteps[0], eps, abar),
            None,
            timesteps=np.array(timesteps),
            alphas_cumprod=abar,
        )
    np.testing.assert_allclose(got, x_0, atol=1e-8)


def run(**changes):
    arguments = {"timesteps": np.array([9, 0]), "alphas_cumprod": ABAR, **changes}
    return ddim(network, 0.5, jnp.ones((1, 2, 2, 1)), jnp.array([0]), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": 0.5}, "needs a key"),
        ({"eta": -0.1}, "eta=-0.1"),
        ({"eta": 1.5, "keys": jax.random.split(jax.random.key(0), 1)}, "eta=1.5"),
        ({"timesteps": [0, 9]}, "strictly descending"),
        ({"timesteps": [9, 9]}, "strictly descending"),
        ({"timesteps": []}, "strictly descending"),
        ({"timesteps": [F]}, r"0\.\.99"),
        ({"timesteps": [3, -1]}, r"0\.\.99"),
    ],
)
def test_unusable_inputs(changes, message):
    with pytest.raises(InputError, match=message):
        run(**changes)


def test_a_key_changes_nothing_without_noise():
    np.testing.assert_array_equal(run(), run(keys=jax.random.split(jax.random.key(3), 2)))
