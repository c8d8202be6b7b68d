"""The figures of the report as plain plotly.js dictionaries, and the image strips as PNG.

A figure may offer choices (a metric, a second arm): each names the traces it shows and the parts
of the layout it changes; the page makes a menu of them. Names are escaped here, because plotly
reads a little HTML in its text.
"""

import base64
import html
import io
import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from mpqdiff.errors import InputError
from mpqdiff.report.columns import fid_name, leading
from mpqdiff.report.numbers import shown
from mpqdiff.report.tables import mean_bits

INK, MUTED, ACCENT, GRID = "#1c2430", "#5b6675", "#1f5f99", "#e3e7ec"
PALETTE = (ACCENT, "#c2571a", "#2e7d4f", "#7a4fa3", "#a3324b", "#6b6f1d", "#157a83", "#8a5a2b")
SYMBOLS = {"integer": "circle", "simulated": "circle-open", "float": "square"}
SEQUENTIAL = [[0.0, "#f4f7fb"], [0.35, "#a9c6e3"], [0.7, "#3f7fbf"], [1.0, "#0b2c54"]]
METRICS = (
    ("x0_mse", "x0_mse_ci", "Paired x0 MSE, lower is better"),
    ("psnr", "psnr_ci", "Paired PSNR, dB, higher is better"),
    ("kid", "kid_ci", "KID, lower is better"),
    ("fid", "fid_ci", "{fid}, lower is better"),
)


@dataclass(frozen=True)
class Choice:
    """One entry of a figure's menu: `visible` by trace, `layout` as plotly's relayout keys."""

    label: str
    visible: list[bool]
    layout: dict


@dataclass(frozen=True)
class Figure:
    """What plotly.js draws into the element `name`, and the words around it."""

    name: str
    title: str
    caption: str
    data: list[dict]
    layout: dict
    menu: str = ""
    choices: list[Choice] = field(default_factory=list)

    def payload(self) -> dict:
        """The part that the page's script needs."""
        choices = [{"visible": c.visible, "layout": c.layout} for c in self.choices]
        return {"data": self.data, "layout": self.layout, "choices": choices}


def safe(text) -> str:
    """A name as plotly text: its own characters, never markup."""
    return html.escape(str(text), quote=False)


def layout(height: int, **changes) -> dict:
    """The look that all figures share."""
    axis = {"automargin": True, "gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID}
    base = {
        "height": height,
        "margin": {"l": 12, "r": 12, "t": 12, "b": 12},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"},
        "xaxis": axis,
        "yaxis": axis,
    }
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(base.get(key), dict) else value
    return base


def tall(sites: int) -> int:
    """Height in pixels of a figure with one line per site; plotly thins labels that do not fit."""
    return int(np.clip(110 + 19 * sites, 240, 1800))


def quality(results: dict, chosen: dict) -> Figure | None:
    """Each metric against device bytes, all arms; the float model is a line and its interval."""
    arms, order, name = results["arms"], leading(results), fid_name(results)
    metrics = [m for m in METRICS if any(pair(arm, m[0]) for arm in arms[1:])]
    if not metrics:
        return None
    metrics.sort(key=lambda metric: order.index(metric[0]))
    placed = [arm["bytes"] for arm in arms[1:] if any(pair(arm, m[0]) for m in metrics)]
    span = [0.97 * min(placed), 1.03 * max(placed)]
    data, shows = [], []
    for key, interval, _ in metrics:
        points = [arm for arm in arms[1:] if pair(arm, key)]
        data += float_line(arms[0], key, interval, span)
        data += [point(arm, key, interval, arms.index(arm), arm is chosen) for arm in points]
        shows += [key] * (len(data) - len(shows))
    titles = [title.format(fid=name) for _, _, title in metrics]
    choices = [Choice(title, [show == key for show in shows], {"yaxis.title.text": safe(title)})
               for title, (key, _, _) in zip(titles, metrics, strict=True)]  # fmt: skip
    for trace, visible in zip(data, choices[0].visible, strict=True):
        trace["visible"] = visible
    looks = layout(
        460,
        xaxis={"title": {"text": "device bytes"}, "range": span},
        yaxis={"title": {"text": safe(titles[0])}},
    )
    caption = (
        "Every quantised arm that has the metric. Bars are the arms' own intervals; the dashed "
        "line is the float model, whose bytes are off to the right. Filled: integer execution; "
        "open: simulated. The plan of this report is larger."
    )
    return Figure("quality", "Quality against bytes", caption, data, looks, "Metric", choices)


def pair(arm: dict, key: str) -> bool:
    """Whether an arm can be placed: it has bytes and the metric."""
    return arm.get("bytes") is not None and arm.get(key) is not None


def point(
    arm: dict, key: str, interval: str | None, index: int, chosen: bool, x: float | None = None
) -> dict:
    """One arm as a marker with its interval, at its bytes or at `x`."""
    trace = {
        "type": "scatter",
        "mode": "markers",
        "name": safe(arm["arm"]),
        "x": [arm["bytes"] if x is None else x],
        "y": [arm[key]],
        "marker": {
            "size": 15 if chosen else 9,
            "symbol": SYMBOLS.get(arm.get("execution") or "", "x"),
            "color": PALETTE[(index - 1) % len(PALETTE)],
            "line": {"width": 2, "color": PALETTE[(index - 1) % len(PALETTE)]},
        },
        "hovertemplate": "%{fullData.name}<br>%{x:,} bytes<br>%{y:.5g}<extra></extra>",
    }
    low, high = arm.get(interval or "") or (None, None)
    if low is not None and high is not None:
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [max(high - arm[key], 0.0)],
            "arrayminus": [max(arm[key] - low, 0.0)],
            "thickness": 1.2,
            "width": 4,
        }
    return trace


