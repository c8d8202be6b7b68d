"""The quantile plan: a first allocation from one score per site, within a budget.

With F(c) = #{l : C_l <= c} / L the distribution of the score over the sites (DiffPro, arXiv
2511.11446, Fig. 5), a site takes level i where F(C_l) has reached the i-th quantile: 8 bits from
0.75 on, 6 from 0.40, else 4. Under a budget the shares 1 - q_i of the sites that reach each level
grow or shrink together, q_i(s) = 1 - s (1 - q_i), as far as the budget goes. The plan changes at no
more than L (K - 1) values of s, so that the largest that fits is found among them exactly, without
a tolerance.
"""

from collections.abc import Sequence

import numpy as np

from mpqdiff.errors import InputError


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
