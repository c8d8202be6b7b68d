"""Kept timesteps, their signal, and noise that depends on seed, image and step alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.diffusion.steps import (
    check_timesteps,
    initial_noise,
    log_snr_timesteps,
    signals,
    step_keys,
    step_noise,
    uniform_timesteps,
)
from mpqdiff.errors import InputError


@pytest.mark.parametrize("length", [1, 2, 37, 100])
def test_uniform_timesteps_descend_from_the_noisy_to_the_clean_end(length):
    for count in range(1, length + 1):
        steps = check_timesteps(uniform_timesteps(length, count), length)
        assert len(steps) == count and steps[0] == length - 1
        assert count == 1 or steps[-1] == 0
        gaps = -np.diff(steps)
        assert not len(gaps) or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("count", [0, -3, 101])
def test_uniform_timesteps_refuse_an_impossible_count(count):
    with pytest.raises(InputError, match=f"num_steps={count}"):
        uniform_timesteps(100, count)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_log_snr_timesteps_are_even_in_log_snr_where_the_schedule_allows(name):
    abar = alphas_cumprod(name, 1000)
    log_snr = np.log(abar.astype(np.float64) / (1 - abar.astype(np.float64)))
    steps = check_timesteps(log_snr_timesteps(abar, 10), 1000)
    assert steps[0] == 999 and len(steps) == 10 and steps[-1] > 0
    gaps = np.diff([*log_snr[steps], log_snr[0]])
    # A timestep is rounded by half; the schedule's own steps around it bound the gaps' error.
    around = [log_snr[max(t - 1, 0)] - log_snr[min(t + 1, 999)] for t in (*steps, 0)]
    assert (np.abs(gaps - (log_snr[0] - log_snr[-1]) / 10) <= np.add(around[:-1], around[1:])).all()


@pytest.mark.parametrize("length", [1, 2, 37, 100])
def test_log_snr_timesteps_are_distinct_for_every_count(length):
    abar = alphas_cumprod("linear", length)
    for count in range(1, length + 1):
        steps = check_timesteps(log_snr_timesteps(abar, count), length)
        assert len(steps) == count and steps[0] == length - 1
    with pytest.raises(InputError, match="num_steps="):
        log_snr_timesteps(abar, length + 1)


def test_the_signal_goes_to_that_of_the_next_kept_timestep_and_ends_at_one():
    abar = alphas_cumprod("linear", 100)
    steps, before, after = signals([80, 31, 30, 2], abar)
    assert steps.dtype == np.int32 and before.dtype == after.dtype == np.float64
    np.testing.assert_array_equal(before, abar[[80, 31, 30, 2]])
    np.testing.assert_array_equal(after, [*abar[[31, 30, 2]], 1.0])


@pytest.mark.parametrize(
    "table", [[0.9, 0.5, 0.0], [1.0, 0.5, 0.1], [0.5, 0.5, 0.1], [0.9, 0.1, 0.5]]
)
def test_a_signal_without_noise_or_that_does_not_fall_is_refused(table):
    with pytest.raises(InputError, match="alphas_cumprod"):
        signals([2, 1, 0], np.array(table))


def test_initial_noise_depends_on_seed_and_image_alone():
    whole = initial_noise(5, 0, 7, (4, 4, 1))
    parts = [initial_noise(5, start, count, (4, 4, 1)) for start, count in [(0, 3), (3, 1), (4, 3)]]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts))
    assert not np.array_equal(whole, initial_noise(6, 0, 7, (4, 4, 1)))
    assert len(np.unique(np.asarray(whole)[:, 0, 0, 0])) == 7


def test_step_noise_depends_on_image_and_step_and_is_not_the_initial_noise():
    x_t = jnp.zeros((7, 4, 4, 1))
    draws = [np.asarray(step_noise(step_keys(5, 0, 7), index, x_t)) for index in range(3)]
    part = step_noise(step_keys(5, 3, 2), 1, x_t[:2])
    np.testing.assert_array_equal(part, draws[1][3:5])
    every = np.concatenate([*draws, np.asarray(initial_noise(5, 0, 7, (4, 4, 1)))])
    assert len(np.unique(every)) == every.size


def test_step_noise_has_the_type_of_the_images():
    keys = jax.random.split(jax.random.key(0), 2)
    for dtype in (jnp.float32, jnp.bfloat16):
        assert step_noise(keys, 0, jnp.zeros((2, 3, 3, 1), dtype)).dtype == dtype