def float_line(arm: dict, key: str, interval: str | None, span: list) -> list[dict]:
    """The float model across the arms' range of bytes: a dashed line, and its interval a band."""
    if arm.get(key) is None:
        return []
    left, right = span
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": safe(arm["arm"]),
        "x": [left, right],
        "y": [arm[key]] * 2,
        "line": {"color": MUTED, "dash": "dash", "width": 1.5},
    }
    low, high = arm.get(interval or "") or (None, None)
    if low is None or high is None:
        return [line]
    band = {"type": "scatter", "mode": "lines", "x": [left, right, right, left],
            "y": [low, low, high, high], "fill": "toself", "fillcolor": "rgba(91,102,117,0.12)",
            "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}  # fmt: skip
    return [band, line]


def bits(sites: list[dict], plans: dict[str, dict]) -> Figure:
    """Bits by site: the first plan's bars, and those of any one other plan beside them."""
    data = [bars(sites, name, plan, i) for i, (name, plan) in enumerate(plans.items())]
    names = list(plans)
    choices = [Choice("the plan alone" if i == 0 else f"the plan and {name}",
                      [j in (0, i) for j in range(len(names))], {})
               for i, name in enumerate(names)]  # fmt: skip
    for trace, visible in zip(data, choices[0].visible, strict=True):
        trace["visible"] = visible
    looks = layout(
        tall(len(sites)),
        bargap=0.25,
        showlegend=True,
        xaxis={"side": "top", "dtick": 2, "rangemode": "tozero"},
        yaxis={"type": "category", "autorange": "reversed", "ticksuffix": " "},
        legend={"y": 0, "yanchor": "top"},
    )
    caption = (
        "Bits of the weights, in order of depth; hatched bars are products of activations, which "
        "have no weights, at their narrower operand. No bar: left in float."
    )
    menu = "Show" if len(choices) > 1 else ""
    return Figure("bits", "Bits by site", caption, data, looks, menu, choices)


def bars(sites: list[dict], name: str, plan: dict, index: int) -> dict:
    """One plan's bits as horizontal bars over the sites."""
    entries = [plan["sites"].get(site["path"], {}) for site in sites]
    operands = [entry.get("w_bits") is None and not site.get("parameters")
                for site, entry in zip(sites, entries, strict=True)]  # fmt: skip
    return {
        "type": "bar",
        "orientation": "h",
        "name": safe(name),
        "y": [safe(site["path"]) for site in sites],
        "x": [mean_bits(entry.get("a_bits" if operand else "w_bits"))
              for entry, operand in zip(entries, operands, strict=True)],
        "text": [f"weights {shown(e.get('w_bits'))}, activations {shown(e.get('a_bits'))}"
                 + (", pinned" if site.get("pinned") else "")
                 for site, e in zip(sites, entries, strict=True)],
        "textposition": "none",
        "hovertemplate": "%{y}<br>%{text}<extra>%{fullData.name}</extra>",
        "marker": {"color": PALETTE[index % len(PALETTE)],
                   "pattern": {"shape": ["/" if operand else "" for operand in operands]}},
    }  # fmt: skip


def importance(value: np.ndarray, timesteps, paths: list[str], score: str) -> Figure:
    """Heat map of `value` [T,L]: sites down, timesteps across in the sampler's order."""
    scale = ""
    span = value[np.isfinite(value)]
    if span.size and span.min() > 0 and span.max() > 100 * span.min():
        value, scale = np.log10(value), " Colour is its log10."
    trace = heat(np.asarray(value).T)
    trace |= {"x": [str(int(t)) for t in timesteps], "y": [safe(path) for path in paths],
              "hovertemplate": "%{y}<br>t = %{x}: %{z:.4g}<extra></extra>"}  # fmt: skip
    looks = layout(
        tall(len(paths)) + 20,
        xaxis={"type": "category", "title": {"text": "timestep, from noise to image"},
               "showgrid": False},
        yaxis={"type": "category", "autorange": "reversed", "ticksuffix": " ", "showgrid": False},
    )  # fmt: skip
    caption = f"The score '{score}' of each site at each recorded timestep.{scale}"
    return Figure("importance", "Importance over timesteps", caption, [trace], looks)


def orthogonality(matrix: np.ndarray, paths: list[str]) -> Figure:
    """Heat map of the site-by-site metric [L,L], averaged over the recorded timesteps."""
    numbers = [str(i + 1) for i in range(len(paths))]
    names = [f"{safe(path)} · {number}" for path, number in zip(paths, numbers, strict=True)]
    trace = heat(matrix) | {
        "x": numbers, "y": names,
        "hovertemplate": "%{y} with %{x}: %{z:.4g}<extra></extra>"}  # fmt: skip
    looks = layout(
        int(np.clip(tall(len(paths)) + 120, 420, 900)),
        xaxis={"type": "category", "showgrid": False, "constrain": "domain"},
        yaxis={"type": "category", "autorange": "reversed", "ticksuffix": " ", "showgrid": False},
    )
    caption = (
        "How alike the outputs of two sites are over the calibration set, averaged over "
        "timesteps: 1 on the diagonal, near 0 for unrelated sites. Columns are numbered as rows."
    )
    return Figure("orthogonality", "Orthogonality matrix", caption, [trace], looks)


def heat(value: np.ndarray) -> dict:
    """A heat map trace; four significant digits are more than a colour can show."""
    rows = [[float(f"{v:.4g}") if math.isfinite(v) else None for v in row] for row in value]
    bar = {"orientation": "h", "thickness": 10, "ypad": 6, "nticks": 6, "outlinewidth": 0,
           "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"}  # fmt: skip
    return {"type": "heatmap", "z": rows, "colorscale": SEQUENTIAL, "colorbar": bar, "xgap": 1,
            "ygap": 1}  # fmt: skip


def strip(images: np.ndarray, gap: int = 1) -> tuple[str, int, int]:
    """Images uint8 [n,H,W,C], C 1 or 3, side by side: (PNG as a data URL, width, height)."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8:
        raise InputError(
            f"images of shape {images.shape}, {images.dtype}; expected uint8 [n,H,W,C], C 1 or 3"
        )
    padded = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    row = np.concatenate(list(padded), axis=1)[:, :-gap]
    buffer = io.BytesIO()
    Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row).save(buffer, "png", optimize=True)
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return url, row.shape[1], row.shape[0]
