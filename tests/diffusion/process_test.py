"""The forward process and the conversions between eps and x_0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.denoiser import Prediction
from mpqdiff.diffusion.guidance import guide
from mpqdiff.diffusion.process import (
    PREDICTION_TYPES,
    eps_from_v,
    eps_from_x_0,
    predict_eps,
    q_sample,
    snr,
    velocity,
    x_0_from_eps,
    x_0_from_v,
)
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.errors import InputError

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
        v = velocity(x_0, t, eps, abar)
        np.testing.assert_allclose(x_0_from_v(x_t, t, v, abar), x_0, atol=1e-12)
        np.testing.assert_allclose(eps_from_v(x_t, t, v, abar), eps, atol=1e-12)


def test_velocity_is_the_derivative_along_the_circle():
    """x = cos(phi) x_0 + sin(phi) eps with cos(phi)^2 = abar, and v = dx / dphi."""
    with jax.enable_x64(True):
        x_0, eps = (x.astype(jnp.float64) for x in pair())
        phi = np.arccos(np.sqrt(ABAR.astype(np.float64)))
        for t in (0, 40, 99):
            _, slope = jax.jvp(
                lambda angle: jnp.cos(angle) * x_0 + jnp.sin(angle) * eps, (phi[t],), (1.0,)
            )
            v = velocity(x_0, t, eps, ABAR.astype(np.float64))
            np.testing.assert_allclose(v, slope, atol=1e-12)


def predicting(prediction_type, x_0, eps, abar):
    """A network that knows the answer, and a variance that must pass through."""
    outputs = {
        "eps": lambda t: eps,
        "x_0": lambda t: x_0,
        "v": lambda t: velocity(x_0, t, eps, abar),
    }
    return lambda params, x_t, t, cond: Prediction(outputs[prediction_type](t), x_t)


@pytest.mark.parametrize("t", [3, np.array([0, 7, 50, 99])])
@pytest.mark.parametrize("prediction_type", sorted(PREDICTION_TYPES))
def test_every_prediction_type_becomes_the_noise(prediction_type, t):
    with jax.enable_x64(True):
        x_0, eps = (x.astype(jnp.float64) for x in pair())
        abar = ABAR.astype(np.float64)
        x_t = q_sample(x_0, t, eps, abar)
        denoise = predict_eps(predicting(prediction_type, x_0, eps, abar), prediction_type, abar)
        out = denoise(None, x_t, t, None)
        np.testing.assert_allclose(out.eps, eps, atol=1e-12)
        np.testing.assert_array_equal(out.log_variance, x_t)


@pytest.mark.parametrize("prediction_type", sorted(PREDICTION_TYPES))
def test_guiding_before_or_after_the_conversion_is_the_same(prediction_type):
    def network(params, x_t, t, labels):
        return Prediction(jnp.tanh(x_t + labels[:, None, None, None]))

    x_t, _ = pair()
    labels, options = jnp.arange(4), {"scale": 3.0, "null": 9}
    before = predict_eps(guide(network, **options), prediction_type, ABAR)
    after = guide(predict_eps(network, prediction_type, ABAR), **options)
    np.testing.assert_allclose(
        before(None, x_t, 40, labels).eps, after(None, x_t, 40, labels).eps, rtol=1e-4, atol=1e-5
    )


def test_a_network_of_noise_is_left_as_it_is_and_an_unknown_type_is_named():
    network = predicting("eps", 0.0, 0.0, ABAR)
    assert predict_eps(network, "eps", ABAR) is network
    with pytest.raises(InputError, match="'flow'; known: eps, v, x_0"):
        predict_eps(network, "flow", ABAR)


def test_snr_is_signal_over_noise_power():
    np.testing.assert_allclose(snr(np.float32([0.5, 0.8, 0.1])), [1.0, 4.0, 1 / 9], rtol=1e-6)
