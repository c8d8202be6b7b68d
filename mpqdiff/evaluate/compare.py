"""Which of two arms is better: in words, with a tie where the difference is inside the noise."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.evaluate import intervals, protocol
from mpqdiff.evaluate.evaluator import METRICS
from mpqdiff.evaluate.paired import paired_difference

# Numbers derived from a metric, with the same direction.
_DERIVED = {"delta_fid": "fid", "damage": "fid"}
_OPPOSITE = {"better": "worse", "worse": "better", "tie": "tie"}


def verdict(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    key: str = "x0_mse",
    *,
    values: tuple[Any, Any] | None = None,
    protocols: tuple[dict, dict] | None = None,
) -> str:
    """ "better", "worse" or "tie": row `a` against row `b` in metric `key`, at 95 %.

    Args:
      a, b: rows of results.json.
      values: per-image values of a and of b on shared seeds (`Estimate.values`), in one order: a
        paired test, the sharper one. None compares the rows' intervals as for independent arms:
        half-widths add in squares, which on shared seeds calls too many ties, never too few.
      protocols: of the files that the rows come from, where those are two.

    Raises InputError on an unknown metric, protocols that differ, rows of different numbers of
    images, and without `values` where a row has no interval.
    """
    better = _better(key)
    if protocols is not None:
        protocol.comparable(*protocols)
    if values is not None:
        interval = paired_difference(*values)
        return _word(interval.value, interval.half_width, better)
    missing = [i for i, row in enumerate((a, b)) if not row.get(f"{key}_ci")]
    if missing:
        known = sorted(name[:-3] for name, ends in {**a, **b}.items() if _has_ends(name, ends))
        raise InputError(
            f"rows {missing} have no {key}_ci; expected an interval: use one of {', '.join(known)}"
        )
    if a["n_images"] != b["n_images"]:
        raise InputError(
            f"got {key} at {a['n_images']} and {b['n_images']} images; bias and noise depend on "
            f"the number: {protocol.OFFER}"
        )
    halves = [intervals.Interval(row[key], *row[f"{key}_ci"]).half_width for row in (a, b)]
    return _word(a[key] - b[key], math.hypot(*halves), better)


def tie(a: Mapping[str, Any], b: Mapping[str, Any], *, key: str = "x0_mse") -> bool:
    """Whether the difference of two rows' `key` is inside the noise at 95 % (`verdict`)."""
    return verdict(a, b, key) == "tie"


def verdicts(
    names: Sequence[str], rows: Sequence[Mapping[str, Any]], values: Sequence[Mapping[str, Any]]
) -> list[dict[str, dict[str, str]]]:
    """For each of `rows`, {metric: {name of another row: `verdict` of this one against it}}.

    `values` has each row's values per image by metric (`Estimate.values`), on the same seeds in
    one order: a metric that both rows have there is decided by the paired test, one of which both
    have an interval by the intervals; the others are left out, as are rows of different numbers
    of images. Raises InputError as `verdict`.
    """
    found: list[dict[str, dict[str, str]]] = [{} for _ in rows]
    for i, j in combinations(range(len(rows)), 2):
        for key in METRICS:
            paired = key in values[i] and key in values[j]
            if paired and len(values[i][key]) != len(values[j][key]):
                continue
            if not paired and rows[i].get("n_images") != rows[j].get("n_images"):
                continue
            if not paired and not (rows[i].get(f"{key}_ci") and rows[j].get(f"{key}_ci")):
                continue
            sharp = (values[i][key], values[j][key]) if paired else None
            word = verdict(rows[i], rows[j], key, values=sharp)
            found[i].setdefault(key, {})[names[j]] = word
            found[j].setdefault(key, {})[names[i]] = _OPPOSITE[word]
    return found


def on_shared_seeds(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Both arms' arrays cut to the seeds that both have, in the order of `a`.

    Each of `a`, `b` maps names to arrays whose first axis is the image, and "seeds" to int [n] or
    [n,k], a seed of its own per image (here: the sampling seed and the image's number).
    Raises InputError where seeds are missing or repeated, lengths differ, or fewer than 2 are
    shared.
    """
    keys = []
    for name, arm in (("a", a), ("b", b)):
        if "seeds" not in arm:
            raise InputError(f"arm {name} has {', '.join(arm) or 'nothing'}; expected seeds too")
        seeds = np.asarray(arm["seeds"])
        found = [tuple(row) for row in seeds.reshape(len(seeds), -1).tolist()]
        if len(set(found)) != len(found):
            raise InputError(f"arm {name}: {len(found) - len(set(found))} seeds come twice")
        other = {key: len(rows) for key, rows in arm.items() if len(rows) != len(found)}
        if other:
            raise InputError(f"arm {name}: {len(found)} seeds, but rows of {other}")
        keys.append(found)
    place = {seed: i for i, seed in enumerate(keys[1])}
    first = [i for i, seed in enumerate(keys[0]) if seed in place]
    if len(first) < 2:
        raise InputError(
            f"arms of {len(keys[0])} and {len(keys[1])} images share {len(first)} seeds, expected "
            "at least 2: sample both from the same seed"
        )
    second = [place[keys[0][i]] for i in first]
    return (
        {key: np.asarray(rows)[first] for key, rows in a.items()},
        {key: np.asarray(rows)[second] for key, rows in b.items()},
    )


def _better(key: str) -> str:
    name = _DERIVED.get(key, key)
    if name not in METRICS:
        raise unknown_name("metric", key, {**METRICS, **_DERIVED})
    return METRICS[name].better


def _has_ends(name: str, ends) -> bool:
    return name.endswith("_ci") and bool(ends)


def _word(difference: float, half_width: float, better: str) -> str:
    if abs(difference) <= half_width:
        return "tie"
    return "better" if (difference < 0) == (better == "lower") else "worse"
