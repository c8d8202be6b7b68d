"""Seconds of whole samplers from the table of products (`costs.latency`).

A call of the denoiser takes seconds = alpha + beta * sum of the table's entries; `calibrate` fits
both on random plans that are really run and reports the error on others.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mpqdiff.costs.latency import steady, time_plans
from mpqdiff.costs.legality import Choice
from mpqdiff.errors import InputError
from mpqdiff.records import FLOAT_BITS


class Fit(NamedTuple):
    """seconds per denoiser call = alpha + beta * sum of table entries."""

    alpha: float
    beta: float
    r2: float  # of the plans it was fitted on

    def predict(self, sums):
        """Seconds per denoiser call of plans whose table entries add to `sums`."""
        return self.alpha + self.beta * np.asarray(sums, np.float64)


class Calibration(NamedTuple):
    """A fit, the plans it rests on and those held out: sums and measured seconds of each."""

    fit: Fit
    sums: np.ndarray
    measured: np.ndarray
    held_sums: np.ndarray
    held_measured: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """Relative errors of the held-out plans."""
        return errors(self.fit, self.held_sums, self.held_measured)


def random_plans(seed: int, legal, choices: Sequence[Choice], count: int, ties=None):
    """Random choices, int32 [count, L], of legal [L,K]: from all in float to all in integers.

    The share of integer sites rises evenly from 0 to 1 over the plans, as far as `legal` lets it;
    which sites these are, and their widths, are drawn. `ties` [L]: sites of one group choose alike.
    """
    rng = np.random.default_rng(seed)
    legal = np.asarray(legal, bool)
    groups = np.arange(len(legal)) if ties is None else np.unique(ties, return_inverse=True)[1]
    allowed = np.array([legal[groups == group].all(axis=0) for group in range(groups.max() + 1)])
    floats = np.array([choice == (FLOAT_BITS, FLOAT_BITS) for choice in choices])
    plans = np.empty((count, len(allowed)), np.int32)
    for plan, share in zip(plans, np.linspace(0, 1, count), strict=True):
        integer = rng.permutation(len(allowed)) < round(share * len(allowed))
        for group, wanted in enumerate(integer):
            own = np.flatnonzero(allowed[group] & (floats != wanted))
            plan[group] = rng.choice(own if len(own) else np.flatnonzero(allowed[group]))
    return plans[:, groups]


def fit(sums, measured) -> Fit:
    """Least squares of relative errors, outliers damped (Huber's weights), alpha at least 0.

    sums, measured [P]: table sums and seconds per denoiser call. Raises InputError on fewer than
    three plans, equal sums, times that are not positive, or times that do not grow with the sums.
    """
    sums, measured = np.asarray(sums, np.float64), np.asarray(measured, np.float64)
    if len(sums) < 3 or np.ptp(sums) == 0 or not (np.isfinite(measured) & (measured > 0)).all():
        raise InputError(
            f"latency fit: {len(sums)} plans, sums {sums}, seconds {measured}; expected at least "
            "three plans of different sums and positive times: mix float and integer sites"
        )
    design = np.stack([np.ones_like(sums), sums], axis=1) / measured[:, None]
    found = _robust(design)
    if found[0] < 0:
        found = np.array([0.0, *_robust(design[:, 1:])])
    alpha, beta = map(float, found)
    if beta <= 0:
        raise InputError(
            "latency fit: plans of longer products took less time, so the table does not predict "
            "this machine; free it of other work and measure again, or bound another resource"
        )
    left = measured - alpha - beta * sums
    return Fit(alpha, beta, float(1 - (left**2).sum() / ((measured - measured.mean()) ** 2).sum()))


def _robust(design: np.ndarray) -> np.ndarray:
    """x for which design @ x is nearest to 1, by iteratively reweighted least squares."""
    weight = np.ones(len(design))
    for _ in range(20):
        root = np.sqrt(weight)
        found = np.linalg.lstsq(design * root[:, None], root, rcond=None)[0]
        left = np.abs(design @ found - 1)
        limit = 1.345 * max(np.median(left) / 0.6745, 1e-9)
        weight = limit / np.maximum(left, limit)
    return found


def errors(fit: Fit, sums, measured) -> np.ndarray:
    """|predicted - measured| / measured of each plan."""
    measured = np.asarray(measured, np.float64)
    return np.abs(fit.predict(sums) - measured) / measured


def calibrate(
    runner: Callable[[np.ndarray], Callable[[], object]],
    seconds: np.ndarray,
    plans: np.ndarray,
    held_out: np.ndarray,
    *,
    evaluations: int,
    rounds: int = 15,
) -> Calibration:
    """Run `plans` [P,L], fit their times to the table `seconds` [L,K]; time `held_out` [Q,L] too.

    `runner(choice)` compiles a plan's sampler of `evaluations` denoiser calls: a callable without
    arguments that runs it and blocks. All are alive at once and timed in turn. Raises InputError
    as `fit` does.
    """
    every = np.concatenate([plans, held_out])
    runners = [runner(choice) for choice in tqdm(every, desc="compile plans")]
    measured = np.median(steady(time_plans(runners, rounds)), axis=1) / evaluations
    sums = seconds[np.arange(len(seconds)), every].sum(axis=1)
    count = len(plans)
    found = fit(sums[:count], measured[:count])
    return Calibration(found, sums[:count], measured[:count], sums[count:], measured[count:])
