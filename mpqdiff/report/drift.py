"""The figure of drift: how far each arm's trajectory is from the float model's, step by step."""

from mpqdiff.report.figures import PALETTE, Figure, layout, safe


def drift(arms: list[dict], chosen: dict) -> Figure | None:
    """`drift_curve` of the arms over timesteps, from noise to image; None where none has one."""
    traces = []
    for index, arm in enumerate(arms):
        curve = arm.get("drift_curve")
        if not curve:
            continue
        steps = curve["timesteps"]
        color = PALETTE[(index - 1) % len(PALETTE)]
        above = [high - mean for high, mean in zip(curve["high"], curve["mean"], strict=True)]
        traces.append({
            "type": "scatter",
            "mode": "lines+markers",
            "name": safe(arm["arm"]),
            "x": [str(int(t)) for t in steps],
            "y": curve["mean"],
            "error_y": {"type": "data", "array": above, "thickness": 1, "width": 2},
            "line": {"color": color, "width": 3 if arm is chosen else 1.5},
            "marker": {"size": 5},
            "hovertemplate": "t = %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
        })  # fmt: skip
    if not traces:
        return None
    looks = layout(
        380,
        xaxis={"type": "category", "title": {"text": "timestep, from noise to image"}},
        yaxis={"title": {"text": "relative deviation of x_t"}, "rangemode": "tozero"},
    )
    caption = (
        "How far each arm's x_t is from the float model's of the same seed, at the timesteps that "
        "both visit: mean over images with 95 % intervals. The plan of this report is thicker."
    )
    return Figure("drift", "Drift from the float trajectory", caption, traces, looks)
