"""The size-only rule: OMPQ's released bit lists, with layer sizes as the only input."""

import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.solve import solve
from mpqdiff.solve.size_only import projection, round_nearest, round_search

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
