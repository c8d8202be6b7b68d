"""Drift of a student: each reading against separate samplers, what it holds, and divergence."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.diffusion.ddim import ddim
from mpqdiff.errors import InputError
from mpqdiff.timesteps.candidates import candidates_of
from mpqdiff.timesteps.drift import READINGS, measure, total

X_T = jax.random.normal(jax.random.key(0), (16, 1, 1, 8))


@lru_cache
def pulled(denoise):
    """A student that adds params * x_t to eps."""

    def student(params, x_t, t, cond):
        out = denoise(1.0, x_t, t, cond)
        return out._replace(eps=out.eps + params * x_t)

    return student


def norm(x) -> float:
    return float(np.linalg.norm(np.asarray(x).reshape(len(x), -1), axis=1).mean())


def states(denoise, params, abar, steps, clip):
    return ddim(
        denoise, params, X_T, None, timesteps=steps, alphas_cumprod=abar, clip=clip, trajectory=True
    )[1]


@pytest.mark.parametrize("reading", READINGS)
def test_an_equal_student_that_runs_every_step_does_not_drift(make_mixture, reading):
    denoise, abar = make_mixture(30)
    drift = measure(denoise, 1.0, denoise, 1.0, X_T, None, alphas_cumprod=abar, reading=reading)
    np.testing.assert_allclose(drift, np.zeros(30), atol=1e-6)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kept", [None, [29, 20, 19, 8, 3]])
def test_state_drift_is_that_of_two_samplers_at_the_kept_steps(make_mixture, clip, kept):
    denoise, abar = make_mixture(30)
    every = candidates_of(abar)
    drift = measure(
        *(denoise, 1.0, denoise, 1.1, X_T, None),
        alphas_cumprod=abar,
        timesteps=kept,
        reading="state",
        clip=clip,
    )
    steps = every if kept is None else np.array(kept)
    teacher = states(denoise, 1.0, abar, every, clip)
    student = states(denoise, 1.1, abar, steps, clip)
    teacher = teacher[29 - steps]
    expected = [norm(b - a) / norm(a) for a, b in zip(teacher, student, strict=True)]
    np.testing.assert_allclose(drift[29 - steps], expected, rtol=1e-3, atol=1e-5)
    assert drift[0] == 0 and drift[-1] > 0.01


@pytest.mark.parametrize(("reading", "pull"), [("teacher_eps", 0.0), ("student_eps", 0.2)])
def test_eps_drift_is_of_one_step_at_the_states_of_its_reading(make_mixture, reading, pull):
    denoise, abar = make_mixture(30)
    every, student = candidates_of(abar), pulled(denoise)
    drift = measure(
        *(denoise, 1.0, student, 0.2, X_T, None),
        alphas_cumprod=abar,
        reading=reading,
        clip=False,
    )
    x_ts = states(student, pull, abar, every, False)
    for place, (x_t, t) in enumerate(zip(x_ts, every, strict=True)):
        expected = 0.2 * norm(x_t) / norm(denoise(1.0, x_t, t, None).eps)
        assert drift[place] == pytest.approx(expected, rel=1e-3)


def test_a_skipped_step_is_served_by_the_eps_before_it(make_mixture):
    denoise, abar = make_mixture(30)
    drift = measure(
        *(denoise, 1.0, denoise, 1.0, X_T, None),
        alphas_cumprod=abar,
        timesteps=[29, 10],
        reading="teacher_eps",
        clip=False,
    )
    x_ts = states(denoise, 1.0, abar, candidates_of(abar), False)
    eps = [denoise(1.0, x_ts[29 - t], t, None).eps for t in (29, 15)]
    assert drift[29 - 15] == pytest.approx(norm(eps[0] - eps[1]) / norm(eps[1]), rel=1e-3)
    assert drift[0] == drift[29 - 10] == 0


def test_other_timesteps_compile_nothing_anew(make_mixture):
    denoise, abar = make_mixture(30)
    traces = []

    def counted(params, x_t, t, cond):
        traces.append(1)
        return denoise(params, x_t, t, cond)

    after = []
    for kept in (None, [29, 3], [29, 28, 2]):
        measure(denoise, 1.0, counted, 1.1, X_T, None, alphas_cumprod=abar, timesteps=kept)
        after.append(len(traces))
    assert after[0] == after[1] == after[2] > 0


def test_candidates_are_where_drift_is_measured(make_mixture):
    denoise, abar = make_mixture(30)
    few = np.array([29, 12, 5])
    drift = measure(denoise, 1.0, denoise, 1.1, X_T, None, alphas_cumprod=abar, candidates=few)
    teacher, student = (states(denoise, p, abar, few, True) for p in (1.0, 1.1))
    expected = [norm(b - a) / norm(a) for a, b in zip(teacher, student, strict=True)]
    np.testing.assert_allclose(drift, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reading", READINGS)
def test_a_diverging_student_is_named_with_its_timestep(make_mixture, reading):
    denoise, abar = make_mixture(30)

    def student(params, x_t, t, cond):
        out = denoise(1.0, x_t, t, cond)
        return out._replace(eps=jnp.where(t <= 7, params * x_t, out.eps))

    first = 6 if reading == "state" else 7
    for value in (np.nan, np.inf, 1e25):
        with pytest.raises(InputError, match=f"timestep {first}, first of .* diverged"):
            measure(
                *(denoise, 1.0, student, value, X_T, None),
                alphas_cumprod=abar,
                reading=reading,
                clip=False,
            )


def test_bad_input(make_mixture):
    denoise, abar = make_mixture(30)
    pair = (denoise, 1.0, denoise, 1.1, X_T, None)
    with pytest.raises(InputError, match="reading of drift 'x'; known: state"):
        measure(*pair, alphas_cumprod=abar, reading="x")
    with pytest.raises(InputError, match="keep the first"):
        measure(*pair, alphas_cumprod=abar, timesteps=[5, 2])
    with pytest.raises(InputError, match="expected some of the 2 candidates"):
        measure(*pair, alphas_cumprod=abar, candidates=[29, 4], timesteps=[29, 2])


def test_total_is_the_last_and_a_share_of_the_largest():
    assert total([0.0, 0.4, 0.1]) == pytest.approx(0.1 + 0.25 * 0.4)
    assert total([0.0, 0.4, 0.1], weight=0.0) == pytest.approx(0.1)
