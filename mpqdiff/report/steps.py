"""Figures over the steps: an activation's range by timestep, and error against the number of steps.

The first shows what a scale of its own for each step buys (DiffPro's dynamic activation
quantisation), the second the plans among which their number was chosen (`mpqdiff.joint`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.plan import runs_in_integers
from mpqdiff.quantize import activations
from mpqdiff.quantize.numerics import qmax
from mpqdiff.records import Statistics
from mpqdiff.report.figures import ACCENT, MUTED, PALETTE, Figure, layout, safe
from mpqdiff.report.numbers import amount, prefixed, shown
from mpqdiff.sites import Site

WIDE = 50.0  # errors that span more than this factor are drawn on a logarithmic axis
POINT = ("steps", "status", "predicted", "error", "plan", "front")


def varying(
    stats: Statistics,
    sites: Sequence[Site],
    a_bits: Mapping[str, Any],
    *,
    mode: str,
    static: activations.Table,
    own: activations.Table,
) -> dict | None:
    """Ranges [T,2] by timestep of the integer site whose inputs change most: path, mode, bits,
    timesteps [T], and what was `recorded`, what `static` and `own` scales can represent.

    Most: the largest share of its widest range that is left unused, averaged over the timesteps;
    products by their left operand. Tables of `sites`, in the order of `stats`, at the plan's
    `a_bits`; own is None where scales are taken from the values themselves (`online`). None where
    no site has integers, or one timestep was recorded.
    """
    timesteps = np.asarray(stats.timesteps)
    recorded = np.stack([stats.input_min[..., 0], stats.input_max[..., 0]], axis=-1)  # [T,L,2]
    extent = np.abs(recorded).max(axis=-1).astype(np.float64)
    widest = extent.max(axis=0)
    able = np.array([runs_in_integers(a_bits[site.path]) for site in sites]) & (widest > 0)
    if not able.any() or len(timesteps) < 2:
        return None
    unused = 1 - (extent / np.where(able, widest, 1)).mean(axis=0)
    index = int(np.argmax(np.where(able, unused, -np.inf)))
    path = sites[index].path
    entry, column = a_bits[path], activations.columns(sites)[path][0]
    bits = entry["lhs"] if isinstance(entry, dict) else entry
    return {
        "path": path,
        "mode": mode,
        "bits": bits,
        "timesteps": timesteps,
        "recorded": recorded[:, index],
        "static": representable(static, timesteps, column, bits),
        "own": representable(own, timesteps, column, bits) if own.timesteps.size else None,
    }


def representable(table: activations.Table, timesteps, column: int, bits: int) -> np.ndarray:
    """[T,2]: the least and the greatest value that the scale of each timestep can represent."""
    scale, zero = (np.asarray(x, np.float64)[:, column] for x in activations.row(table, timesteps))
    return np.stack([(-qmax(bits) - 1 - zero) * scale, (qmax(bits) - zero) * scale], axis=-1)


def ranges(found: dict | None) -> Figure | None:
    """`varying` over timesteps: what was recorded, and what the scales can represent."""
    if found is None:
        return None
    steps, recorded = [str(int(t)) for t in found["timesteps"]], np.asarray(found["recorded"])
    scales = {"without DAQ: one scale (static)": (found["static"], MUTED)}
    if found["own"] is not None and found["mode"] != "static":
        scales |= {f"with DAQ: {found['mode']}": (found["own"], PALETTE[1])}
    low, high = ({"type": "scatter", "mode": "lines", "x": steps, "y": recorded[:, end].tolist(),
                  "line": {"color": ACCENT, "width": 1.5},
                  "hovertemplate": "t = %{x}: %{y:.4g}<extra>recorded</extra>"}
                 for end in (0, 1))  # fmt: skip
    fill = {"name": "recorded", "fill": "tonexty", "fillcolor": "rgba(31,95,153,0.18)"}
    data = [low | {"showlegend": False}, high | fill]
    for name, (value, color) in scales.items():
        for end in (0, 1):
            data.append({
                "type": "scatter", "mode": "lines", "name": name, "legendgroup": name,
                "showlegend": end == 1, "x": steps, "y": np.asarray(value)[:, end].tolist(),
                "line": {"color": color, "width": 2, "shape": "hvh", "dash": "dash"},
                "hovertemplate": "t = %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
            })  # fmt: skip
    looks = layout(
        400,
        xaxis={"type": "category", "title": {"text": "timestep, from noise to image"}},
        yaxis={"title": {"text": "value of the activation"}},
    )
    caption = (
        f"Inputs of {found['path']}, the site whose range changes most: least to greatest value "
        f"recorded at each timestep, and the ends of what {found['bits']} bits can represent. "
        f"{filled(found)}"
    )
    return Figure("ranges", "Activation range over timesteps", caption, data, looks)


def filled(found: dict) -> str:
    """In words: which part of what the scales can represent is used, averaged over timesteps."""

    def part(value) -> str:
        return f"{100 * float(np.mean(np.ptp(found['recorded'], 1) / np.ptp(value, 1))):.0f} %"

    words = f"The values take {part(found['static'])} of the one scale's span on average"
    if found["mode"] == "online":
        return words + "; the plan takes its scales from the values as they come (online)."
    if found["mode"] == "static":
        return words + ", which is what the plan runs with."
    return words + f", {part(found['own'])} of that of the plan's own scales ({found['mode']})."


def joint(found: dict | None) -> Figure | None:
    """x0 error against the steps of `joint.json`'s points; None where none is feasible.

    Raises InputError where `found` has no such points.
    """
    if found is None:
        return None
    check(found)
    able = [point for point in found["points"] if point["error"] is not None]
    if not able:
        return None
    kinds = (
        ("beaten by another", lambda p: not p["front"] and not p["plan"], MUTED, "circle-open", 9),
        ("front", lambda p: p["front"] and not p["plan"], ACCENT, "circle", 9),
        ("the plan", lambda p: p["plan"] and not p["front"], PALETTE[1], "diamond-open", 14),
        ("the plan, on the front", lambda p: p["plan"] and p["front"], PALETTE[1], "diamond", 14),
    )
    data = [placed(name, points, color, symbol, size)
            for name, belongs, color, symbol, size in kinds
            if (points := [point for point in able if belongs(point)])]  # fmt: skip
    errors = [point["error"] for point in able]
    wide = min(errors) > 0 and max(errors) > WIDE * min(errors)
    looks = layout(
        400,
        showlegend=True,
        xaxis={"type": "log", "title": {"text": "steps"}, "tickmode": "array",
               "tickvals": [point["steps"] for point in able]},
        yaxis={"title": {"text": "x0 MSE to the float model"}, "type": "log" if wide else "linear"},
    )  # fmt: skip
    caption = (
        "Each point is a plan within the same budgets at its own number of steps, its error that "
        "of integer rollouts on the calibration seeds, with 95 % intervals. Front: no other point "
        f"is as good in all of {', '.join(found['resources'])}."
    )
    if left := [str(p["steps"]) for p in found["points"] if p["error"] is None]:
        caption += f" No plan fits the budgets at {', '.join(left)} steps."
    return Figure("joint", "Error against steps", caption, data, looks)


def check(found: dict) -> None:
    """InputError unless `found` has the form of `mpqdiff.joint.record`."""
    points = found.get("points") or [{}]
    missing = sorted({key for key in POINT for point in points if key not in point})
    if found.get("schema") != 1 or missing:
        raise InputError(
            f"joint points of schema {found.get('schema')!r} that lack {missing or 'nothing'}; "
            "expected schema 1 and whole points: plan again"
        )


def placed(name: str, points: list[dict], color: str, symbol: str, size: int) -> dict:
    """Points of one kind as markers with their intervals."""
    above = [max(point["error_ci"][1] - point["error"], 0.0) for point in points]
    below = [max(point["error"] - point["error_ci"][0], 0.0) for point in points]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [point["steps"] for point in points],
        "y": [point["error"] for point in points],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": above,
            "arrayminus": below,
            "thickness": 1.2,
            "width": 4,
        },
        "text": [spent(point) for point in points],
        "marker": {"color": color, "symbol": symbol, "size": size},
        "hovertemplate": "%{x} steps: %{y:.4g}<br>%{text}<extra>%{fullData.name}</extra>",
    }


def spent(point: dict) -> str:
    """What a point's plan takes, in words."""
    predicted = point["predicted"] or {}
    return safe(f"{shown(predicted.get('file_bytes'), amount)} file bytes, "
                f"{shown(predicted.get('bitops'), prefixed)} BitOPs, "
                f"{shown(point.get('w_bits'), '{:.2f}'.format)} mean bits")  # fmt: skip
