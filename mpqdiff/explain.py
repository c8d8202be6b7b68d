"""Why each site got its widths: the duals of the linear programme, read site by site.

At prices p_r (damage saved by one more unit of budget r) the best choice of a site is the least
value_k + sum_r p_r cost_rk. At the LP's optimum that is the site's own choice, wherever the vertex
is not fractional; what another choice has above it is its reduced cost. Sites that are tied decide
together, so all figures of a tied site are those of its group.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.records import FLOAT_BITS, Allocation, Problem
from mpqdiff.sites import Site
from mpqdiff.solve import ties

TOLERANCE = 1e-7  # of a site's own values: interior-point prices are not exact
FRACTION = 1e-3  # bits: a mean width further than this from every width is fractional


def explain(problem: Problem, allocation: Allocation, sites: Sequence[Site]) -> list[dict]:
    """One JSON-ready row per site: its choice, its neighbours, and a verdict in words.

    `problem` as it was before ties were collapsed, `allocation` over its L sites, `sites` [L].
    A row has path, w_bits and a_bits (FLOAT_BITS: kept in float), mean_bits (at the LP's vertex, or
    None), tied (paths), `wider` and `narrower` (the next legal choice with no operand narrower or
    wider; None where there is none): {w_bits, a_bits, damage, cost {resource: ...}, priced}, all as
    changes from the row's own choice, priced = sum_r p_r cost_r; price {resource: p_r} and
    reduced_cost (both None, like `priced`, where the allocation has no prices); and `verdict`.
    Raises InputError where the three do not have the same sites, or no allocation was found.
    """
    count = len(np.asarray(problem.value))
    if not len(sites) == len(np.asarray(allocation.choice)) == count:
        raise InputError(
            f"a problem of {count} sites, an allocation of {len(np.asarray(allocation.choice))} "
            f"and {len(sites)} sites: pass those of one plan"
        )
    if not allocation.status.feasible:
        raise InputError(f"nothing to explain: {allocation.status.value}")
    groups, member = ties.collapse(problem)
    price = None if allocation.price is None else np.asarray(allocation.price, np.float64)
    mean = allocation.fractional
    rows = []
    for index, site in enumerate(sites):
        others = [s.path for s, g in zip(sites, member, strict=True) if g == member[index]]
        row = _row(groups, int(member[index]), int(np.asarray(allocation.choice)[index]), price)
        row |= {
            "path": site.path,
            "tied": [path for path in others if path != site.path],
            "mean_bits": None if mean is None else float(np.asarray(mean)[index]),
        }
        rows.append(row | {"verdict": _verdict(row, site, groups, int(member[index]))})
    return rows


def names(problem: Problem) -> tuple[str, ...]:
    """The names of the problem's resources [R]."""
    count = len(np.asarray(problem.budgets))
    return problem.names or tuple(f"resource {index}" for index in range(count))


def _row(problem: Problem, at: int, chosen: int, price: np.ndarray | None) -> dict[str, Any]:
    """The figures of choice `chosen` at site `at` of `problem`, whose ties are collapsed."""
    value, cost = np.asarray(problem.value)[at], np.asarray(problem.resources)[:, at]
    bits = np.stack([problem.w_bits, problem.a_bits], axis=1)
    legal = np.asarray(problem.legal)[at]

    def step(index: int | None) -> dict | None:
        if index is None:
            return None
        change = cost[:, index] - cost[:, chosen]
        return {
            "w_bits": int(bits[index, 0]),
            "a_bits": int(bits[index, 1]),
            "damage": float(value[index] - value[chosen]),
            "cost": dict(zip(names(problem), change.tolist(), strict=True)),
            "priced": None if price is None else float(price @ change),
        }

    priced = None if price is None else np.where(legal, value + price @ cost, np.inf)
    return {
        "w_bits": int(bits[chosen, 0]),
        "a_bits": int(bits[chosen, 1]),
        "wider": step(_wider(bits, cost, legal, chosen)),
        "narrower": step(_narrower(bits, cost, legal, chosen)),
        "price": None if price is None else dict(zip(names(problem), price.tolist(), strict=True)),
        "reduced_cost": None if priced is None else float(priced[chosen] - priced.min()),
        "best": None if priced is None else bits[int(priced.argmin())].tolist(),
    }


def _wider(bits, cost, legal, chosen: int) -> int | None:
    """The next legal choice up, and on to the widest that costs no more than it of anything."""
    above = np.flatnonzero(legal & (bits >= bits[chosen]).all(axis=1))
    above = above[above > chosen]
    if not len(above):
        return None
    dearer = (cost[:, above] > cost[:, above[:1]]).any(axis=0)
    return int(above[~dearer][-1])


def _narrower(bits, cost, legal, chosen: int) -> int | None:
    """The next legal choice down that costs less of something; the next one where none does."""
    below = np.flatnonzero(legal & (bits <= bits[chosen]).all(axis=1))
    below = below[below < chosen]
    cheaper = below[(cost[:, below] < cost[:, [chosen]]).any(axis=0)]
    found = cheaper if len(cheaper) else below
    return int(found[-1]) if len(found) else None


