"""Drift against the float trajectory: known deviations, shared steps, the curve, bad input."""

import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.evaluate import drift


def _trajectory(seed, steps=5, batch=6):
    return np.random.default_rng(seed).normal(size=(steps, batch, 4, 4, 2)).astype(np.float32)


def test_a_scaled_trajectory_deviates_by_the_factor():
    base = _trajectory(0)
    factors = np.array([0.0, 0.1, 0.2, 0.4, 1.0], np.float32)
    found = drift.deviations(base * (1 + factors[:, None, None, None, None]), base)
    assert found.shape == (5, 6)
    np.testing.assert_allclose(found, np.tile(factors[:, None], 6), rtol=1e-5, atol=1e-6)


def test_each_image_is_measured_by_itself():
    base = _trajectory(1)
    ours = base.copy()
    ours[2, 3] *= 1.5
    found = drift.deviations(ours, base)
    assert found[2, 3] == pytest.approx(0.5, rel=1e-5)
    found[2, 3] = 0.0
    assert not found.any()


def test_the_curve_has_the_mean_over_images_and_its_interval():
    values = np.random.default_rng(2).exponential(0.1, (3, 40))
    curve = drift.curve(values, [9, 4, 0])
    assert curve.timesteps == [9, 4, 0]
    np.testing.assert_allclose(curve.mean, values.mean(axis=1))
    assert all(low < mean < high for low, mean, high in zip(curve.low, curve.mean, curve.high,
                                                            strict=True))  # fmt: skip
    with pytest.raises(InputError, match="2 timesteps"):
        drift.curve(values, [9, 4])


def test_shared_steps_keep_the_arms_order():
    own, base = drift.shared_steps([99, 60, 30, 0], [99, 80, 60, 40, 20, 0])
    assert own.tolist() == [0, 1, 3]
    assert base.tolist() == [0, 2, 5]
    with pytest.raises(InputError, match="share none"):
        drift.shared_steps([3, 1], [2, 0])


def test_unusable_trajectories():
    base = _trajectory(3)
    with pytest.raises(InputError, match="shared_steps"):
        drift.deviations(base[:3], base)
    with pytest.raises(InputError, match="shared_steps"):
        drift.deviations(base[0, 0, 0], base[0, 0, 0])
    nan = base.copy()
    nan[1, 2, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"1 of 30 deviations.*step 1, image 2"):
        drift.deviations(nan, base)
    zero = base.copy()
    zero[4, 0] = 0.0
    with pytest.raises(InputError, match="0 everywhere"):
        drift.deviations(base, zero)
