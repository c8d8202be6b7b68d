"""The front as data: predictions, statuses, and the ends of the sweep."""

import json

import numpy as np
import pytest

from mpqdiff import pareto, solve
from mpqdiff.errors import InputError
from mpqdiff.records import Allocation, Problem, Status
from mpqdiff.sites import Site

SITES = [Site(f"block_{i}/fc", "dense", (10, size), 10 * size, 0, 0, f"block_{i}/fc")
         for i, size in enumerate((10, 20, 30, 40))]  # fmt: skip


@pytest.fixture
def problem():
    size = np.array([site.parameters for site in SITES], np.float64)
    bits = np.array([2, 4, 8])
    return Problem(
        value=np.array([3.0, 1.0, 7.0, 2.0])[:, None] * (1 / 3) ** np.arange(3)[None],
        resources=(size[:, None] * bits / 8)[None],
        fixed=np.array([1000.0]),
        budgets=np.array([1500.0]),
        w_bits=bits.astype(np.int32),
        a_bits=np.full(3, 8, np.int32),
        legal=np.ones((4, 3), bool),
        tie=np.arange(4, dtype=np.int32),
        parameters=size.astype(np.int64),
        names=("bytes",),
    )


def test_a_front_is_consistent(problem):
    budgets = pareto.budgets_between(problem, 9)
    assert budgets.shape == (9, 1) and budgets[0, 0] == 1250.0 and budgets[-1, 0] == 2000.0
    found = pareto.points(problem, solve.solve_many(problem, budgets[:, 0]), budgets, SITES)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["schema"] == 1 and found["resources"] == ["bytes"]
    assert len(found["points"]) == 9
    value = np.asarray(problem.value)
    for point, (budget,) in zip(found["points"], budgets, strict=True):
        widths = [point["sites"][site.path] for site in SITES]
        columns = [[2, 4, 8].index(w) for w, _ in widths]
        parameters = [site.parameters for site in SITES]
        stored = sum(n * w for n, (w, _) in zip(parameters, widths, strict=True)) / 8
        assert point["predicted"]["bytes"] == stored + 1000 <= budget == point["budgets"]["bytes"]
        assert point["average_bits"] == pytest.approx(8 * stored / sum(parameters), rel=1e-8)
        objective = value[np.arange(4), columns].sum()
        assert point["objective"] == pytest.approx(objective, rel=1e-8)
        assert point["bound"] <= point["objective"]
        assert point["gap"] == pytest.approx(point["objective"] - point["bound"], abs=1e-7)
        assert point["status"] in ("optimal", "rounded")
        assert all(a == 8 for _, a in widths)
    objectives = [point["bound"] for point in found["points"]]
    assert objectives == sorted(objectives, reverse=True) and objectives[0] > objectives[-1]
    assert found["points"][0]["average_bits"] == 2.0 and found["points"][-1]["average_bits"] == 8.0


def test_infeasible_points_are_kept_without_sites(problem):
    none = Allocation(np.zeros(4, np.int32), np.inf, np.inf, np.inf, Status.INFEASIBLE,
                      nearest=np.array([np.inf]))  # fmt: skip
    fits = solve.solve(problem)
    budgets = np.array([[900.0], [1500.0]])
    first, second = pareto.points(problem, [none, fits], budgets, SITES)["points"]
    assert first == {
        "budgets": {"bytes": 900.0}, "predicted": None, "objective": None, "bound": None,
        "gap": None, "status": "infeasible", "average_bits": None, "sites": {},
        "nearest": {"bytes": None},
    }  # fmt: skip
    assert set(second["sites"]) == {site.path for site in SITES} and "nearest" not in second


def test_other_resources_stay_at_their_budgets(problem):
    two = problem.replace(
        resources=np.concatenate([problem.resources, 1e-3 / (1 + problem.resources)]),
        fixed=np.array([1000.0, 0.25]),
        budgets=np.array([1500.0, 0.3]),
        names=("bytes", "seconds"),
    )
    budgets = pareto.budgets_between(two, 4)
    np.testing.assert_array_equal(budgets[:, 1], 0.3)
    np.testing.assert_allclose(budgets[:, 0], [1250.0, 1500.0, 1750.0, 2000.0])
    allocation = Allocation(np.array([0, 1, 2, 0]), 1.0, 1 / 3, 2 / 3, Status.ROUNDED)
    point = pareto.points(two, [allocation], budgets[:1], SITES)["points"][0]
    expected = 0.25 + 1e-3 * (1 / 26 + 1 / 101 + 1 / 301 + 1 / 101)
    assert point["predicted"]["seconds"] == pytest.approx(expected, rel=1e-8)
    assert point["bound"] == 0.333333333


def test_unusable_input(problem):
    with pytest.raises(InputError, match="a front of 1 points"):
        pareto.budgets_between(problem, 1)
    pinned = problem.replace(legal=np.tile([False, True, False], (4, 1)))
    with pytest.raises(InputError, match="spends 1500 bytes: there is no front"):
        pareto.budgets_between(pinned, 8)
    allocation = solve.solve(problem)
    with pytest.raises(InputError, match=r"budgets have shape \(1, 2\)"):
        pareto.points(problem, [allocation], np.ones((1, 2)), SITES)
    with pytest.raises(InputError, match="3 sites for a problem of 4"):
        pareto.points(problem, [allocation], np.ones((1, 1)), SITES[:3])
