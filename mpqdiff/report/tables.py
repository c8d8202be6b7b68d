"""The tables of the report as plain cells: what is shown, and the full-precision value behind it.

Nothing here knows of HTML. A cell carries its key in `results.json` (dotted where nested) and its
value as JSON, so that the page can be checked against the file number by number.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpqdiff.quantize.pack import packed_bytes
from mpqdiff.records import FLOAT_BITS
from mpqdiff.report.columns import Column
from mpqdiff.report.numbers import DASH, pick, prefixed, shown, whole
from mpqdiff.report.verdicts import indicative, ties

FRECHET = ("fid", "damage", "delta_fid", "sfid")  # noisy and biased at few images


class Number(NamedTuple):
    """One value: `text` is shown, `value` is its JSON ("null" where there is none)."""

    key: str
    text: str
    value: str


class Cell(NamedTuple):
    """A number, its interval where there is one, and words about it ("tie with float")."""

    number: Number
    interval: tuple[Number, Number] | None = None
    labels: tuple[str, ...] = ()


def number(arm: dict, key: str, show: Callable[[Any], str]) -> Number:
    """The value at `key` as text and as JSON."""
    value = pick(arm, key)
    return Number(key, shown(value, show), json.dumps(value, allow_nan=False))


def cells(arms: list[dict], columns: Sequence[Column]) -> list[list[Cell]]:
    """The rows of a table of arms, in the order given."""
    verdicts = {column.key: ties(arms, column) for column in columns}
    rows = []
    for i, arm in enumerate(arms):
        row = []
        for column in columns:
            labels, interval = verdicts[column.key][i], None
            if column.interval and arm.get(column.interval) is not None:
                ends = dict(zip(("0", "1"), arm[column.interval], strict=True))
                low, high = (number({column.interval: ends}, f"{column.interval}.{end}",
                                    column.show) for end in ends)  # fmt: skip
                interval = (low, high)
            value = number(arm, column.key, column.show)
            if value.text != DASH and column.key in FRECHET and indicative(arm):
                labels = (*labels, "indicative")
            simulated = arm.get("execution") == "simulated"
            if value.text != DASH and column.key.startswith("speedup") and simulated:
                labels = ("simulated: no claim",)
            if column.key == "health.not_finite" and pick(arm, column.key):
                labels = ("not finite",)
            row.append(Cell(value, interval, labels))
        rows.append(row)
    return rows


def mean_bits(value) -> float | None:
    """Bits as one number: the mean over groups; the narrower of two operands; None for float."""
    if isinstance(value, dict):
        known = [mean_bits(v) for v in value.values() if v is not None]
        return min((v for v in known if v is not None), default=None)
    if isinstance(value, list | tuple):
        return float(np.mean(value)) if len(value) else None
    return None if value is None else float(value)


def site_bytes(site: dict, entry: dict) -> float:
    """Device bytes of a site with weights: every stored width is paid for, float32 takes 4.

    With `bias` (a count) in `site`, also float32 biases and scales, and column sums where
    `asymmetric`: then it is what `costs.bytes.device_bytes` counts.
    """
    parameters, out = site["parameters"], site["shape"][-1]
    bias = 4.0 * (site.get("bias") or 0)
    if entry.get("w_bits") is None:
        return 4.0 * parameters + bias
    widths = entry.get("stored_bits") or np.unique(entry["w_bits"]).tolist()
    packed = float(sum(packed_bytes((parameters // out, out), b) for b in widths))
    if site.get("bias") is None:
        return packed
    return packed + bias + 4.0 * out * len(widths) * (2 if site.get("asymmetric") else 1)


def site_rows(sites: list[dict], plan: dict) -> list[dict]:
    """One row per site: what it is, its bits under `plan`, its bytes, and why it is special."""
    rows = []
    for index, site in enumerate(sites):
        entry = plan["sites"].get(site["path"], {})
        weights = site.get("parameters") or 0
        notes = [word for flag, word in (("pinned", "pinned"), ("time_only", "time only"))
                 if site.get(flag)]  # fmt: skip
        in_float = entry.get("w_bits") is None and (weights or entry.get("a_bits") is None)
        nbytes = site_bytes(site, entry) if weights else None
        rows.append({
            "index": index + 1,
            "path": site["path"],
            "kind": site.get("kind") or DASH,
            "shape": " x ".join(str(n) for n in site.get("shape") or ()) or DASH,
            "parameters": whole(weights) if weights else DASH,
            "macs": shown(site.get("macs"), prefixed),
            "w_bits": "float" if in_float else shown(entry.get("w_bits")),
            "a_bits": "float" if in_float else shown(entry.get("a_bits")),
            "bytes": shown(nbytes, whole),
            "sort": {"parameters": weights, "macs": site.get("macs") or 0, "bytes": nbytes or 0},
            "in_float": in_float,
            "notes": ", ".join([*notes, site["reason"]] if site.get("reason") else notes),
        })  # fmt: skip
    return rows


def integer_share(sites: list[dict], remainder: list[dict], plan: dict) -> float | None:
    """The fraction of all MACs that `plan` puts in integers; None where no MACs are known."""
    macs = [site.get("macs") or 0 for site in sites]
    total = sum(macs) + sum(op.get("macs") or 0 for op in remainder)
    rows = site_rows(sites, plan)
    planned = sum(n for n, row in zip(macs, rows, strict=True) if not row["in_float"])
    return planned / total if total else None


class Sortable(NamedTuple):
    """A cell of a table that the page can sort: `text` is shown, `sort` decides its place."""

    text: str
    sort: float | None


def reasons(rows: list[dict]) -> list[dict]:
    """The rows of `mpqdiff.explain.explain` as cells: the choice, its steps, and the verdict.

    Changes are shown as what a wider step saves and costs, and a narrower one adds and frees.
    """
    return [
        {
            "path": row["path"],
            "bits": _widths(row),
            "wider": _widths(row["wider"]),
            "saves": _change(row["wider"], "damage", -1),
            "costs": _change(row["wider"], "priced", 1),
            "narrower": _widths(row["narrower"]),
            "adds": _change(row["narrower"], "damage", 1),
            "frees": _change(row["narrower"], "priced", -1),
            "reduced": Sortable(shown(row["reduced_cost"], "{:.3g}".format), row["reduced_cost"]),
            "verdict": row["verdict"],
        }
        for row in rows
    ]


def prices(rows: list[dict]) -> str:
    """The prices that `reasons` refers to, in a sentence."""
    price = rows[0]["price"] if rows else None
    if price is None:
        return "The allocation does not come from the linear programme and has no prices."
    each = ", ".join(f"{value:.4g} per unit of {name}" for name, value in price.items())
    return f"Prices, in damage: {each}."


def _widths(entry: dict | None) -> Sortable:
    if entry is None:
        return Sortable(DASH, 0)
    w, a = entry["w_bits"], entry["a_bits"]
    return Sortable("float" if w == FLOAT_BITS else f"{w} x {a}", 100 * w + a)


def _change(step: dict | None, key: str, sign: int) -> Sortable:
    """A change of a step, by the sign that the column's title has."""
    value = None if step is None or step[key] is None else sign * step[key] + 0.0  # no -0
    return Sortable(shown(value, "{:.3g}".format), value)
