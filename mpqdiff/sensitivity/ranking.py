"""From manifold signals to one score per site, its distribution and its table of damage.

The score of a site is the weighted mean of its signals, each by its rank among the sites (a reading
of DiffPro, arXiv 2511.11446). A ranking knows nothing of widths: `cost_table` lifts it by the
relative error of each choice. `solve.quantile` makes a first plan of it.
"""

from collections.abc import Mapping

import numpy as np

from mpqdiff.errors import InputError, unknown_name

SIGNALS = ("energy", "pca", "dimension", "growth")


def by_rank(values) -> np.ndarray:
    """Ranks over the sites, [...,L], from 0 to 1; equal values share the mean of their ranks."""
    values = np.asarray(values, np.float64)
    below = (values[..., None, :] < values[..., :, None]).sum(axis=-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(axis=-1)
    last = values.shape[-1] - 1
    return (below + (equal - 1) / 2) / last if last else np.full(values.shape, 0.5)


def by_range(values) -> np.ndarray:
    """Values over the sites, [...,L], from 0 (the least) to 1; all 0.5 where they are equal."""
    values = np.asarray(values, np.float64)
    least = values.min(axis=-1, keepdims=True)
    spread = values.max(axis=-1, keepdims=True) - least
    scaled = (values - least) / np.where(spread > 0, spread, 1.0)
    return np.where(spread > 0, scaled, 0.5)


NORMALISATIONS = {"rank": by_rank, "min_max": by_range}


def combined(
    signals: Mapping, *, weights: Mapping | None = None, normalisation: str = "rank"
) -> np.ndarray:
    """The score of each site, [L] or [T,L], in [0,1]: the weighted mean of its signals.

    signals: of `SIGNALS` those to use, each [L] or [T,L], normalised over the sites (of each
    timestep). weights: one per signal, at least 0; equal ones where None, else scaled to sum 1.
    Raises InputError on unknown names, shapes that differ, and values that are not finite.
    """
    if normalisation not in NORMALISATIONS:
        raise unknown_name("normalisation", normalisation, NORMALISATIONS)
    for name in signals:
        if name not in SIGNALS:
            raise unknown_name("manifold signal", name, SIGNALS)
    weights = dict.fromkeys(signals, 1.0) if weights is None else weights
    share = np.array([weights.get(name, np.nan) for name in signals], np.float64)
    if weights.keys() != signals.keys() or not np.all(share >= 0) or not 0 < share.sum() < np.inf:
        raise InputError(
            f"weights {dict(weights)} of signals {list(signals)}: expected one per signal, at "
            "least 0 and not all 0"
        )
    arrays = {name: np.asarray(value, np.float64) for name, value in signals.items()}
    shapes = {name: value.shape for name, value in arrays.items()}
    if len(set(shapes.values())) > 1 or not all(
        1 <= len(s) <= 2 and np.prod(s) for s in shapes.values()
    ):
        raise InputError(f"signals of shapes {shapes}, expected [L] or [T,L], all the same")
    bad = [name for name, value in arrays.items() if not np.isfinite(value).all()]
    if bad:
        raise InputError(f"signals {bad} are not finite: check the moments of those sites")
    parts = np.stack([NORMALISATIONS[normalisation](value) for value in arrays.values()])
    return np.tensordot(share / share.sum(), parts, axes=1)


def cost_table(score, error) -> np.ndarray:
    """Expected damage [L,K]: score [L] times `relative_error` [L,K] of each choice.

    Raises InputError on shapes that do not fit and entries that are negative or not finite.
    """
    score, error = np.asarray(score, np.float64), np.asarray(error, np.float64)
    if score.ndim != 1 or error.ndim != 2 or len(score) != len(error):
        raise InputError(f"score of {score.shape}, errors of {error.shape}: expected [L], [L,K]")
    table = score[:, None] * error
    if not (np.isfinite(table).all() and np.all(score >= 0) and np.all(error >= 0)):
        raise InputError("score or errors are negative or not finite: check the moments")
    return table
