"""What holds for every sampler: one scan, per-image noise, the data's moments in the limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.denoiser import Prediction
from mpqdiff.diffusion.samplers import (
    SAMPLERS,
    draws_noise,
    initial_noise,
    step_keys,
    uniform_timesteps,
)
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.errors import InputError

F = 1000
ABAR = alphas_cumprod("linear", F)
SHAPE = (3, 3, 1)
# Every sampler as registered, and DDIM as noisy as DDPM.
RUNS = [*((name, 0.0) for name in SAMPLERS), ("ddim", 1.0)]


def network(params, x_t, t, cond):
    """Something nonlinear in all of its inputs, with a variance."""
    eps = jnp.tanh(params * x_t + cond[:, None, None, None] * 0.1) * (1.0 + 1e-3 * t)
    return Prediction(eps, jnp.sin(3.0 * x_t))


def sample(name, eta, x_T, labels, keys, timesteps, denoise=network, **changes):
    arguments = {"timesteps": timesteps, "alphas_cumprod": ABAR, "keys": keys, "eta": eta}
    return SAMPLERS[name](denoise, 0.5, x_T, labels, **arguments | changes)


@pytest.mark.parametrize(("name", "eta"), RUNS)
def test_an_image_is_the_same_in_every_batch(name, eta):
    timesteps = np.array([999, 640, 310, 20])

    def images(start, count):
        keys = step_keys(4, start, count) if draws_noise(name, eta) else None
        labels = jnp.arange(start, start + count) % 3
        return sample(
            name, eta, initial_noise(4, start, count, SHAPE), labels, keys, timesteps, clip=False
        )

    whole = np.asarray(images(0, 5))
    parts = np.concatenate([images(0, 2), images(2, 3)])
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-6)
    assert len(np.unique(whole[:, 1, 1, 0])) == 5


@pytest.mark.parametrize(("name", "eta"), RUNS)
def test_the_program_does_not_grow_with_the_steps(name, eta):
    """One scan; the network is traced as often, the program is as long, for 3 steps as for 50."""
    found = []
    for count in (3, 50):
        calls = []

        def counted(params, x_t, t, cond, calls=calls):
            calls.append(jnp.shape(t))
            return network(params, x_t, t, cond)

        def run(x_T, keys, counted=counted, count=count):
            steps = uniform_timesteps(F, count)
            return sample(name, eta, x_T, jnp.array([0, 2]), keys, steps, denoise=counted)

        program = jax.make_jaxpr(run)(initial_noise(0, 0, 2, SHAPE), step_keys(0, 0, 2))
        text = str(program)
        assert text.count("scan[") == 1 and f"length={count}" in text
        assert set(calls) == {()}
        found.append((len(calls), text.count("\n")))
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "eta"), RUNS)
def test_the_last_step_is_the_predicted_image_and_the_path_starts_at_the_noise(name, eta):
    x_T, labels, keys = initial_noise(0, 0, 2, SHAPE), jnp.array([0, 2]), step_keys(0, 0, 2)
    timesteps = np.array([900, 500, 120])
    x_0, x_ts = sample(name, eta, x_T, labels, keys, timesteps, trajectory=True, clip=False)
    assert x_ts.shape == (3, *x_T.shape)
    np.testing.assert_array_equal(x_ts[0], x_T)
    eps, a = network(0.5, x_ts[-1], 120, labels).eps, float(ABAR[120])
    np.testing.assert_allclose(
        x_0, (x_ts[-1] - (1 - a) ** 0.5 * eps) / a**0.5, rtol=1e-4, atol=1e-5
    )
    alone = sample(name, eta, x_T, labels, keys, timesteps, clip=False)
    np.testing.assert_allclose(alone, x_0, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "eta"), RUNS)
def test_keys_are_needed_exactly_where_noise_is_drawn(name, eta):
    x_T, labels, timesteps = initial_noise(0, 0, 2, SHAPE), jnp.array([0, 2]), np.array([900, 300])
    runs = [sample(name, eta, x_T, labels, step_keys(s, 0, 2), timesteps) for s in (1, 2)]
    assert draws_noise(name, eta) == (not np.array_equal(*runs))
    if draws_noise(name, eta):
        with pytest.raises(InputError, match="key per image"):
            sample(name, eta, x_T, labels, None, timesteps)
    else:
        np.testing.assert_array_equal(sample(name, eta, x_T, labels, None, timesteps), runs[0])


def test_an_unknown_sampler_is_named():
    with pytest.raises(InputError, match="'euler'; known: ddim, ddpm, ddpm_large, ddpm_learned"):
        draws_noise("euler", 0.0)


@pytest.mark.parametrize(("name", "eta"), RUNS)
def test_samples_reach_the_mean_and_variance_of_the_data_as_steps_grow(name, eta):
    """Data N(0.3, 0.25) with their true noise; `learned` in the middle of its two bounds.

    x_T is standardised, so that without noise the moments of x_0 are free of sampling error; with
    noise 32768 values leave an error of 0.003 in the mean and 0.002 in the variance.
    """
    mean, spread, table = 0.3, 0.25, jnp.asarray(ABAR)

    def denoise(params, x_t, t, cond):
        a = table[t]
        eps = jnp.sqrt(1 - a) * (x_t - jnp.sqrt(a) * mean) / (a * spread + 1 - a)
        return Prediction(eps, jnp.zeros_like(x_t))

    x_T = np.asarray(initial_noise(8, 0, 2, (64, 64, 4)), np.float64)
    x_T = jnp.asarray((x_T - x_T.mean()) / x_T.std(), jnp.float32)
    errors = []
    for count in (8, 32, 250):
        steps = uniform_timesteps(F, count)
        x_0 = sample(name, eta, x_T, None, step_keys(8, 0, 2), steps, denoise, clip=False)
        x_0 = np.asarray(x_0, np.float64)
        errors.append((abs(x_0.mean() - mean), abs(x_0.var() - spread)))
    assert errors[2][0] < 0.012 and errors[2][1] < 0.02, errors
    assert errors[0][1] > errors[1][1] > errors[2][1], errors
