"""The exact selector: against all subsets, against every rival, and what must hold over S."""

import time
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff import timesteps
from mpqdiff.diffusion.samplers import SAMPLERS, step_keys
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.errors import InputError
from mpqdiff.timesteps.candidates import candidates_of, protected
from mpqdiff.timesteps.edges import edge_costs, forbid_skipping, path_cost
from mpqdiff.timesteps.shortest_path import front, positions, select

LENGTH = 24  # one shape, compiled once, for everything that hypothesis draws


def all_subsets(costs: np.ndarray, num_steps: int) -> float:
    """Least cost over every choice of `num_steps` positions that has the first."""
    length = len(costs)
    chosen = [(0, *rest) for rest in combinations(range(1, length), num_steps - 1)]
    ends = [(*each[1:], length) for each in chosen]
    return min(
        sum(costs[p, q - 1] for p, q in zip(a, b, strict=True))
        for a, b in zip(chosen, ends, strict=True)
    )


def length_of(costs, places) -> float:
    return costs[places, np.append(places[1:], len(costs)) - 1].sum()


@pytest.mark.parametrize("style", ["real", "tied", "protected"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_every_front_is_the_least_of_all_subsets(style, length):
    rng = np.random.default_rng(length)
    costs = np.where(np.tri(length, dtype=bool).T, rng.random((length, length)), np.inf)
    if style == "tied":
        costs = np.floor(3 * costs)
    if style == "protected":
        costs = forbid_skipping(costs, np.arange(length) >= length - 2)
    found = front(costs, length)
    for num_steps in range(1, length + 1):
        least = all_subsets(costs, num_steps)
        assert found.cost[num_steps - 1] == pytest.approx(least, rel=1e-12)
        if np.isfinite(least):
            places = positions(found, num_steps)
            assert len(places) == num_steps and places[0] == 0 and (np.diff(places) > 0).all()
            assert length_of(costs, places) == pytest.approx(least, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    schedule=st.sampled_from(["linear", "scaled_linear", "cosine"]),
    data_std=st.sampled_from([0.3, 1.0, np.inf]),
    power=st.sampled_from([1, 2]),
)
def test_no_rival_is_cheaper_for_any_count(wandering_gram, seed, schedule, data_std, power):
    abar = alphas_cumprod(schedule, LENGTH)
    gram, _ = wandering_gram(seed, LENGTH)
    reading = {"data_std": data_std, "power": power}
    costs, every = edge_costs(gram, abar, **reading), candidates_of(abar)
    found = front(costs, LENGTH)
    rng = np.random.default_rng(seed)
    for num_steps in range(1, LENGTH + 1):
        exact = every[positions(found, num_steps)]
        least = path_cost(costs, exact, every)
        assert least == pytest.approx(found.cost[num_steps - 1], rel=1e-12)
        rivals = {
            "uniform": timesteps.select(abar, num_steps, "uniform"),
            "quadratic": timesteps.select(abar, num_steps, "quadratic"),
            "log_snr": timesteps.select(abar, num_steps, "log_snr"),
            "drift": timesteps.select(abar, num_steps, "drift", drift=rng.random(LENGTH), tail=0.0),
            "drift_edges": timesteps.select(
                abar, num_steps, "drift_edges", gram=gram, tail=0.0, **reading
            ),
        }
        for draw in range(5):
            rest = rng.permutation(LENGTH - 1)[: num_steps - 1]
            rivals[f"random {draw}"] = np.sort(np.append(rest, LENGTH - 1))[::-1]
        for name, steps in rivals.items():
            assert len(steps) == num_steps
            assert least <= path_cost(costs, steps, every) * (1 + 1e-12), (name, num_steps)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.3, 1.0, np.inf]), st.sampled_from([1, 2]))
def test_more_steps_cost_less_where_eps_moves_one_way(seed, data_std, power):
    rng = np.random.default_rng(seed)
    along = np.cumsum(rng.exponential(size=LENGTH) * rng.integers(0, 2, LENGTH))
    gram = np.outer(along, along) * rng.random()
    costs = edge_costs(gram, alphas_cumprod("linear", LENGTH), data_std=data_std, power=power)
    cost = front(costs, LENGTH).cost
    # The second differences of a rounded Gram are off by its last digits, times sigma^2.
    noise = 1e-5 if power == 1 else 1e-10
    assert (np.diff(cost) <= noise * (cost[0] + along[-1] + 1)).all()
    assert cost[-1] == 0


