"""Ancestral sampling: the posterior step by step, and the data each variance is right for."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.denoiser import Prediction
from mpqdiff.diffusion.ddpm import VARIANCES, ddpm
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.diffusion.steps import initial_noise, step_keys, step_noise
from mpqdiff.errors import InputError

F = 100
ABAR = alphas_cumprod("linear", F)
SUBSET = [95, 60, 30, 10, 2]


def network(params, x_t, t, cond):
    """Something nonlinear in all of its inputs; log_variance in and out of [-1, 1]."""
    eps = jnp.tanh(params * x_t + cond[:, None, None, None] * 0.1) * (1.0 + 0.01 * t)
    return Prediction(eps, jnp.sin(3.0 * x_t) * 1.2)


def plain_ddpm(x, labels, timesteps, draws, *, variance, clip):
    """Bayes' rule for x_s given x_t and x_0, on NumPy float64: no coefficient is shared."""
    abar = ABAR.astype(np.float64)
    inputs = []
    for index, t in enumerate(timesteps):
        inputs.append(x)
        eps = np.tanh(0.5 * x + labels[:, None, None, None] * 0.1) * (1.0 + 0.01 * t)
        x_0 = (x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t])
        if clip:
            x_0 = np.clip(x_0, -1, 1)
        if index + 1 == len(timesteps):
            return x_0, np.stack(inputs)
        b = abar[timesteps[index + 1]]
        alpha = abar[t] / b
        # Prior N(sqrt(b) x_0, 1 - b) of x_s; x_t is sqrt(alpha) x_s and noise of 1 - alpha.
        precision = 1 / (1 - b) + alpha / (1 - alpha)
        mean = (np.sqrt(b) * x_0 / (1 - b) + np.sqrt(alpha) * x / (1 - alpha)) / precision
        mix = {"small": 0.0, "large": 1.0, "learned": (1 + 1.2 * np.sin(3 * x)) / 2}[variance]
        spread = (1 - alpha) ** mix * (1 / precision) ** (1 - mix)
        x = mean + np.sqrt(spread) * draws[index]


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
def test_scan_equals_the_posterior_of_every_step(variance, clip):
    timesteps, labels = [99, 98, 60, 20, 1], np.array([0, 2])
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 1))
    keys = jax.random.split(jax.random.key(7), len(x))
    with jax.enable_x64(True):
        draws = [np.asarray(step_noise(keys, i, jnp.asarray(x))) for i in range(4)]
        x_0, x_ts = ddpm(
            network,
            0.5,
            jnp.asarray(x),
            jnp.asarray(labels),
            timesteps=np.array(timesteps),
            alphas_cumprod=ABAR.astype(np.float64),
            keys=keys,
            clip=clip,
            trajectory=True,
            variance=variance,
        )
        assert x_0.dtype == jnp.float64
    expected, inputs = plain_ddpm(x, labels, timesteps, draws, variance=variance, clip=clip)
    np.testing.assert_allclose(x_0, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(x_ts, inputs, rtol=1e-9, atol=1e-9)


def optimal_v(spread):
    """v [F] at the timesteps of SUBSET that gives the true posterior variance for N(mu, spread)."""
    abar = ABAR.astype(np.float64)
    table = np.zeros(F)
    for t, s in pairwise(SUBSET):
        beta = 1 - abar[t] / abar[s]
        low, high = np.log((1 - abar[s]) / (1 - abar[t]) * beta), np.log(beta)
        true = beta * (abar[s] * spread + 1 - abar[s]) / (abar[t] * spread + 1 - abar[t])
        table[t] = 2 * (np.log(true) - low) / (high - low) - 1
    assert np.abs(table).max() <= 1.0
    return jnp.asarray(table, jnp.float32)


@pytest.mark.parametrize(
    ("variance", "mean", "spread"),
    [("small", 0.4, 0.0), ("large", 0.0, 1.0), ("learned", 0.4, 0.25), ("learned", 0.2, 0.6)],
)
def test_five_steps_are_exact_for_the_data_that_the_variance_is_right_for(variance, mean, spread):
    """With the true noise and variance, x_t has the forward process's mean and variance at every
    kept timestep, however few there are: small for a point, large for a unit Gaussian, learned for
    what lies between. 65536 values: the tolerances are four standard errors."""
    v = optimal_v(spread) if variance == "learned" else jnp.zeros(F)
    table = jnp.asarray(ABAR)

    def denoise(params, x_t, t, cond):
        a = table[t]
        eps = jnp.sqrt(1 - a) * (x_t - jnp.sqrt(a) * mean) / (a * spread + 1 - a)
        return Prediction(eps, jnp.full_like(x_t, v[t]))

    a = ABAR[SUBSET].astype(np.float64)
    marginal = a * spread + 1 - a
    start = np.sqrt(a[0]) * mean + np.sqrt(marginal[0]) * initial_noise(3, 0, 4, (64, 64, 4))
    x_0, x_ts = ddpm(
        denoise,
        None,
        jnp.asarray(start, jnp.float32),
        None,
        timesteps=np.array(SUBSET),
        alphas_cumprod=ABAR,
        keys=step_keys(3, 0, 4),
        clip=False,
        trajectory=True,
        variance=variance,
    )
    x_ts = np.asarray(x_ts, np.float64).reshape(len(SUBSET), -1)
    error = 4 * np.sqrt(marginal / x_ts.shape[1])
    assert (np.abs(x_ts.mean(1) - np.sqrt(a) * mean) < error).all()
    np.testing.assert_allclose(x_ts.var(1), marginal, rtol=4 * np.sqrt(2 / x_ts.shape[1]))
    # The last step predicts x_0 without noise: the mean is that of the data.
    assert abs(float(x_0.mean()) - mean) < 4 * np.sqrt(max(spread, 1e-6) / x_0.size)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_the_full_schedule_stays_finite(variance, name):
    out = ddpm(
        network,
        0.5,
        initial_noise(0, 0, 2, (3, 3, 1)),
        jnp.array([0, 2]),
        timesteps=np.arange(F)[::-1],
        alphas_cumprod=alphas_cumprod(name, F),
        keys=step_keys(0, 0, 2),
        variance=variance,
    )
    assert np.isfinite(out).all() and np.abs(out).max() <= 1.0


def run(*, denoise=network, **changes):
    arguments = {"timesteps": np.array([9, 0]), "alphas_cumprod": ABAR, "keys": step_keys(0, 0, 1)}
    return ddpm(denoise, 0.5, jnp.ones((1, 2, 2, 1)), jnp.array([0]), **arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": None}, "needs a key"),
        ({"eta": 0.5}, "eta=0.5"),
        ({"variance": "fixed"}, "'fixed'; known: large, learned, small"),
        ({"timesteps": [0, 9]}, "strictly descending"),
        ({"timesteps": [F]}, r"0\.\.99"),
        (
            {"variance": "learned", "denoise": lambda params, x_t, t, cond: Prediction(x_t)},
            "predicts none",
        ),
    ],
)
def test_unusable_inputs(changes, message):
    with pytest.raises(InputError, match=message):
        run(**changes)


def test_one_step_is_the_predicted_image_and_needs_no_keys():
    once = run(timesteps=np.array([40]), keys=None)
    np.testing.assert_array_equal(once, run(timesteps=np.array([40])))
