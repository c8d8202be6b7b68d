"""Edge costs in closed form against steps really taken, and the Gram that they come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.diffusion.ddim import ddim
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.errors import InputError
from mpqdiff.timesteps.candidates import candidates_of
from mpqdiff.timesteps.edges import edge_costs, forbid_skipping, path_cost
from mpqdiff.timesteps.gram import StudentGram, record_gram, record_student
from mpqdiff.timesteps.trajectory import effective_eps


def stepped_error(eps, abar, p: int, q: int, held=None):
    """x_q of the teacher less x_q of one DDIM step from its state at p with `held` [D] (default the
    teacher's eps there), by stepping; eps [F,D]."""

    def step(x, eps, at, to):
        x_0 = (x - np.sqrt(1 - at) * eps) / np.sqrt(at)
        return np.sqrt(to) * x_0 + np.sqrt(1 - to) * eps

    signal = np.append(abar, 1.0)
    begin = x = np.random.default_rng(0).normal(size=eps.shape[1])
    for v in range(p, q):
        x = step(x, eps[v], signal[v], signal[v + 1])
    return x - step(begin, eps[p] if held is None else held, signal[p], signal[q])


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("length", [1, 2, 30])
def test_closed_form_equals_the_step_against_the_teachers_steps(wandering_gram, schedule, length):
    abar = alphas_cumprod(schedule, length).astype(np.float64)
    gram, eps = wandering_gram(length, length)
    cost = edge_costs(gram, abar)
    square = edge_costs(gram, abar, power=2)
    in_x_0 = edge_costs(gram, abar, data_std=np.inf)
    narrow = edge_costs(gram, abar, data_std=0.3)
    signal = np.append(abar[::-1], 1.0)
    for p in range(length):
        assert cost[p, p] == 0 and np.isinf(cost[p, :p]).all()
        for q in range(p + 1, length + 1):
            error = np.sqrt(np.mean(stepped_error(eps, abar[::-1], p, q) ** 2))
            tight = dict(rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(cost[p, q - 1], error, **tight)
            np.testing.assert_allclose(square[p, q - 1], error**2, **tight)
            xbar = error / np.sqrt(signal[q])
            np.testing.assert_allclose(in_x_0[p, q - 1], xbar, rtol=1e-9, atol=1e-10)
            shrink = np.sqrt(1 + (1 - signal[q]) / signal[q] / 0.3**2)
            np.testing.assert_allclose(narrow[p, q - 1], xbar / shrink, **tight)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("length", [1, 2, 30])
def test_a_students_edges_equal_its_step_against_the_teachers_steps(
    wandering_gram, schedule, length
):
    abar = alphas_cumprod(schedule, length).astype(np.float64)
    gram, eps = wandering_gram(length, length)
    rng = np.random.default_rng(7)
    off = 0.2 * rng.normal(size=eps.shape) + 0.1 * eps
    student = StudentGram(eps @ off.T / eps.shape[1], np.square(off).mean(axis=1))
    cost = edge_costs(gram, abar, student=student)
    for p in range(length):
        assert np.isinf(cost[p, :p]).all()
        for q in range(p + 1, length + 1):
            error = stepped_error(eps, abar[::-1], p, q, eps[p] + off[p])
            np.testing.assert_allclose(
                cost[p, q - 1], np.sqrt(np.mean(error**2)), rtol=1e-8, atol=1e-12
            )


def test_a_student_is_asked_at_the_teachers_states(make_mixture):
    denoise, abar = make_mixture(20)
    x_T = jax.random.normal(jax.random.key(0), (7, 1, 1, 8))
    cond = jnp.arange(7.0)

    def pulled(params, x_t, t, cond):
        out = denoise(params, x_t, t, None)
        return out._replace(eps=out.eps + 0.1 * jnp.tanh(cond[:, None, None, None] * x_t))

    ask = dict(alphas_cumprod=abar, clip=False)
    found = record_student(denoise, 1.0, pulled, 0.9, x_T, cond, **ask)
    every = candidates_of(abar)
    x_ts = ddim(denoise, 1.0, x_T, None, timesteps=every, trajectory=True, **ask)[1]
    pairs = [
        [model(p, x, t, cond).eps for model, p in ((denoise, 1.0), (pulled, 0.9))]
        for x, t in zip(x_ts, every, strict=True)
    ]
    teacher, other = np.asarray(pairs, np.float64).reshape(20, 2, -1).swapaxes(0, 1)
    off = other - teacher
    np.testing.assert_allclose(found.cross, teacher @ off.T / off.shape[1], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.square, np.square(off).mean(axis=1), rtol=1e-4)
    some = record_student(
        denoise, 1.0, pulled, 0.9, x_T, cond, memory_gb=2 * 3 * 4 * 20 * 8 / 2**30, **ask
    )
    np.testing.assert_allclose(some.cross, found.cross, rtol=1e-6, atol=1e-9)
    # The teacher is no student of its own: nothing is added.
    gram = record_gram(denoise, 1.0, x_T, cond, **ask)
    same = record_student(denoise, 1.0, denoise, 1.0, x_T, cond, **ask)
    costs = [edge_costs(gram, abar, student=each) for each in (same, None)]
    np.testing.assert_allclose(*costs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clip", [False, True])
def test_costs_of_a_recorded_gram_are_the_samplers_own_steps(make_mixture, clip):
    denoise, abar = make_mixture(40)
    x_T = jax.random.normal(jax.random.key(0), (24, 1, 1, 8))
    every = candidates_of(abar)
    gram = record_gram(denoise, 1.0, x_T, None, alphas_cumprod=abar, clip=clip)
    cost = edge_costs(gram, abar)
    x_0, x_ts = ddim(
        denoise, 1.0, x_T, None, timesteps=every, alphas_cumprod=abar, clip=clip, trajectory=True
    )
    states = np.concatenate([x_ts, x_0[None]])
    for p, q in [(0, 40), (3, 17), (38, 40)]:
        kept = every[[p, q]] if q < 40 else every[[p]]
        end, mid = ddim(
            denoise,
            1.0,
            states[p],
            None,
            timesteps=kept,
            alphas_cumprod=abar,
            clip=clip,
            trajectory=True,
        )
        landed = mid[1] if q < 40 else end
        error = np.sqrt(np.mean((np.asarray(landed) - states[q]) ** 2))
        np.testing.assert_allclose(cost[p, q - 1], error, rtol=2e-3, atol=3e-6)


def test_gram_does_not_depend_on_how_samples_are_chunked(make_mixture):
    denoise, abar = make_mixture(20)
    x_T = jax.random.normal(jax.random.key(0), (7, 1, 1, 8))
    cond = {"label": jnp.arange(7)}

    def shifted(params, x_t, t, cond):
        out = denoise(params, x_t, t, None)
        return out._replace(eps=out.eps + cond["label"][:, None, None, None])

    whole = record_gram(shifted, 1.0, x_T, cond, alphas_cumprod=abar)
    three = 3 * 4 * 20 * 8 / 2**30
    parts = record_gram(shifted, 1.0, x_T, cond, alphas_cumprod=abar, memory_gb=three)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    assert whole.dtype == np.float64 and whole.shape == (20, 20)


def test_gram_is_that_of_eps_at_some_candidates(make_mixture):
    denoise, abar = make_mixture(40)
    x_T = jax.random.normal(jax.random.key(0), (9, 1, 1, 8))
    few = np.array([39, 30, 11, 5])
    gram = record_gram(denoise, 1.0, x_T, None, alphas_cumprod=abar, candidates=few)
    x_ts = ddim(denoise, 1.0, x_T, None, timesteps=few, alphas_cumprod=abar, trajectory=True)[1]
    eps = np.stack(
        [
            effective_eps(denoise, 1.0, x_t, t, None, abar[t], clip=True)
            for x_t, t in zip(x_ts, few, strict=True)
        ]
    ).reshape(4, -1)
    np.testing.assert_allclose(gram, eps @ eps.T / eps.shape[1], rtol=1e-4, atol=1e-4)


def test_path_cost_is_the_sum_of_its_edges(wandering_gram):
    abar = alphas_cumprod("linear", 10)
    costs = edge_costs(wandering_gram(0, 10)[0], abar)
    every = candidates_of(abar)
    expected = costs[0, 2] + costs[3, 3] + costs[4, 9]
    assert path_cost(costs, [9, 6, 5], every) == pytest.approx(expected, rel=1e-15)
    assert path_cost(costs, every, every) == 0
    for steps, text in [([8, 3], "begin at 8"), ([9, 9], "descending"), ([], "expected some")]:
        with pytest.raises(InputError, match=text):
            path_cost(costs, steps, every)
    with pytest.raises(InputError, match="expected some"):
        path_cost(costs[:3, :3], [9, 4], every[::4])


def test_edges_over_a_protected_step_are_forbidden():
    keep = np.array([True, False, True, False])
    cost = forbid_skipping(np.triu(np.ones((4, 4))), keep)
    assert np.isinf(cost[:2, 2:]).all()
    assert np.isfinite(cost[2, 2:]).all() and np.isfinite(cost[0, :2]).all()


def test_bad_input(make_mixture, wandering_gram):
    denoise, abar = make_mixture(6)
    gram = wandering_gram(0, 6)[0]
    with pytest.raises(InputError, match=r"Gram of eps \(6, 6\) for 5"):
        edge_costs(gram, abar[:5])
    with pytest.raises(InputError, match="diverged"):
        edge_costs(np.where(np.eye(6), np.nan, gram), abar)
    for wrong in ({"data_std": 0.0}, {"data_std": np.nan}, {"power": 3}):
        with pytest.raises(InputError, match="expected above 0, and 1 or 2"):
            edge_costs(gram, abar, **wrong)
    with pytest.raises(InputError, match="no samples"):
        record_gram(denoise, 1.0, jnp.zeros((0, 1, 1, 8)), None, alphas_cumprod=abar)
    x_T = jnp.ones((2, 1, 1, 8))

    def broken(params, x_t, t, cond):
        out = denoise(params, x_t, t, cond)
        return out._replace(eps=jnp.where(t == 3, jnp.nan, out.eps))

    with pytest.raises(InputError, match="the teacher's eps is not finite from timestep 3 on"):
        record_gram(broken, 1.0, x_T, None, alphas_cumprod=abar)
    with pytest.raises(InputError, match="the student's eps is not finite from timestep 3 on"):
        record_student(denoise, 1.0, broken, 1.0, x_T, None, alphas_cumprod=abar)
    student = StudentGram(np.full((6, 6), np.nan), np.ones(6))
    with pytest.raises(InputError, match="student's error holds NaN"):
        edge_costs(gram, abar, student=student)
    for cross, square, text in [
        (5, 6, r"student's error \(5, 5\) for 6"),
        (6, 5, r"square of the student's error \(5,\) for 6"),
    ]:
        wrong = StudentGram(np.ones((cross, cross)), np.ones(square))
        with pytest.raises(InputError, match=text):
            edge_costs(gram, abar, student=wrong)