def test_more_steps_may_cost_more_where_eps_swings_back():
    abar = alphas_cumprod("linear", 3).astype(np.float64)
    sigma = np.append(np.sqrt((1 - abar) / abar)[::-1], 0.0)
    gap = sigma[:-1] - sigma[1:]
    eps = np.array([0.0, 1.0, -gap[1] / gap[2]])  # what the first step misses cancels over two
    cost = front(edge_costs(np.outer(eps, eps), abar), 3).cost
    assert cost[0] < 1e-6 and cost[1] > 0.01 and cost[2] == 0


def test_a_longer_front_begins_with_the_shorter_one(wandering_gram):
    costs = edge_costs(wandering_gram(1, LENGTH)[0], alphas_cumprod("linear", LENGTH))
    long, short = front(costs, LENGTH), front(costs, 7)
    np.testing.assert_array_equal(long.cost[:7], short.cost)
    np.testing.assert_array_equal(long.begin[:7], short.begin)


def test_ends_and_tail_are_kept_at_least_cost(wandering_gram):
    abar = alphas_cumprod("linear", 10)
    gram = wandering_gram(5, 10)[0]
    costs, every = edge_costs(gram, abar), candidates_of(abar)
    tailed = forbid_skipping(costs, protected(every, 10, 0.25))
    for num_steps in range(4, 11):
        steps = select(abar, num_steps, gram=gram, tail=0.25)
        assert len(steps) == num_steps and steps[0] == 9 and set(steps) >= {2, 1, 0}
        assert path_cost(costs, steps, every) == pytest.approx(all_subsets(tailed, num_steps))
    for num_steps in range(1, 11):
        assert select(abar, num_steps, gram=gram)[0] == 9
    np.testing.assert_array_equal(select(abar, 10, gram=gram), every)


def test_candidates_are_what_is_selected_from(wandering_gram):
    abar = alphas_cumprod("linear", 100)
    few = np.array([99, 80, 64, 20, 19, 7])
    gram = wandering_gram(2, 6)[0]
    steps = select(abar, 3, gram=gram, candidates=few)
    assert set(steps) <= set(few.tolist()) and steps[0] == 99
    costs = edge_costs(gram, abar, candidates=few)
    assert path_cost(costs, steps, few) == pytest.approx(all_subsets(costs, 3))
    with pytest.raises(InputError, match="num_steps=7: expected 1 to 6"):
        select(abar, 7, gram=gram, candidates=few)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_selected_steps_run_in_every_sampler(make_mixture, wandering_gram, sampler):
    denoise, abar = make_mixture(30)
    steps = select(abar, 4, gram=wandering_gram(0, 30)[0])
    x_0 = SAMPLERS[sampler](
        denoise,
        1.0,
        jax.random.normal(jax.random.key(0), (2, 1, 1, 8)),
        None,
        timesteps=steps,
        alphas_cumprod=abar,
        keys=step_keys(0, 0, 2),
    )
    assert x_0.shape == (2, 1, 1, 8) and bool(jnp.isfinite(x_0).all())


def test_a_thousand_steps_take_seconds_of_cpu_and_leave_x64_off(wandering_gram):
    gram = wandering_gram(0, 1000, 200)[0]
    begin = time.process_time()
    steps = select(alphas_cumprod("linear", 1000), 500, gram=gram)
    assert time.process_time() - begin < 10
    assert len(steps) == 500 and jnp.zeros(()).dtype == jnp.float32


@pytest.mark.parametrize("count", [0, 11])
def test_bad_counts(wandering_gram, count):
    abar, gram = alphas_cumprod("linear", 10), wandering_gram(0, 10)[0]
    with pytest.raises(InputError, match=f"num_steps={count}: expected 1 to 10"):
        select(abar, count, gram=gram)
    with pytest.raises(InputError, match=f"max_steps={count}"):
        front(edge_costs(gram, abar), count)


def test_bad_input(wandering_gram):
    abar, gram = alphas_cumprod("linear", 10), wandering_gram(0, 10)[0]
    with pytest.raises(InputError, match=r"protect 6 steps, more than the num_steps=5"):
        select(abar, 5, gram=gram, tail=0.5)
    with pytest.raises(InputError, match=r"tail=1.5: expected a share"):
        select(abar, 5, gram=gram, tail=1.5)
    with pytest.raises(InputError, match="NaN"):
        front(np.full((3, 3), np.nan), 2)
    found = front(forbid_skipping(edge_costs(gram, abar), np.arange(10) > 7), 5)
    for count in (2, 6):
        with pytest.raises(InputError, match="the front has 3 to 5 steps"):
            positions(found, count)
