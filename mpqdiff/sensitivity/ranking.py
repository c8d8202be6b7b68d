"""From manifold signals to a first plan: the combined score, its ranking, a seed within a budget.

The score of a site is the weighted mean of its signals, each by its rank among the sites (a reading
of DiffPro, arXiv 2511.11446). A ranking knows nothing of widths: `cost_table` lifts it by the
relative error of each choice.

With F(c) = #{l : C_l <= c} / L the distribution of the score over the sites (Fig. 5), a site takes
level i where F(C_l) has reached the i-th quantile: 8 bits from 0.75 on, 6 from 0.40, else 4. Under
a budget the shares 1 - q_i of the sites that reach each level grow or shrink together, q_i(s) =
1 - s (1 - q_i), as far as the budget goes. The plan changes at no more than L (K - 1) values of s,
so that the largest that fits is found among them exactly, without a tolerance.
"""

from collections.abc import Mapping, Sequence

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


def distribution(score) -> np.ndarray:
    """F(C_l) of each site, [L], in (0,1]; score [L]. Raises InputError unless finite."""
    score = np.asarray(score, np.float64)
    if score.ndim != 1 or not score.size or not np.isfinite(score).all():
        raise InputError(f"scores {score}: expected finite ones, [L]")
    return (score[None, :] <= score[:, None]).mean(axis=1)


def _reached(score, quantiles: Sequence[float]) -> np.ndarray:
    """The s from which on each site takes each level above the lowest, [L,K-1]."""
    q = np.asarray(quantiles, np.float64)
    if q.ndim != 1 or not np.all((q >= 0) & (q < 1)) or np.any(np.diff(q) < 0):
        raise InputError(f"quantiles {tuple(quantiles)}: expected ascending ones in [0,1)")
    return (1 - distribution(score))[:, None] / (1 - q)


def levels(score, *, quantiles: Sequence[float] = (0.40, 0.75)) -> np.ndarray:
    """Level of each site, int32 [L], 0 to len(quantiles): the quantiles that F has reached.

    Raises InputError on scores that are not finite and quantiles that do not ascend in [0,1).
    """
    return (_reached(score, quantiles) <= 1).sum(axis=1).astype(np.int32)


def _allowed(legal) -> np.ndarray:
    """The choice that each level means at each site, [L,K]: the widest legal one up to it, or the
    narrowest of all."""
    legal = np.asarray(legal)
    if legal.ndim != 2 or legal.dtype != bool or not legal.any(axis=1).all():
        raise InputError("legal: expected bool [L,K] with a legal choice at every site")
    index = np.where(legal, np.arange(legal.shape[1]), -1)
    widest = np.maximum.accumulate(index, axis=1)
    return np.where(widest >= 0, widest, legal.argmax(axis=1)[:, None])


def seed(
    score, cost, legal, budget: float, *, quantiles: Sequence[float] = (0.40, 0.75)
) -> tuple[np.ndarray, tuple[float, ...]]:
    """(choice int32 [L], the quantiles used) of the widest quantile plan within `budget`.

    score [L]; cost [L,K] and `budget` in one unit, less what no choice changes; legal bool [L,K],
    one choice where a site is pinned; K = len(quantiles) + 1 choices, ascending. The quantiles are
    for people and figures: infinite where not even the highest score leaves the lowest level, at
    most 0 where all sites reach one. Raises InputError on shapes that do not fit, costs that are
    negative or not finite, and a budget below the narrowest plan.
    """
    reached = _reached(score, quantiles)
    choices = _allowed(legal)
    cost = np.asarray(cost, np.float64)
    expected = (len(reached), reached.shape[1] + 1)
    if choices.shape != expected or cost.shape != expected:
        raise InputError(
            f"legal of {choices.shape} and cost of {cost.shape}: expected {expected}, one site per "
            "score and one choice more than quantiles"
        )
    used = np.take_along_axis(cost, choices, axis=1)
    if not (np.isfinite(used).all() and np.all(used >= 0)):
        raise InputError("costs of legal choices are negative or not finite: check the cost stage")
    sites = np.arange(len(cost))
    best = None
    for s in (-1.0, *np.unique(reached)):
        choice = choices[sites, (reached <= s).sum(axis=1)]
        if cost[sites, choice].sum() <= budget:
            best = choice.astype(np.int32), float(s)
    if best is None:
        raise InputError(
            f"budget {budget:.6g}: the narrowest plan costs {used[:, 0].sum():.6g}, expected at "
            "least that; raise the budget or allow narrower choices"
        )
    choice, s = best
    return choice, tuple(np.inf if s < 0 else float(1 - s * (1 - q)) for q in quantiles)


def at_least(legal, choice) -> np.ndarray:
    """`legal` [L,K] without the choices below `choice` [L].

    A greedy solver that starts from the cheapest legal choices so starts from `choice`, and
    spends what is left of the budget: the raising half of the repair.
    """
    legal, choice = np.asarray(legal), np.asarray(choice)
    if legal.ndim != 2 or choice.shape != legal.shape[:1]:
        raise InputError(
            f"legal of {legal.shape} and choice of {choice.shape}: expected [L,K], [L]"
        )
    return legal & (np.arange(legal.shape[1]) >= choice[:, None])
