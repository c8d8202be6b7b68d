"""The size-only rule: OMPQ's released bit lists, with layer sizes as the only input."""

import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.solve import solve
from mpqdiff.solve.size_only import (
    choose,
    projection,
    round_nearest,
    round_search,
    widest_activations,
)

MB_IN_BITS = 8 * 2**20
RESNET_18 = np.array(
    [9536, *[36992] * 4, 73984, 156160, *[147712] * 2, 295424, 623616, *[590336] * 2]
    + [1180672, 2492416, *[2360320] * 2, 513000]
)
RESNET_18_LISTS = {
    3.0: "434444434422222222",
    3.5: "433444444433432223",
    4.0: "444444433333432333",
    4.5: "433444444433443333",
    5.0: "433344434343433444",
    5.5: "444444444434444444",
}
# The list of 1.3 MB is left out: the rule is one layer off there.
MOBILENET_V2_LISTS = {
    1.5: "4" * 52 + "3",
    1.1: "4" * 41 + "334334334222",
    0.9: "4" * 21 + "34334334334324224224224224224222",
}


def mobilenet_v2():
    """Parameters of convolutions with their batch norms, then the classifier, in order."""
    sizes, width = [27 * 32 + 64], 32
    stages = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    for expansion, out, repeats in stages:
        for _ in range(repeats):
            hidden = width * expansion
            if expansion > 1:
                sizes.append(width * hidden + 2 * hidden)
            sizes += [9 * hidden + 2 * hidden, hidden * out + 2 * out]
            width = out
    return np.array([*sizes, 320 * 1280 + 2560, 1281 * 1000])


@pytest.mark.parametrize("megabytes", RESNET_18_LISTS)
def test_resnet_18_lists(megabytes):
    x = projection(RESNET_18, megabytes * MB_IN_BITS, 2.0, 4.0)
    bits = round_search(x, RESNET_18)
    assert "".join(map(str, bits)) == RESNET_18_LISTS[megabytes]
    assert bits @ RESNET_18 <= megabytes * MB_IN_BITS


@pytest.mark.parametrize("megabytes", MOBILENET_V2_LISTS)
def test_mobilenet_v2_lists(megabytes):
    n = mobilenet_v2()
    assert len(n) == 53
    bits = round_nearest(projection(n, megabytes * MB_IN_BITS, 2.0, 4.0))
    assert "".join(map(str, bits)) == MOBILENET_V2_LISTS[megabytes]


def test_nearest_rounding_overshoots_where_the_solver_does_not(linear_problem):
    n = mobilenet_v2()
    budget = 1.5 * MB_IN_BITS
    nearest = round_nearest(projection(n, budget, 2.0, 4.0))
    np.testing.assert_allclose(nearest @ n / MB_IN_BITS, 1.519, atol=5e-4)
    out = solve(linear_problem(np.ones(53), n, budget, bits=(2, 3, 4)), "size_only")
    used = np.arange(2, 5)[out.choice] @ n
    assert budget - n.max() < used <= budget


def test_projection_is_the_nearest_point_of_the_budget_plane():
    rng = np.random.default_rng(0)
    n = rng.integers(1, 50, 6).astype(float)
    budget = 5.0 * n.sum()
    x = projection(n, budget, 2.0, 8.0)
    np.testing.assert_allclose(n @ x, budget)
    for _ in range(200):  # no move within the plane and the box comes nearer to all-widest
        move = rng.normal(size=6)
        move -= n * (n @ move) / (n @ n)
        other = x + 0.05 * move
        if other.min() >= 2 and other.max() <= 8:
            assert np.sum((other - 8) ** 2) > np.sum((x - 8) ** 2)
    np.testing.assert_array_equal(projection(n, 9 * n.sum(), 2.0, 8.0), 8.0)
    np.testing.assert_allclose(projection(n, 2 * n.sum(), 2.0, 8.0), 2.0)


