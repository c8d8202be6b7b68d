"""The figures of the manifold score: how far each site's activations fill their features.

`signals` are those of `mpqdiff.scoring.manifold_signals`: arrays [M] by name, of the sites at which
something is decided, and the spectrum [M,D] of their inputs. The figures are those of DiffPro
(arXiv 2511.11446): principal directions of the most sensitive layers, energy against PCA
sensitivity, distribution of the combined score.
"""

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.report.figures import GRID, MUTED, PALETTE, SEQUENTIAL, Figure, layout, safe
from mpqdiff.report.tables import mean_bits

SIGNALS = ("energy", "pca", "dimension", "k", "features", "combined", "distribution")
MOST = 6  # sites whose spectra are drawn
WIDE = 50.0  # values that span more than this factor are drawn on a logarithmic axis


def drawn(signals: dict | None, plan: dict) -> list[Figure]:
    """The three figures; none where the recipe has no manifold score.

    Raises InputError where the signals are not of the same sites, or the plan lacks one of these.
    """
    if signals is None:
        return []
    check(signals, plan)
    return [spectra(signals), energy(signals), distribution(signals, plan)]


def check(signals: dict, plan: dict) -> None:
    """InputError unless all `signals` are of the same sites, and the plan has these."""
    paths = [str(path) for path in signals["paths"]]
    sizes = {name: np.shape(signals[name]) for name in SIGNALS}
    sizes |= {"spectrum": np.shape(signals["spectrum"])[:1]}
    wrong = {name: size for name, size in sizes.items() if size != (len(paths),)}
    if wrong or not paths:
        raise InputError(
            f"manifold signals of {len(paths)} sites with shapes {wrong}: expected one value per "
            "site, and one site or more; score again"
        )
    if unknown := sorted(set(paths) - set(plan["sites"])):
        raise InputError(f"manifold signals of sites {unknown} that the plan lacks; both must "
                         "come from the same model")  # fmt: skip


def spectra(signals: dict) -> Figure:
    """Share of the variance in the first directions of the sites of highest score, k marked."""
    lines, marks = [], []
    order = np.argsort(-np.asarray(signals["combined"]), kind="stable")[:MOST]
    for index, site in enumerate(order):
        size, k = int(signals["features"][site]), int(signals["k"][site])
        share = cumulative(signals["spectrum"][site][:size])
        name, color = safe(signals["paths"][site]), PALETTE[index % len(PALETTE)]
        lines.append({
            "type": "scatter", "mode": "lines", "name": name, "line": {"color": color},
            "x": list(range(1, size + 1)), "y": share,
            "hovertemplate": "%{x} directions: %{y:.4f}<extra>%{fullData.name}</extra>",
        })  # fmt: skip
        marks.append({
            "type": "scatter", "mode": "markers", "name": name, "showlegend": False,
            "x": [k], "y": [share[k - 1]], "marker": {"color": color, "size": 9},
            "text": [f"k = {k} of {size}, score {signals['combined'][site]:.3g}"],
            "hovertemplate": "%{text}<extra>%{fullData.name}</extra>",
        })  # fmt: skip
    looks = layout(
        400,
        xaxis={"type": "log", "title": {"text": "principal directions of the inputs"}},
        yaxis={"title": {"text": "share of the variance"}, "range": [0, 1.02]},
    )
    caption = (
        f"The {len(order)} sites of highest combined score, all timesteps together. A dot is at k, "
        "the least number of directions that hold the share of the variance which the score asks "
        "for (score.manifold.share; k95 where that is 0.95)."
    )
    return Figure("spectra", "PCA of the most sensitive sites", caption, lines + marks, looks)


def cumulative(values) -> list[float]:
    """Share of the sum in the first 1, 2, ... of `values` [D], to six digits."""
    total = np.cumsum(np.asarray(values, np.float64))
    return [float(f"{share:.6g}") for share in total / total[-1]]


def energy(signals: dict) -> Figure:
    """log10 of the inputs' power against PCA sensitivity, one marker per site sized by k / D."""
    part = np.asarray(signals["dimension"], np.float64)
    pca = np.asarray(signals["pca"], np.float64)
    words = [
        f"k = {int(k)} of {int(features)}, score {score:.3g}"
        for k, features, score in zip(
            signals["k"], signals["features"], signals["combined"], strict=True
        )
    ]
    bar = {"title": {"text": "k / D"}, "thickness": 12, "outlinewidth": 0}
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": np.asarray(signals["energy"], np.float64).tolist(),
        "y": pca.tolist(),
        "hovertext": [safe(path) for path in signals["paths"]],
        "text": words,
        "marker": {"size": (7 + 17 * part).tolist(), "color": part.tolist(), "cmin": 0, "cmax": 1,
                   "colorscale": SEQUENTIAL, "colorbar": bar, "line": {"width": 1, "color": MUTED}},
        "hovertemplate": "%{hovertext}<br>log10 energy %{x:.4g}<br>PCA sensitivity %{y:.4g}<br>"
                         "%{text}<extra></extra>",
    }  # fmt: skip
    wide = bool(pca.min() > 0 and pca.max() > WIDE * pca.min())
    looks = layout(
        420,
        xaxis={"title": {"text": "log10 E |x|² of the inputs"}},
        yaxis={"title": {"text": "PCA sensitivity"}, "type": "log" if wide else "linear"},
    )
    caption = (
        "Each marker is a site. Size and colour are k / D: the part of its directions that the "
        "inputs really use. PCA sensitivity is that of score.manifold.pca, at the site's narrowest "
        "choice."
    )
    return Figure("energy", "Energy against PCA sensitivity", caption, [trace], looks)


def distribution(signals: dict, plan: dict) -> Figure:
    """F(C) of the combined score C over the sites, coloured by their widths in the plan."""
    score = np.asarray(signals["combined"], np.float64)
    reached = np.asarray(signals["distribution"], np.float64)
    order = np.argsort(score, kind="stable")
    line = {
        "type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False,
        "x": score[order].tolist(), "y": reached[order].tolist(),
        "line": {"shape": "hv", "color": GRID, "width": 2},
    }  # fmt: skip
    widths = [width(plan["sites"][str(path)]) for path in signals["paths"]]
    data = [line]
    for index, bits in enumerate(sorted(set(widths), key=lambda bits: bits or np.inf)):
        own = [i for i in order if widths[i] == bits]
        data.append({
            "type": "scatter", "mode": "markers",
            "name": "float" if bits is None else f"{bits:g} bit",
            "x": score[own].tolist(), "y": reached[own].tolist(),
            "hovertext": [safe(signals["paths"][i]) for i in own],
            "marker": {"color": PALETTE[index % len(PALETTE)], "size": 8},
            "hovertemplate": "%{hovertext}<br>C = %{x:.4g}, F(C) = %{y:.4g}"
                             "<extra>%{fullData.name}</extra>",
        })  # fmt: skip
    looks = layout(
        400,
        showlegend=True,
        xaxis={"title": {"text": "combined score C"}},
        yaxis={"title": {"text": "share of the sites up to C"}, "range": [0, 1.05]},
    )
    caption = (
        "Sites in order of the combined score; those of equal score lie on one another. Colours "
        "are the widths in the plan of this report; of products of activations, which have no "
        "weights, the narrower operand's."
    )
    return Figure("distribution", "Distribution of the combined score", caption, data, looks)


def width(entry: dict) -> float | None:
    """Bits of a plan's entry, as the bars of the plan show them; None for float."""
    bits = mean_bits(entry.get("w_bits"))
    return mean_bits(entry.get("a_bits")) if bits is None else bits
