"""The control that looks at layer sizes alone: small layers wide, large layers narrow.

The Euclidean projection of "all at the widest" on the budget plane,

    x_l = clip(hi - nu n_l, lo, hi),   nu >= 0 such that sum_l n_l x_l = budget.

OMPQ's released bit lists follow from it without any orthogonality: there theta underflows and the
solver stops at this point (its roundings are `round_search` and `round_nearest`). A score is
worth its name only where it beats this rule at equal bytes.
"""

from collections.abc import Callable

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.records import Allocation, Problem
from mpqdiff.solve.certify import begin, certify
from mpqdiff.solve.feasible import every_step, fill, fits, rows

BISECTIONS = 200  # more than the exponent range of float64 can need


def _bisect(n, lo, hi, fits: Callable[[np.ndarray], bool]) -> np.ndarray:
    """The largest point x = clip(hi - nu n, lo, hi), nu >= 0, that `fits`, [L]."""
    hi = np.broadcast_to(np.asarray(hi, np.float64), n.shape)
    if fits(hi):
        return hi
    near, far = 0.0, float(np.max((hi - lo) / n))
    for _ in range(BISECTIONS):
        nu = (near + far) / 2
        near, far = (near, nu) if fits(np.clip(hi - nu * n, lo, hi)) else (nu, far)
    return np.clip(hi - far * n, lo, hi)


def projection(n, budget: float, lo, hi) -> np.ndarray:
    """Bits x [L] for sizes n [L] (parameters) under sum n x <= budget (bits), lo <= x <= hi.

    Raises InputError on sizes below 1 and on a budget below sum n lo, which it states.
    """
    n = np.asarray(n, np.float64)
    if not (n >= 1).all():
        raise InputError("sizes must be at least 1 parameter each")
    least = float((n * lo).sum())
    if budget < least:
        raise InputError(f"budget {budget:.9g} bits is below the minimum {least:.9g}: raise it")
    return _bisect(n, lo, hi, lambda x: float(n @ x) <= budget)


def round_search(x, n) -> np.ndarray:
    """OMPQ's search over floor and ceiling, last layer first and ceiling first: int64 [L].

    The greatest total sum n b not above sum n x, the first found among equals. A subset-sum
    search with bounds: a few thousand nodes for the published tables, exponential at worst.
    """
    x, n = np.asarray(x, np.float64), np.asarray(n, np.float64)
    low, high = np.floor(x + 1e-9), np.ceil(x - 1e-9)  # an x at its bound is whole
    limit = float(n @ x) * (1 + 1e-12)
    least = np.concatenate([[0.0], np.cumsum(n * low)])
    most = np.concatenate([[0.0], np.cumsum(n * high)])
    best, best_total, current = low.copy(), -1.0, low.copy()

    def descend(layer: int, total: float) -> None:
        nonlocal best, best_total
        if total + least[layer + 1] > limit or total + most[layer + 1] <= best_total:
            return
        if layer < 0:
            best, best_total = current.copy(), total
            return
        for bits in dict.fromkeys((high[layer], low[layer])):
            current[layer] = bits
            descend(layer - 1, total + n[layer] * bits)

    descend(len(n) - 1, 0.0)
    return best.astype(np.int64)


def round_nearest(x) -> np.ndarray:
    """OMPQ's other rounding: nearest integer, [L]. It can exceed the budget."""
    return np.rint(x).astype(np.int64)


def widest_activations(w_bits: np.ndarray, a_bits: np.ndarray, legal: np.ndarray) -> np.ndarray:
    """Of the legal choices of equal w_bits only that of most a_bits, bool [L,K]."""
    keep = np.zeros_like(legal)
    for width in np.unique(w_bits):
        same = legal & (w_bits == width)
        best = np.where(same, a_bits, -1).argmax(axis=1)
        keep[np.arange(len(legal)), best] |= same.any(axis=1)
    return keep


def _interpolation(bits, cost, legal) -> Callable[[np.ndarray], np.ndarray]:
    """Spending [R] at widths x [L], linear in bits between the legal choices of each site.

    bits [K] ascending, cost [R,L,K], legal [L,K]; a site's x is within its legal widths.
    """
    grid = np.unique(bits)
    curves = [
        [np.interp(grid, bits[ok], c[ok]) for c, ok in zip(one, legal, strict=True)] for one in cost
    ]
    curve = np.asarray(curves)  # [R,L,grid]

    def spending(x: np.ndarray) -> np.ndarray:
        right = np.clip(np.searchsorted(grid, x, side="right"), 1, max(len(grid) - 1, 1))
        low, high = grid[right - 1], grid[np.minimum(right, len(grid) - 1)]
        share = np.where(high > low, (x - low) / np.where(high > low, high - low, 1), 0.0)
        ends = [
            np.take_along_axis(curve, np.minimum(at, len(grid) - 1)[None, :, None], axis=2)[..., 0]
            for at in (right - 1, right)
        ]
        return ((1 - share) * ends[0] + share * ends[1]).sum(axis=1)

    return spending


def choose(problem: Problem) -> np.ndarray:
    """Projection on the budgets, snapped down to legal choices, then raised by what was cut off;
    returns int32 [L].

    The widths are w_bits, each with the widest activations that are legal there; "keep float"
    counts as 32. Between choices the cost is interpolated in bits. nu grows until every budget
    holds: the scarcest decides. The steps left over go to the sites that lost most by snapping,
    then to the smaller. Where no nu is enough, sites are raised from `certify.begin`, and with
    any activations.
    """
    table = rows(problem)
    bits = np.asarray(problem.w_bits, np.float64)
    widest = widest_activations(bits, np.asarray(problem.a_bits), table.legal)
    n = np.maximum(np.asarray(problem.parameters, np.float64), 1.0)
    lo = np.where(widest, bits, np.inf).min(axis=1)
    hi = np.where(widest, bits, -np.inf).max(axis=1)
    spending = _interpolation(bits, table.cost, widest)
    x = _bisect(n, lo, hi, lambda x: bool((spending(x) <= table.limit).all()))
    reached = widest & (bits <= (x + 1e-9)[:, None])
    choice = np.where(reached, np.arange(len(bits)), 0).max(axis=1)
    if fits(table, choice):
        table = table._replace(legal=widest)
    else:  # costs that do not rise with bits, or activations that are too wide everywhere
        choice = begin(problem)
    lost = np.round(x - bits[choice], 9)
    order = every_step(table, np.lexsort((n, -lost)))
    return fill(table, choice, order)


def solve(problem: Problem) -> Allocation:
    """The record of `choose`."""
    return certify(problem, choose(problem))