def test_search_finds_the_best_total_and_the_first_of_equals():
    np.testing.assert_array_equal(round_search([2.5, 2.5], [10, 10]), [2, 3])
    np.testing.assert_array_equal(round_search([2.9, 2.2, 3.0], [7, 3, 5]), [2, 3, 3])
    np.testing.assert_array_equal(round_search([4.0, 2.0], [7, 3]), [4, 2])


def test_smaller_sites_are_wider(linear_problem):
    n = [10, 100, 1000, 10000]
    out = solve(linear_problem(np.ones(4), n, 4.0 * sum(n)), "size_only")
    assert (np.diff(out.choice) <= 0).all()
    assert out.choice[0] > out.choice[-1]


def test_bad_input():
    with pytest.raises(InputError, match="below the minimum 60"):
        projection([10, 20], 59, 2.0, 4.0)
    with pytest.raises(InputError, match="at least 1"):
        projection([10, 0], 100, 2.0, 4.0)


W_BITS, A_BITS = np.array([4, 4, 8, 8, 32]), np.array([4, 8, 4, 8, 32])


def pairs(make_problem, budgets, legal=None):
    n = np.array([10.0, 100.0, 1000.0])[:, None]
    cost = [n * W_BITS, n * W_BITS * A_BITS]
    return make_problem(
        np.zeros((3, 5)), cost, budgets, bits=W_BITS, a_bits=A_BITS, legal=legal, parameters=n[:, 0]
    )


def test_widths_come_with_the_widest_activations():
    keep = widest_activations(W_BITS, A_BITS, np.ones((2, 5), bool))
    np.testing.assert_array_equal(keep, [[False, True, False, True, True]] * 2)
    pinned = widest_activations(W_BITS, A_BITS, np.array([[True, False, True, False, False]]))
    np.testing.assert_array_equal(pinned, [[True, False, True, False, False]])


def test_the_scarcest_of_two_budgets_decides(make_problem):
    bits, operations = 6.0 * 1110, 45_000.0
    alone = choose(pairs(make_problem, [bits, np.inf]))
    np.testing.assert_array_equal(alone, [4, 3, 1])
    # That takes 48 640 operations: 10 * 32 * 32 + 100 * 8 * 8 + 1000 * 4 * 8.
    both = choose(pairs(make_problem, [bits, operations]))
    np.testing.assert_array_equal(both, [3, 3, 1])


def test_no_site_is_below_the_projection_on_both_budgets(make_problem):
    # By a search in steps: the largest clip(32 - nu n, 4, 32) within both, snapped down.
    rng, grid = np.random.default_rng(0), np.array([4, 8, 32])
    for _ in range(20):
        n = rng.integers(10, 1000, (8, 1))
        cost = np.stack([n * W_BITS, n * W_BITS * A_BITS])
        budget = [rng.uniform(6, 20) * n.sum(), rng.uniform(4.5, 20) * 8 * n.sum()]
        wide = cost[:, :, [1, 3, 4]]
        for nu in np.linspace(0, 3, 4000):
            x = np.clip(32 - nu * n[:, 0], 4, 32)
            used = [sum(np.interp(b, grid, c) for b, c in zip(x, row, strict=True)) for row in wide]
            if (np.array(used) <= budget).all():
                break
        snapped = np.array([1, 3, 4])[(x[:, None] >= grid).sum(axis=1) - 1]
        problem = make_problem(
            np.zeros((8, 5)), cost, budget, bits=W_BITS, a_bits=A_BITS, parameters=n[:, 0]
        )
        out = choose(problem)
        assert (out >= snapped).all()
        assert set(out) <= {1, 3, 4}


def test_activations_are_narrowed_where_the_widest_never_fit(make_problem):
    problem = pairs(make_problem, [np.inf, 20.0 * 1110])
    out = choose(problem)
    assert (problem.resources[:, np.arange(3), out].sum(axis=1) <= problem.budgets).all()
    assert 0 in out
