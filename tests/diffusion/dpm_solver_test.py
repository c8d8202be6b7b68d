"""DPM-Solver++(2M): algorithm 2 as printed, its order, and where it is of first order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.denoiser import Prediction
from mpqdiff.diffusion.ddim import ddim
from mpqdiff.diffusion.dpm_solver import dpm_solver
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.errors import InputError

F = 100
ABAR = alphas_cumprod("linear", F).astype(np.float64)
MEAN, SPREAD = 0.3, 0.25


def network(params, x_t, t, cond):
    """Something nonlinear in all of its inputs."""
    bias = cond[:, None, None, None] * 0.1
    return Prediction(jnp.tanh(params * x_t + bias) * (1.0 + 0.01 * t))


def plain_dpm_solver(x, labels, timesteps, *, clip):
    """Algorithm 2 in its own words (D from r and both predictions), then the step to sigma 0."""
    alpha, sigma = np.sqrt(ABAR[timesteps]), np.sqrt(1 - ABAR[timesteps])
    lam = np.log(alpha) - np.log(sigma)

    def image(x, i):
        eps = np.tanh(0.5 * x + labels[:, None, None, None] * 0.1) * (1.0 + 0.01 * timesteps[i])
        x_0 = (x - sigma[i] * eps) / alpha[i]
        return np.clip(x_0, -1, 1) if clip else x_0

    inputs, previous = [x], None
    for i in range(1, len(timesteps)):
        h, now = lam[i] - lam[i - 1], image(x, i - 1)
        if previous is None:
            d = now
        else:
            r = (lam[i - 1] - lam[i - 2]) / h
            d = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * previous
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * (np.exp(-h) - 1) * d
        inputs.append(x)
        previous = now
    return image(x, len(timesteps) - 1), np.stack(inputs)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    "timesteps", [[99], [99, 0], [80, 79, 31, 2], list(range(99, -1, -1))], ids=len
)
def test_scan_equals_the_printed_algorithm(timesteps, clip):
    x, labels = np.random.default_rng(0).normal(size=(2, 3, 3, 1)), np.array([0, 2])
    expected, inputs = plain_dpm_solver(x, labels, timesteps, clip=clip)
    with jax.enable_x64(True):
        x_0, x_ts = dpm_solver(
            network,
            0.5,
            jnp.asarray(x),
            jnp.asarray(labels),
            timesteps=np.array(timesteps),
            alphas_cumprod=ABAR,
            clip=clip,
            trajectory=True,
        )
        assert x_0.dtype == jnp.float64
    np.testing.assert_allclose(x_0, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(x_ts, inputs, rtol=1e-9, atol=1e-9)


def path_error(sampler, timesteps, abar):
    """Largest error of x at the last kept timestep against the exact path from the same noise.

    The data are N(MEAN, SPREAD), whose noise is known and whose path is a straight scaling:
    (x_t - sqrt(abar_t) MEAN) / sd(x_t) is constant.
    """
    x = np.random.default_rng(1).normal(size=(1, 4, 4, 1))
    with jax.enable_x64(True):
        table = jnp.asarray(abar)

        def denoise(params, x_t, t, cond):
            a = table[t]
            return Prediction(jnp.sqrt(1 - a) * (x_t - jnp.sqrt(a) * MEAN) / (a * SPREAD + 1 - a))

        _, x_ts = sampler(
            denoise,
            None,
            jnp.asarray(x),
            None,
            timesteps=timesteps,
            alphas_cumprod=abar,
            clip=False,
            trajectory=True,
        )
    first, last = abar[timesteps[0]], abar[timesteps[-1]]
    scale = np.sqrt((last * SPREAD + 1 - last) / (first * SPREAD + 1 - first))
    exact = np.sqrt(last) * MEAN + (x - np.sqrt(first) * MEAN) * scale
    return np.abs(np.asarray(x_ts[-1]) - exact).max()


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver, 2)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(sampler, order):
    """On steps even in log-SNR; and on the training schedule's own, down to t = 200."""
    even = 1 / (1 + np.exp(-2 * np.linspace(2.5, -2.5, 1025)))
    linear = alphas_cumprod("linear", 1000).astype(np.float64)
    for abar, grid in (
        (even, [np.linspace(1024, 0, count + 1) for count in (32, 64, 128)]),
        (linear, [np.linspace(840, 200, count + 1) for count in (40, 80, 160)]),
    ):
        errors = [path_error(sampler, steps.astype(np.int32), abar) for steps in grid]
        ratios = np.array(errors[:-1]) / np.array(errors[1:])
        assert (np.abs(np.log2(ratios) - order) < 0.15).all(), (errors, ratios)


def test_two_steps_are_those_of_ddim():
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 1))
    arguments = {"timesteps": np.array([70, 20]), "alphas_cumprod": ABAR}
    with jax.enable_x64(True):
        inputs = (network, 0.5, jnp.asarray(x), jnp.array([0, 2]))
        np.testing.assert_allclose(
            dpm_solver(*inputs, **arguments), ddim(*inputs, **arguments), rtol=1e-12
        )


def run(**changes):
    arguments = {"timesteps": np.array([9, 4, 0]), "alphas_cumprod": ABAR, **changes}
    return dpm_solver(network, 0.5, jnp.ones((1, 2, 2, 1)), jnp.array([0]), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": 0.5}, "eta=0.5"),
        ({"timesteps": [0, 9]}, "strictly descending"),
        ({"timesteps": [3, -1]}, r"0\.\.99"),
        ({"alphas_cumprod": np.linspace(1.0, 0.1, F)}, "neither included"),
    ],
)
def test_unusable_inputs(changes, message):
    with pytest.raises(InputError, match=message):
        run(**changes)


def test_keys_change_nothing():
    np.testing.assert_array_equal(run(), run(keys=jax.random.split(jax.random.key(3), 2)))
