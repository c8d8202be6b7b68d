"""Greedy pruning: what goes, what stays, and that each removal is the cheapest."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.errors import InputError
from mpqdiff.timesteps.candidates import candidates_of
from mpqdiff.timesteps.edges import edge_costs, path_cost
from mpqdiff.timesteps.gram import StudentGram
from mpqdiff.timesteps.prune import by_drift, by_edges

ABAR = alphas_cumprod("linear", 10)
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.booleans(), st.sampled_from([0.0, 0.1, 0.25]))
def test_counts_ends_and_tail_hold_and_fewer_steps_are_among_more(seed, carry, tail):
    rng = np.random.default_rng(seed)
    drift, moves = rng.integers(0, 5, 10), np.cumsum(rng.normal(size=(10, 6)), axis=0)
    gram = moves @ moves.T / 6
    kept = {9, *range(10)[: int(np.ceil(tail * 10))]}
    for method, evidence in (
        (by_drift, dict(drift=drift, carry=carry)),
        (by_edges, dict(gram=gram)),
    ):
        larger = set(range(10))
        for num_steps in range(10, len(kept) - 1, -1):
            steps = method(ABAR, num_steps, tail=tail, **evidence)
            assert steps.dtype == np.int32 and len(steps) == num_steps
            assert (np.diff(steps) < 0).all() and kept <= set(steps.tolist()) <= larger
            larger = set(steps.tolist())


def test_without_carrying_the_largest_drifts_stay():
    drift = np.array([0, 7, 3, 9, 1, 8, 2, 5, 4, 6])
    steps = by_drift(ABAR, 5, drift=drift, carry=False, tail=0.0)
    np.testing.assert_array_equal(steps, [9, 8, 6, 4, 0])


def test_carried_drift_goes_to_the_step_that_serves_instead():
    # 6 (0.5) goes to 7, 4 (1) to 5 (2), now 3; then 7 (2.5) to 8, and 3 (2.8) to 5.
    drift = np.array([0, 9, 2, 0.5, 2, 1, 2.8, 5, 5, 5])
    order = [by_drift(ABAR, count, drift=drift, tail=0.0) for count in (9, 8, 7, 6)]
    gone = [set(range(10)) - set(steps.tolist()) for steps in order]
    assert gone == [{6}, {6, 4}, {6, 4, 7}, {6, 4, 7, 3}]


def test_the_student_is_measured_again_on_what_is_left():
    seen = []

    def remeasure(steps):
        seen.append(steps)
        return np.where(np.isin(np.arange(10)[::-1], [5, 4]), 0.0, 9.0)

    drift = np.where(np.arange(10) < 4, 0.1, 1.0)
    steps = by_drift(ABAR, 5, drift=drift, tail=0.0, carry=False, remeasure=remeasure, every=3)
    np.testing.assert_array_equal(seen, [[9, 5, 4, 3, 2, 1, 0]])
    np.testing.assert_array_equal(steps, [9, 3, 2, 1, 0])


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from([0.0, 0.15]), st.sampled_from([1, 2]), st.booleans())
def test_each_removal_adds_the_least_to_the_whole_path(seed, tail, power, asked):
    length = 14
    abar, rng = alphas_cumprod("linear", length), np.random.default_rng(seed)
    moves = np.cumsum(rng.normal(size=(length, 6)), axis=0)
    gram = moves @ moves.T / 6
    off = rng.normal(size=moves.shape)
    student = StudentGram(moves @ off.T / 6, np.square(off).mean(axis=1)) if asked else None
    readings = {"student": student, "power": power}
    costs, every = edge_costs(gram, abar, **readings), candidates_of(abar)
    left = every.tolist()
    for num_steps in range(length - 1, 3, -1):
        free = [t for t in left[1:] if t >= tail * length]
        rest = [[t for t in left if t != gone] for gone in free]
        after = [path_cost(costs, each, every) for each in rest]
        steps = by_edges(abar, num_steps, gram=gram, tail=tail, **readings).tolist()
        assert path_cost(costs, steps, every) == pytest.approx(min(after), rel=1e-9)
        left = steps


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_drift_of_a_diverging_student_is_refused(value):
    drift = np.ones(10)
    drift[4] = value
    with pytest.raises(InputError, match=r"at timestep 5, first of 1 .* diverged"):
        by_drift(ABAR, 5, drift=drift)
    with pytest.raises(InputError, match="at timestep 5"):
        by_drift(ABAR, 5, drift=np.ones(10), remeasure=lambda steps: drift, every=1)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"num_steps": 11}, "num_steps=11: expected 1 to 10"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"tail": 0.5}, "protect 6 steps, more than the num_steps=5"),
        ({"tail": -0.1}, "expected a share"),
    ],
)
def test_bad_counts_and_tails(wrong, text):
    call = {"num_steps": 5, **wrong}
    with pytest.raises(InputError, match=text):
        by_drift(ABAR, drift=np.ones(10), **call)
    with pytest.raises(InputError, match=text):
        by_edges(ABAR, gram=np.eye(10), **call)


def test_bad_drift():
    with pytest.raises(InputError, match=r"drift \(9,\) for 10"):
        by_drift(ABAR, 5, drift=np.ones(9))
    with pytest.raises(InputError, match="every=0"):
        by_drift(ABAR, 5, drift=np.ones(10), every=0)
