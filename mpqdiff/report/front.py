"""The figure of a Pareto front: what the solver predicts, and under it what was measured."""

from typing import NamedTuple

from mpqdiff.errors import InputError
from mpqdiff.report.figures import ACCENT, MUTED, Choice, Figure, layout, point
from mpqdiff.report.numbers import pick


class Axis(NamedTuple):
    """A resource as an axis: its title, and where an arm of results.json has it measured."""

    title: str
    key: str | None = None
    factor: float = 1.0  # from the arm's unit to the resource's


AXES = {
    "bytes": Axis("device bytes", "bytes"),
    "file_bytes": Axis("file bytes", "file_bytes"),
    "bitops": Axis("BitOPs per image", "bitops"),
    "seconds": Axis("seconds per image", "ms_per_image.median", 1e-3),
    "joules": Axis("joules per image", "energy_j"),
    "mean_bits": Axis("mean weight bits of the unpinned sites"),
}
WIDE = 50.0  # a damage that spans more than this factor is drawn on a logarithmic axis


def pareto(front: dict, arms: list[dict], chosen: dict | None) -> Figure | None:
    """Predicted damage against each resource of `pareto.json`, and x0 MSE of arms under it.

    `arms` of results.json, the float one first (none: nothing was measured); `chosen` is marked.
    None where no point is feasible. Raises InputError where `front` is no front.
    """
    check(front)
    points = [point for point in front["points"] if point["sites"]]
    if not points:
        return None
    data, choices, shown = [], [], []
    for name in front["resources"]:
        axis = AXES.get(name, Axis(name))
        ran = measured(arms, axis, chosen)
        traces = [*bounds(points, name), plans(points, name), *ran]
        data, shown = data + traces, shown + [name] * len(traces)
        choices.append(Choice(axis.title, [], panels(axis, bool(ran), chosen)))
    for name, choice in zip(front["resources"], choices, strict=True):
        choice.visible.extend(show == name for show in shown)
    for trace, visible in zip(data, choices[0].visible, strict=True):
        trace["visible"] = visible
    below = any("yaxis" in trace for trace in data)
    looks = layout(
        560 if below else 380,
        xaxis={"anchor": "free", "position": 0},
        yaxis={"title": {"text": "predicted damage"}, "type": scale(points)},
        legend={"y": -0.16 if below else -0.25},
    )
    looks["yaxis2"] = {**layout(0)["yaxis"], "title": {"text": "measured x0 MSE"}}
    caption = (
        "What the solver expects of the plan at each budget (filled: it reaches the bound), and "
        "the bound that no plan within the budget can beat; not measurements."
    )
    if below:
        caption += " Below: what the arms measured, on the same horizontal axis."
    if chosen is not None:
        caption += " The dashed line marks the plan of this report."
    if left_out := len(front["points"]) - len(points):
        caption += f" {left_out} of {len(front['points'])} budgets fit no plan and are not drawn."
    menu = "Against" if len(choices) > 1 else ""
    title = "Predicted damage against budget"
    return Figure("pareto", title, caption, data, changed(looks, choices[0].layout), menu, choices)


def check(front: dict) -> None:
    """InputError unless `front` has the form of `mpqdiff.pareto.points`."""
    keys = ("budgets", "predicted", "objective", "bound", "gap", "status", "average_bits", "sites")
    points = front.get("points") or [{}]
    missing = [key for key in keys for one in points if key not in one]
    if front.get("schema") != 1 or not front.get("resources") or missing:
        raise InputError(
            f"a pareto front of schema {front.get('schema')!r} whose points lack "
            f"{sorted(set(missing)) or 'nothing'}; expected schema 1, resources and whole points: "
            "plan the front again"
        )


def scale(points: list[dict]) -> str:
    """The kind of axis that damage needs: "log" where it is positive and spans decades."""
    values = [one[key] for one in points for key in ("objective", "bound")]
    return "log" if min(values) > 0 and max(values) > WIDE * min(values) else "linear"


def bounds(points: list[dict], resource: str) -> list[dict]:
    """The bound against the budget, as a line, where budgets of `resource` differ."""
    line = sorted((one["budgets"][resource], one["bound"]) for one in points)
    if line[0][0] == line[-1][0]:
        return []
    return [{"type": "scatter", "mode": "lines", "name": "lower bound",
             "x": [x for x, _ in line], "y": [y for _, y in line], "line": {"color": ACCENT},
             "hovertemplate": "budget %{x:,}<br>bound %{y:.5g}<extra></extra>"}]  # fmt: skip


def plans(points: list[dict], resource: str) -> dict:
    """The plans against what they spend of `resource`, as dots."""
    symbols = ["circle" if one["status"] == "optimal" else "circle-open" for one in points]
    words = [f"{one['average_bits']:.3g} mean bits, {one['status'].replace('_', ' ')}, gap "
             f"{one['gap']:.3g}" for one in points]  # fmt: skip
    return {"type": "scatter", "mode": "markers", "name": "plans",
            "x": [one["predicted"][resource] for one in points],
            "y": [one["objective"] for one in points], "text": words,
            "marker": {"color": ACCENT, "symbol": symbols, "size": 7},
            "hovertemplate": "%{x:,}<br>%{y:.5g}<br>%{text}<extra></extra>"}  # fmt: skip


def measured(arms: list[dict], axis: Axis, chosen: dict | None) -> list[dict]:
    """The quantised arms that have both the resource and an x0 MSE, in the lower panel."""
    found = []
    for index, arm in enumerate(arms):
        x = None if axis.key is None else pick(arm, axis.key)
        if index and x is not None and arm.get("x0_mse") is not None:
            trace = point(arm, "x0_mse", None, index, arm is chosen, x=x * axis.factor)
            found.append(trace | {"yaxis": "y2"})
    return found


def panels(axis: Axis, two: bool, chosen: dict | None) -> dict:
    """Plotly's relayout keys that put the panels for one resource in place."""
    at = None if chosen is None or axis.key is None else pick(chosen, axis.key)
    line = [] if at is None else [
        {"type": "line", "x0": at * axis.factor, "x1": at * axis.factor, "y0": 0, "y1": 1,
         "yref": "paper", "layer": "below",
         "line": {"color": MUTED, "dash": "dash", "width": 1.5}}]  # fmt: skip
    return {
        "xaxis.title.text": axis.title,
        "yaxis.domain": [0.5, 1.0] if two else [0.0, 1.0],
        "yaxis2.domain": [0.0, 0.42] if two else [0.0, 0.01],
        "yaxis2.visible": two,
        "shapes": line,
    }


def changed(looks: dict, keys: dict) -> dict:
    """`looks` with plotly's dotted relayout keys set, such as "xaxis.title.text"."""
    for key, value in keys.items():
        *path, last = key.split(".")
        target = looks
        for name in path:
            target = target.setdefault(name, {})
        target[last] = value
    return looks
