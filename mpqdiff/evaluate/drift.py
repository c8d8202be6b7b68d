"""Drift: how far an arm's trajectory has left the float model's, step by step.

    deviation[s, i] = |x_t - x_t^float| / |x_t^float|,   t = timesteps[s], of image i

Both start from the same noise, so it starts at 0 and shows where on the trajectory the error
enters. Arms that run other steps are compared at the timesteps that both visit.
"""

from typing import NamedTuple

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.evaluate.intervals import mean_interval


class Curve(NamedTuple):
    """Mean deviation over images at each step with its 95 % t interval: lists of length S."""

    timesteps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def deviations(trajectory, float_trajectory) -> np.ndarray:
    """Relative deviation of each image at each step, float64 [S,B], of two [S,B,...] trajectories.

    Raises InputError on different shapes, values that are not finite, or a float sample of 0.
    """
    if np.shape(trajectory) != np.shape(float_trajectory) or np.ndim(trajectory) < 3:
        raise InputError(
            f"got trajectories {np.shape(trajectory)} and {np.shape(float_trajectory)}, expected "
            "equal [S,B,...]: take the steps and seeds that both arms have (shared_steps)"
        )
    rows = [_step(a, b) for a, b in zip(trajectory, float_trajectory, strict=True)]
    values = np.stack(rows) if rows else np.zeros(np.shape(trajectory)[:2])
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        step, image = bad[0]
        raise InputError(
            f"{len(bad)} of {values.size} deviations are not finite, first at step {step}, image "
            f"{image}: NaN in a trajectory, or a float sample that is 0 everywhere"
        )
    return values


def shared_steps(timesteps, float_timesteps) -> tuple[np.ndarray, np.ndarray]:
    """Places of the shared timesteps in both lists, in the arm's order: int [S'] each.

    Raises InputError where they share none.
    """
    shared, own, base = np.intersect1d(timesteps, float_timesteps, return_indices=True)
    if not shared.size:
        raise InputError(
            f"timesteps {np.asarray(timesteps).tolist()} and "
            f"{np.asarray(float_timesteps).tolist()} share none: drift needs a common one"
        )
    order = np.argsort(own)
    return own[order], base[order]


def curve(values, timesteps) -> Curve:
    """The curve of `deviations` [S,B], B >= 2, at `timesteps` [S]."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or len(values) != len(timesteps):
        raise InputError(f"got deviations {values.shape} for {len(timesteps)} timesteps")
    steps = [mean_interval(row) for row in values]
    return Curve(
        [int(t) for t in timesteps],
        [step.value for step in steps],
        [step.low for step in steps],
        [step.high for step in steps],
    )


def _step(a, b) -> np.ndarray:
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a, b))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