def _verdict(row: dict, site: Site, problem: Problem, at: int) -> str:
    """The row in one sentence."""
    several = len(set(np.asarray(problem.a_bits).tolist()) - {FLOAT_BITS}) > 1

    def label(entry) -> str:
        w, a = (entry["w_bits"], entry["a_bits"]) if isinstance(entry, dict) else entry
        if w == FLOAT_BITS:
            return "float"
        if site.kind == "product":
            return f"{a} bit"
        return f"{w} by {a} bit" if several else f"{w} bit"

    legal = np.asarray(problem.legal)[at]
    if site.pin is not None:
        text = f"pinned at {label(row)}"
    elif legal.sum() == 1:
        text = f"{label(row)}: the only legal choice"
    else:
        widths = np.asarray(problem.w_bits)[legal]
        text = f"{_reason(row, label, widths)}{_steps(row, label)}"
    return text + (f"; tied with {', '.join(row['tied'])}" if row["tied"] else "")


def _reason(row: dict, label, widths) -> str:
    """How the choice stands to the prices; ends in the colon that the steps follow."""
    own, mean = label(row), row["mean_bits"]
    if row["price"] is None:
        return f"{own}, of an allocation without prices: "
    if mean is not None and np.abs(widths - mean).min() > FRACTION:
        way = "down" if row["w_bits"] < mean else "up"
        return f"fractional at the vertex ({mean:.3g} bits), rounded {way} to {own}: "
    if row["reduced_cost"] > TOLERANCE * _scale(row):
        why = "the solver does not follow prices"
        if mean is not None:
            fitted = row["w_bits"] > mean or (row["w_bits"] == mean and row["best"] < _pair(row))
            why = "raised by what rounding left over" if fitted else "that did not fit"
        return f"{own}, though the prices ask for {label(row['best'])} ({why}): "
    down = row["narrower"]
    if row["w_bits"] == FLOAT_BITS and down and down["priced"] > 0:
        return f"kept in float: {'faster' if _slower(row) else 'cheaper'}: "
    if not any(row["price"].values()):
        return f"{own}, as no budget binds: "
    return f"{own}: "


def _pair(row: dict) -> list[int]:
    return [row["w_bits"], row["a_bits"]]


def _scale(row: dict) -> float:
    """What the row's figures are compared with: the largest of its changes."""
    steps = [step for step in (row["wider"], row["narrower"]) if step]
    return max((abs(s[key]) for s in steps for key in ("damage", "priced")), default=0.0)


def _slower(row: dict) -> bool:
    """Whether leaving float would take more seconds that are paid for."""
    price, change = row["price"].get("seconds", 0.0), row["narrower"]["cost"].get("seconds", 0.0)
    return price * change > 0


def _steps(row: dict, label) -> str:
    """What the neighbours would save or add, and cost or free."""
    parts = []
    for name in ("wider", "narrower"):
        if step := row[name]:
            damage = f"{'add' if step['damage'] > 0 else 'save'} {abs(step['damage']):.3g} damage"
            parts.append(f"{label(step)} would {damage} and {_payment(step, row['price'])}")
    return "; ".join(parts)


def _payment(step: dict, price: dict | None) -> str:
    """ "cost 0.0021 at the price of bytes", or the plain amounts where there is no price."""
    if price is None:
        changes = [f"{change:+,.6g} {name}" for name, change in step["cost"].items() if change]
        return f"take {', '.join(changes) or 'no more of anything'}"
    if not step["priced"]:
        return "cost nothing that is scarce"
    paid = [name for name, change in step["cost"].items() if change * price[name]]
    word = "cost" if step["priced"] > 0 else "free"
    return f"{word} {abs(step['priced']):.3g} at the price of {' and '.join(paid)}"


def text(rows: Sequence[dict], pattern: str) -> str:
    """A table of the rows whose path matches the regex `pattern` as a whole, for the terminal.

    Raises InputError on a pattern that is no regex or matches no path, with the nearest paths.
    """
    try:
        found = [row for row in rows if re.fullmatch(pattern, row["path"])]
    except re.error as error:
        raise InputError(f"{pattern!r} is not a regex: {error}") from error
    if not found:
        paths = [row["path"] for row in rows]
        near = [path for path in paths if pattern in path][:5]
        near = near or difflib.get_close_matches(pattern, paths, n=5, cutoff=0.0)
        raise InputError(
            f"no site matches {pattern!r} as a whole; near it: {', '.join(near)}; '.*' shows all"
        )
    price = found[0]["price"]
    lines = ["no prices: this allocation does not come from the linear programme"]
    if price is not None:
        each = ", ".join(f"{value:.4g} per unit of {name}" for name, value in price.items())
        lines = [f"price in damage: {each}"]
    table = [("site", "bits", "reduced cost", "why")]
    for row in found:
        reduced = "-" if row["reduced_cost"] is None else f"{row['reduced_cost']:.3g}"
        w, a = ("float" if b == FLOAT_BITS else b for b in _pair(row))
        table.append((row["path"], f"{w} x {a}", reduced, row["verdict"]))
    sizes = [max(len(line[i]) for line in table) for i in range(3)]
    for *cells, why in table:
        padded = (cell.ljust(size) for cell, size in zip(cells, sizes, strict=True))
        lines.append("  ".join([*padded, why]))
    return "\n".join(lines)
