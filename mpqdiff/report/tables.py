"""The tables of the report as plain cells: what is shown, and the full-precision value behind it.

Nothing here knows of HTML. A cell carries its key in `results.json` (dotted where nested) and its
value as JSON, so that the page can be checked against the file number by number.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpqdiff.quantize.pack import packed_bytes
from mpqdiff.records import FLOAT_BITS

DASH = "–"
INDICATIVE_BELOW = 2000  # images; under it a Frechet distance ranks arms poorly


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


class Column(NamedTuple):
    """A column of a table of arms. `better` is +1, -1, or 0 where neither end is better."""

    key: str
    title: str
    hint: str
    show: Callable[[Any], str]
    better: int = 0
    interval: str | None = None


def finite(value: Any, lost: list[str] | None = None, path: str = "") -> Any:
    """`value` with only JSON types in it; NaN and infinities become None, their paths go to `lost`.

    Takes dicts, sequences, numpy and jax arrays and scalars; anything else becomes its `str`.
    """
    if isinstance(value, dict):
        dot = f"{path}." if path else ""
        return {str(k): finite(v, lost, f"{dot}{k}") for k, v in value.items()}
    if hasattr(value, "tolist"):
        return finite(np.asarray(value).tolist(), lost, path)
    if isinstance(value, list | tuple):
        return [finite(item, lost, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        if lost is not None:
            lost.append(f"{path} = {value}")
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def whole(value) -> str:
    """1234567 -> "1,234,567"."""
    return f"{value:,.0f}"


def plain(value) -> str:
    """A number of a record as it is; floats to nine digits."""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def short(value, digits: int = 4) -> str:
    """`digits` significant digits, trailing zeros kept, so that a column lines up."""
    if 10**digits <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def small(value) -> str:
    """Three significant digits."""
    return short(value, 3)


def prefixed(value) -> str:
    """1.234e12 -> "1.234 T" (SI prefixes from k to E)."""
    power = 0 if value == 0 else min(max(int(math.log10(abs(value)) // 3), 0), 6)
    return f"{value / 1000**power:.4g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}".strip()


def amount(value) -> str:
    """Bytes, operations, seconds: whole with thousands from 1000 up, else six digits."""
    return whole(value) if abs(value) >= 1000 else f"{value:.6g}"


def percent(value) -> str:
    """0.0312 -> "3.1 %"."""
    return f"{100 * value:.1f} %"


def times(value) -> str:
    """1.314 -> "1.31x"."""
    return f"{value:.2f}x"


def shown(value: Any, show: Callable[[Any], str] = plain) -> str:
    """Any value as text: null is a dash, numbers by `show`, sequences item by item."""
    if value is None:
        return DASH
    if isinstance(value, list | tuple):
        return ", ".join(shown(item, show) for item in value) or DASH
    if isinstance(value, dict):
        return "; ".join(f"{key} {shown(item, show)}" for key, item in value.items()) or DASH
    return str(value) if isinstance(value, str | bool) else show(value)


QUALITY = (
    Column("avg_w_bits", "Mean bits", "over all site weights", "{:.2f}".format),
    Column("bytes", "Bytes", "all that is passed to the denoiser on the device", whole),
    Column("compression", "Compression", "float32 file over this file", times),
    Column("psnr", "PSNR, dB", "paired with the float images of the same seeds", "{:.2f}".format,
           +1, "psnr_ci"),
    Column("x0_mse", "x0 MSE", "paired with the float samples of the same seeds", small, -1),
    Column("kid", "KID", "kernel distance to the reference features", small, -1, "kid_ci"),
    Column("fid", "FID", "Frechet distance, feature space as in the protocol", short, -1,
           "fid_ci"),
    Column("damage", "Damage", "(FID - floor) / (ceiling - floor)", percent, -1),
    Column("delta_fid", "FID − float", "on the image seeds both have", short, -1),
    Column("n_images", "Images", "behind the metrics", whole),
)  # fmt: skip
SPEED = (
    Column("steps", "Steps", "denoiser steps per image", whole),
    Column("ms_per_image.median", "ms per image", "median", short, -1),
    Column("ms_per_image.iqr", "IQR, ms", "interquartile range", short),
    Column("ms_per_image.n", "Runs", "timed repetitions", whole),
    Column("ms_per_image.batch", "Batch", "images per call", whole),
    Column("speedup_same_steps", "Speed-up, same steps", "against float32 at its own steps", times,
           +1),
    Column("speedup", "Speed-up", "against the first arm", times, +1),
    Column("ms_per_image_batch_1.median", "ms, one image", "median at batch 1", short, -1),
    Column("fraction_of_peak", "Of peak", "products against the fastest measured here", percent),
    Column("energy_j", "Energy, J", "per image", small, -1),
    Column("energy_label", "Energy is", "measured, or modelled from 45 nm constants", str),
)  # fmt: skip
FURTHER = (
    Column("against_plan.x0_mse", "x0 MSE, against the plan", "paired test at 95 %", str),
    Column("perceptual", "Perceptual", "2 (1 - cosine) of features, paired", small, -1),
    Column("drift", "Drift", "relative deviation of x_t, mean over steps, paired", small, -1),
    Column("class_agreement", "Same class", "as the float image, by the evaluation network",
           percent, +1),
    Column("downstream_accuracy", "Downstream accuracy", "of classifiers trained on the samples",
           percent, +1),
    Column("ssim", "SSIM", "paired with the float images of the same seeds", short, +1),
    Column("file_bytes", "File bytes", "bit-packed", whole),
    Column("bitops", "BitOPs", "MACs x weight bits x activation bits", prefixed),
    Column("resident_bytes", "Resident bytes", "what the compiled loop keeps", whole),
    Column("peak_bytes", "Peak bytes", "of the executable", whole),
    Column("sfid", "sFID", "spatial Frechet distance", short, -1),
    Column("is", "IS", "inception score in the same feature space", short, +1),
    Column("precision", "Precision", "", short, +1),
    Column("recall", "Recall", "", short, +1),
    Column("seed", "Seed", "of the images", str),
)  # fmt: skip


def pick(arm: dict, key: str) -> Any:
    """The value at a dotted key; None where any part of it is absent or null."""
    value: Any = arm
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def number(arm: dict, key: str, show: Callable[[Any], str]) -> Number:
    """The value at `key` as text and as JSON."""
    value = pick(arm, key)
    return Number(key, shown(value, show), json.dumps(value, allow_nan=False))


def overlap(a: Sequence | None, b: Sequence | None) -> bool:
    """Whether two intervals, both known, meet."""
    if a is None or b is None or None in (*a, *b):
        return False
    return a[0] <= b[1] and b[0] <= a[1]


def ties(arms: list[dict], column: Column) -> list[tuple[str, ...]]:
    """For each arm, what the intervals say of it: best, tie with the best, tie with the float.

    A difference between overlapping intervals counts as noise (conservative: arms that share
    seeds differ by less than their intervals suggest). Arm 0 is the float model.
    """
    labels: list[list[str]] = [[] for _ in arms]
    rated = [i for i, arm in enumerate(arms) if i > 0 and arm.get(column.key) is not None]
    if column.interval is None or column.better == 0 or not rated:
        return [()] * len(arms)
    best = max(rated, key=lambda i: column.better * arms[i][column.key])
    for i in rated:
        if len(rated) > 1:
            if i == best:
                labels[i].append("best")
            elif overlap(arms[i].get(column.interval), arms[best].get(column.interval)):
                labels[i].append("tie with best")
        if overlap(arms[i].get(column.interval), arms[0].get(column.interval)):
            labels[i].append("tie with float")
    return [tuple(words) for words in labels]


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
            if value.text != DASH and column.key in ("fid", "damage") and indicative(arm):
                labels = (*labels, "indicative")
            simulated = arm.get("execution") == "simulated"
            if value.text != DASH and column.key.startswith("speedup") and simulated:
                labels = ("simulated: no claim",)
            row.append(Cell(value, interval, labels))
        rows.append(row)
    return rows


def indicative(arm: dict) -> bool:
    """Whether the arm has a Frechet distance from too few images to rank by."""
    return arm.get("fid") is not None and (arm.get("n_images") or 0) < INDICATIVE_BELOW


def rival(arms: list[dict], chosen: dict) -> tuple[dict, str] | None:
    """The best other system within the chosen arm's bytes, and how the chosen arm compares.

    Compared by paired PSNR, in words: "better", "worse", or "tie" where the intervals overlap.
    None where no such arm has a PSNR.
    """
    if chosen.get("psnr") is None or chosen.get("bytes") is None:
        return None
    others = [arm for arm in arms[1:] if arm.get("system") != chosen.get("system")
              and arm.get("psnr") is not None
              and (arm.get("bytes") or math.inf) <= chosen["bytes"]]  # fmt: skip
    if not others:
        return None
    best = max(others, key=lambda arm: arm["psnr"])
    if overlap(best.get("psnr_ci"), chosen.get("psnr_ci")) or best["psnr"] == chosen["psnr"]:
        return best, "tie"
    return best, "better" if chosen["psnr"] > best["psnr"] else "worse"


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
