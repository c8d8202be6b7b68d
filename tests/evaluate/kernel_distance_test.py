"""Kernel distance: double-loop oracle, unbiasedness, the jackknife's size, subset averages."""

import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.evaluate.kernel_distance import kernel_distance, subset_kernel_distance


def _kernel(a, b):
    return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1.0) ** 3


def _slow_mmd(x, y):
    """The definition, one pair at a time."""
    n, m = len(x), len(y)
    xx = sum(_kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    yy = sum(_kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    xy = sum(_kernel(a, b) for a in x for b in y)
    return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)


def _sets(seed, n=23, m=17, shift=0.4):
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1.0, (n, 5)), rng.normal(0.0, 1.0, (m, 5))


@pytest.mark.parametrize("chunk", [4, 1024])
def test_equals_the_double_loop(chunk):
    x, y = _sets(0)
    assert kernel_distance(x, y, chunk=chunk).value == pytest.approx(_slow_mmd(x, y), rel=1e-10)


def test_standard_error_is_the_delete_one_jackknife():
    x, y = _sets(1, n=12, m=9)
    left_out = [_slow_mmd(np.delete(x, i, axis=0), y) for i in range(12)]
    expected = np.sqrt(11 * np.var(left_out))
    assert kernel_distance(x, y).standard_error == pytest.approx(expected, rel=1e-9)


def test_standard_error_matches_the_scatter_over_draws():
    y = np.random.default_rng(2).normal(size=(200, 8))
    rng = np.random.default_rng(3)
    draws = [kernel_distance(rng.normal(0.5, 1.0, (80, 8)), y) for _ in range(150)]
    scatter = np.std([draw.value for draw in draws])
    assert 0.85 < np.mean([draw.standard_error or 0.0 for draw in draws]) / scatter < 1.3


def test_the_interval_holds_for_the_reference_as_it_is():
    """With a fresh reference each time the values scatter more than the standard error says."""
    rng = np.random.default_rng(3)
    fixed = rng.normal(0.5, 1.0, (80, 8))
    draws = {
        fresh: [
            kernel_distance(
                rng.normal(size=(80, 8)), rng.normal(0.5, 1.0, (80, 8)) if fresh else fixed
            )
            for _ in range(150)
        ]
        for fresh in (False, True)
    }
    ratio = {
        fresh: np.std([one.value for one in found])
        / np.mean([one.standard_error or 0.0 for one in found])
        for fresh, found in draws.items()
    }
    assert 0.8 < ratio[False] < 1.15
    assert ratio[True] > 1.4


def test_unbiased_at_equal_distributions_for_small_sets():
    rng = np.random.default_rng(4)
    values = [
        kernel_distance(rng.normal(size=(10, 4)), rng.normal(size=(10, 4))).value
        for _ in range(500)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(500)
    assert min(values) < 0.0


def test_subset_average_with_whole_sets_is_the_full_value():
    x, y = _sets(5, n=20, m=20)
    mean, deviation = subset_kernel_distance(x, y, subset_size=20, num_subsets=3)
    assert mean == pytest.approx(kernel_distance(x, y).value, rel=1e-10)
    assert deviation == pytest.approx(0.0, abs=1e-10)


def test_subset_average_is_near_the_full_value_and_fixed_by_its_seed():
    x, y = _sets(6, n=200, m=150)
    first = subset_kernel_distance(x, y, subset_size=50, num_subsets=60, seed=1)
    assert first == subset_kernel_distance(x, y, subset_size=50, num_subsets=60, seed=1)
    assert first != subset_kernel_distance(x, y, subset_size=50, num_subsets=60, seed=2)
    assert abs(first[0] - kernel_distance(x, y).value) < first[1]


def test_unusable_input():
    x, y = _sets(7)
    with pytest.raises(InputError, match="equal D"):
        kernel_distance(x, y[:, :3])
    with pytest.raises(InputError, match="at least 2 rows"):
        kernel_distance(x[:1], y)
    with pytest.raises(InputError, match="subset_size=18"):
        subset_kernel_distance(x, y, subset_size=18)
    y[3, 0] = np.inf
    with pytest.raises(InputError, match="reference features: 1 of 17 rows"):
        kernel_distance(x, y)
    assert kernel_distance(*_sets(8, n=2)).standard_error is None


def test_pseudo_values_average_to_the_value_and_give_its_error():
    x, y = _sets(10, n=40, m=30)
    found = kernel_distance(x, y)
    assert found.values is not None
    assert found.values.mean() == pytest.approx(found.value, rel=1e-9)
    error = found.values.std(ddof=1) / np.sqrt(40)
    assert error == pytest.approx(found.standard_error, rel=1e-9)
