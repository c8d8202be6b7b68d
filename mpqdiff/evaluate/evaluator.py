"""The metrics: one contract, `Evaluator`, and one dict of them, `METRICS`.

A metric says what it needs, and gets one `Given` that holds what an arm offers. It gives one
`Estimate`: the value, its 95 % interval and, where the metric has them, values per image, by which
two arms on the same seeds are compared image by image (`compare.verdict`).
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.evaluate import (
    drift,
    frechet,
    inception_score,
    intervals,
    kernel_distance,
    manifold,
    paired,
    perceptual,
    text_alignment,
)

NEIGHBOURS = 3  # k of precision and recall, the paper's


class Given(NamedTuple):
    """What an arm offers to its metrics; None where it does not. Rows are images, in one order."""

    features: Any = None  # [n,D]
    logits: Any = None  # [n,classes]
    spatial: Any = None  # [n,S], the spatial features of sFID, flat
    x_0: Any = None  # [n,H,W,C]
    pixels: Any = None  # [n,H,W,C] in [-1, 1] where x_0 are latents: what PSNR and SSIM see
    trajectory: Any = None  # [S,n,...]
    float_features: Any = None
    float_x_0: Any = None
    float_pixels: Any = None
    float_trajectory: Any = None
    image_embeddings: Any = None  # [n,E]
    text_embeddings: Any = None
    reference: Any = None  # a frechet.Target
    spatial_reference: Any = None  # a frechet.Target, of the spatial features
    reference_features: Any = None  # [m,D]
    omitted: Any = None  # int [B,d]: the common subsamples of all arms


class Estimate(NamedTuple):
    """A metric's `value` and [low, high]; both None where it is not defined or not asked for.

    `values` [n] are per-image values whose mean is `value`: the metric itself for paired metrics,
    pseudo-values or linearised values (value + influence) for those of sets that have them.
    """

    value: float | None = None
    ends: list[float] | None = None
    values: np.ndarray | None = None
    terms: np.ndarray | None = None  # of FID alone: `frechet.terms`
    curve: drift.Curve | None = None  # of drift alone


class Evaluator(NamedTuple):
    """One metric.

    Attributes:
      measure: `(given) -> Estimate`; called only where `given` has all that it needs.
      needs: names of fields of `Given`.
      kind: "set", one number of all images, noisy and (but for KID) biased at few of them; or
        "paired", the mean of a value per image, each against its own partner.
      better: "lower" or "higher".
      unit: of the value, empty for a plain number.
    """

    measure: Callable[[Given], Estimate]
    needs: tuple[str, ...]
    kind: str
    better: str
    unit: str = ""


def measure(given: Given, names: Sequence[str] | None = None) -> dict[str, Estimate]:
    """The metrics `names` (default: all of `METRICS` but `fid_infinity`) of what is `given`.

    A metric whose needs are not all given is an empty Estimate, or an InputError, naming what is
    missing, where `names` asks for it.
    """
    found = {}
    for name in DEFAULT if names is None else names:
        if name not in METRICS:
            raise unknown_name("metric", name, METRICS)
        metric = METRICS[name]
        missing = [need for need in metric.needs if getattr(given, need) is None]
        if missing and names is not None:
            raise InputError(
                f"metric {name!r} needs {', '.join(missing)}: pass it, or leave it out"
            )
        found[name] = Estimate() if missing else metric.measure(given)
    return found


def spread(rows, n: int) -> np.ndarray:
    """n of the reference `rows` [m,D], n <= m, in a fixed random order: the same at every call,
    for files are often sorted by class."""
    rows = np.asarray(rows)
    return rows[np.random.default_rng(0).permutation(len(rows))[:n]]


def _frechet(features, target: frechet.Target, omitted, name: str) -> Estimate:
    features = np.asarray(features)
    n, dimensions = features.shape
    whole, terms = frechet.terms(features, target, omitted)
    if whole.rank < target.rank or n <= dimensions:  # the reference too may be of too few
        warnings.warn(
            f"{name}: the covariance of {n} images has rank {whole.rank} of {target.rank} in "
            f"{dimensions} dimensions: the value says little; raise the number of images above "
            f"{dimensions}, or read KID and the paired error",
            stacklevel=4,
        )
    ends = frechet.ends(whole.value, terms, features, omitted)
    return Estimate(whole.value, ends, whole.value + whole.influence, terms)


def _fid(given: Given) -> Estimate:
    return _frechet(given.features, given.reference, given.omitted, "FID")


def _sfid(given: Given) -> Estimate:
    return _frechet(given.spatial, given.spatial_reference, given.omitted, "sFID")


def _fid_infinity(given: Given) -> Estimate:
    fitted = frechet.fid_infinity(given.features, given.reference)
    ends = intervals.influence_interval(fitted.value, fitted.influence).ends
    return Estimate(fitted.value, ends, fitted.value + fitted.influence)


def _kid(given: Given) -> Estimate:
    found = kernel_distance.kernel_distance(given.features, given.reference_features)
    if found.standard_error is None:
        return Estimate(found.value)
    ends = intervals.normal_interval(found.value, found.standard_error).ends
    return Estimate(found.value, ends, found.values)


def _inception_score(given: Given) -> Estimate:
    value = inception_score.inception_score(given.logits)
    if given.omitted is None:
        return Estimate(value)
    scores = inception_score.delete_d_scores(given.logits, given.omitted)
    n, d = len(given.logits), given.omitted.shape[1]
    return Estimate(value, intervals.jackknife_interval(value, scores, n=n, d=d).ends)


def _equal_sets(given: Given) -> np.ndarray | None:
    """The real features, as many as generated ones where there are so many, as the paper has it."""
    count = min(len(given.features), len(given.reference_features))
    return spread(given.reference_features, count) if count > NEIGHBOURS else None


def _precision(given: Given) -> Estimate:
    real = _equal_sets(given)
    if real is None:
        return Estimate()
    flags = manifold.inside(given.features, real, k=NEIGHBOURS)
    interval = intervals.proportion_interval(int(flags.sum()), len(flags))
    return Estimate(interval.value, interval.ends, flags.astype(np.float64))


def _recall(given: Given) -> Estimate:
    real = _equal_sets(given)
    if real is None:
        return Estimate()
    n, omitted = len(given.features), given.omitted
    if omitted is None or n - omitted.shape[1] <= NEIGHBOURS:
        return Estimate(float(manifold.inside(real, given.features, k=NEIGHBOURS).mean()))
    value, shares = manifold.delete_d_recalls(given.features, real, omitted, k=NEIGHBOURS)
    low, high = intervals.jackknife_interval(value, shares, n=n, d=omitted.shape[1]).ends
    return Estimate(value, [max(low, 0.0), min(high, 1.0)])


def _mean(values) -> Estimate:
    interval = intervals.mean_interval(values)
    return Estimate(interval.value, interval.ends, np.asarray(values))


def _seen(given: Given) -> tuple[Any, Any]:
    """The images of both arms, as PSNR and SSIM compare them."""
    if given.pixels is None:
        return given.x_0, given.float_x_0
    return given.pixels, given.float_pixels


def _psnr(given: Given) -> Estimate:
    ratios = paired.psnrs(*_seen(given))
    return _mean(ratios) if np.isfinite(ratios).all() else Estimate()


def _ssim(given: Given) -> Estimate:
    own, others = _seen(given)
    if min(np.shape(own)[1:3]) < paired.SSIM_WINDOW:
        return Estimate()
    return _mean(paired.ssims(own, others))


def _x0_mse(given: Given) -> Estimate:
    return _mean(paired.x0_errors(given.x_0, given.float_x_0))


def _perceptual(given: Given) -> Estimate:
    return _mean(perceptual.distances([given.features], [given.float_features]))


def _drift(given: Given) -> Estimate:
    values = drift.deviations(given.trajectory, given.float_trajectory)
    return _mean(values.mean(axis=0))._replace(curve=drift.curve(values, range(len(values))))


def _clip_score(given: Given) -> Estimate:
    return _mean(text_alignment.clip_scores(given.image_embeddings, given.text_embeddings))


_SETS = ("features", "reference_features")
_PAIRS = ("x_0", "float_x_0")
METRICS: dict[str, Evaluator] = {
    "fid": Evaluator(_fid, ("features", "reference"), "set", "lower"),
    "fid_infinity": Evaluator(_fid_infinity, ("features", "reference"), "set", "lower"),
    "sfid": Evaluator(_sfid, ("spatial", "spatial_reference"), "set", "lower"),
    "kid": Evaluator(_kid, _SETS, "set", "lower"),
    "is": Evaluator(_inception_score, ("logits",), "set", "higher"),
    "precision": Evaluator(_precision, _SETS, "set", "higher"),
    "recall": Evaluator(_recall, _SETS, "set", "higher"),
    "psnr": Evaluator(_psnr, _PAIRS, "paired", "higher", "dB"),
    "ssim": Evaluator(_ssim, _PAIRS, "paired", "higher"),
    "perceptual": Evaluator(_perceptual, ("features", "float_features"), "paired", "lower"),
    "x0_mse": Evaluator(_x0_mse, _PAIRS, "paired", "lower"),
    "drift": Evaluator(_drift, ("trajectory", "float_trajectory"), "paired", "lower"),
    "clip_score": Evaluator(
        _clip_score, ("image_embeddings", "text_embeddings"), "paired", "higher"
    ),
}
DEFAULT = tuple(name for name in METRICS if name != "fid_infinity")  # ten decompositions a set
