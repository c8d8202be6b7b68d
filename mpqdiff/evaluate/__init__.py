"""Evaluation: every number of an arm's row in results.json, from arrays already in memory.

Paired same-seed fidelity leads (`paired`), then KID, then FID with an interval (`frechet`,
`kernel_distance`, `manifold`, `inception_score`, `intervals`); `protocol` says what they mean.
All values are Python floats, or None where a number is not defined or was not asked for.
"""

import math
import warnings
from typing import Any

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.evaluate import (
    frechet,
    inception_score,
    intervals,
    kernel_distance,
    manifold,
    paired,
)

NEIGHBOURS = 3  # k of precision and recall, the paper's
PAIRED = ("psnr", "psnr_ci", "ssim", "x0_mse", "x0_mse_ci")


def evaluate(
    *,
    images,
    x_0,
    features,
    logits,
    reference: Any,
    float_x_0=None,
    float_features=None,
    ceiling_features=None,
    seed: int = 0,
) -> dict[str, Any]:
    """The metric part of one arm's row. Seeds and labels are paired by row across arms.

    Args:
      images: uint8 [n,H,W,C], what the features were extracted from.
      x_0: float32 [n,H,W,C], the sampler's output before the uint8 boundary.
      features: [n,D]; logits: [n,classes]: the evaluation network's, of `images`.
      reference: has train_mean [D], train_cov [D,D], train_features [m,D], test_features [t,D].
      float_x_0, float_features: arm 0's on the same seeds. None (or `x_0` itself) for arm 0,
        whose paired metrics are then None: an infinite PSNR is not JSON.
      ceiling_features: [>= n, D] of the float model at 2 steps; None leaves `damage` None.
      seed: of the jackknife's subsamples; equal seeds make arms share them.

    Returns `fid`, `fid_ci`, `delta_fid`, `delta_fid_ci`, `damage`, `kid`, `kid_ci`, `sfid` (None),
    `is`, `precision`, `recall`, `psnr`, `psnr_ci`, `ssim`, `x0_mse`, `x0_mse_ci`, `n_images`.
    Intervals are [low, high] at 95 %. None besides: intervals of set metrics below 3 images,
    precision and recall below 4, SSIM of images under 11 pixels, PSNR where some image is
    equal to float's, damage where test or ceiling features are fewer than n (with a warning).

    Raises InputError on fewer than 2 images, features, logits or x_0 with NaN (with their
    number), arrays of different n, feature spaces of different D, or arms of different shape.
    Warns about constant images.
    """
    n = _check_images(images, x_0)
    features = _rows(features, "features", n)
    logits = _rows(logits, "logits", n)
    train = frechet.target(reference.train_mean, reference.train_cov)
    if features.shape[1] != train.mean.size:
        raise InputError(
            f"got features of {features.shape[1]} dimensions, the reference has {train.mean.size}: "
            "extract both with the same evaluation network"
        )
    if float_features is not None:
        float_features = _rows(float_features, "float_features", n)
    row: dict[str, Any] = {
        **_frechet_numbers(features, float_features, train, seed),
        **_kernel_numbers(features, reference.train_features),
        "sfid": None,
        "is": inception_score.inception_score(logits),
        **_manifold_numbers(features, reference.train_features),
        **paired_numbers(x_0, float_x_0),
        "n_images": n,
    }
    row["damage"] = damage(row["fid"], n, reference, train, ceiling_features)
    return row


def damage(
    value: float, n: int, reference: Any, train: frechet.Target, ceiling_features
) -> float | None:
    """(FID - floor) / (ceiling - floor), all at n images: 0 as good as held-out real images,
    1 as bad as the float model at 2 steps.

    The floor is n test features (the same ones for every arm), the ceiling the first n of
    `ceiling_features`. None, with a warning, where there are fewer or the ceiling is not higher.
    """
    if ceiling_features is None:
        return None
    counts = {"test": len(reference.test_features), "ceiling": len(ceiling_features)}
    for name, count in counts.items():
        if count < n:
            warnings.warn(
                f"damage is null: {count} {name} features for {n} images, needs {n}", stacklevel=3
            )
            return None
    ceiling = frechet.fid(_rows(np.asarray(ceiling_features)[:n], "ceiling_features", n), train)
    floor = frechet.fid(spread(reference.test_features, n), train)
    if ceiling <= floor:
        warnings.warn(
            f"damage is null: the float model at 2 steps has FID {ceiling:.6g}, not above that of "
            f"{n} test images, {floor:.6g}",
            stacklevel=3,
        )
        return None
    return float((value - floor) / (ceiling - floor))


def spread(rows, n: int) -> np.ndarray:
    """n of the reference `rows` [m,D], n <= m, in a fixed random order: the same at every call,
    for files are often sorted by class."""
    rows = np.asarray(rows)
    return rows[np.random.default_rng(0).permutation(len(rows))[:n]]


def tie(a: dict[str, Any], b: dict[str, Any], *, key: str = "x0_mse") -> bool:
    """Whether the difference of two arms' `key` is inside the noise at 95 %.

    Half-widths of the two intervals are combined as for independent arms; arms on shared seeds
    correlate positively, so this calls too many ties, never too few. `paired.paired_difference` on
    per-image values is the sharper test. Raises InputError where a row has no such interval, or,
    for the biased FID, when the numbers of images differ.
    """
    missing = [i for i, row in enumerate((a, b)) if not row.get(f"{key}_ci")]
    if missing:
        raise InputError(
            f"rows {missing} have no {key}_ci; expected an interval: use one of "
            f"{', '.join(sorted(name[:-3] for name in {**a, **b} if name.endswith('_ci')))}"
        )
    if key.endswith("fid") and a["n_images"] != b["n_images"]:
        raise InputError(
            f"got {key} at {a['n_images']} and {b['n_images']} images; its bias depends on the "
            "number: evaluate both arms at the same one"
        )
    halves = [intervals.Interval(row[key], *row[f"{key}_ci"]).half_width for row in (a, b)]
    return bool(abs(a[key] - b[key]) <= math.hypot(*halves))


def _frechet_numbers(features, float_features, train: frechet.Target, seed: int) -> dict[str, Any]:
    """FID and its difference to float, both by one delete-d jackknife on common subsamples."""
    n = len(features)
    value = frechet.fid(features, train)
    delta = None if float_features is None else value - frechet.fid(float_features, train)
    numbers = {"fid": value, "fid_ci": None, "delta_fid": delta, "delta_fid_ci": None}
    if n < 3:
        return numbers
    omitted = intervals.omissions(n, seed=seed)
    d = omitted.shape[1]
    values = frechet.delete_d_fids(features, train, omitted)
    numbers["fid_ci"] = intervals.jackknife_interval(value, values, n=n, d=d).ends
    if delta is not None:
        values = values - frechet.delete_d_fids(float_features, train, omitted)
        numbers["delta_fid_ci"] = intervals.jackknife_interval(delta, values, n=n, d=d).ends
    return numbers


def _kernel_numbers(features, train_features) -> dict[str, Any]:
    value, error = kernel_distance.kernel_distance(features, train_features)
    return {
        "kid": value,
        "kid_ci": None if error is None else intervals.normal_interval(value, error).ends,
    }


def _manifold_numbers(features, train_features) -> dict[str, Any]:
    """At equal set sizes where the reference is large enough, as the paper has it."""
    count = min(len(features), len(train_features))
    if count <= NEIGHBOURS:
        return {"precision": None, "recall": None}
    precision, recall = manifold.precision_recall(
        features, spread(train_features, count), k=NEIGHBOURS
    )
    return {"precision": precision, "recall": recall}


def paired_numbers(x_0, float_x_0) -> dict[str, Any]:
    """x0 MSE, PSNR (with intervals) and SSIM against float's x_0 on the same seeds; None for it."""
    numbers: dict[str, Any] = dict.fromkeys(PAIRED)
    if float_x_0 is None or float_x_0 is x_0:
        return numbers
    error = intervals.mean_interval(paired.x0_errors(x_0, float_x_0))
    numbers.update(x0_mse=error.value, x0_mse_ci=error.ends)
    ratios = paired.psnrs(x_0, float_x_0)
    if np.isfinite(ratios).all():
        ratio = intervals.mean_interval(ratios)
        numbers.update(psnr=ratio.value, psnr_ci=ratio.ends)
    if min(np.shape(x_0)[1:3]) >= paired.SSIM_WINDOW:
        numbers["ssim"] = float(np.mean(paired.ssims(x_0, float_x_0)))
    return numbers


def _check_images(images, x_0) -> int:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise InputError(
            f"got images {images.dtype} of shape {images.shape}, expected uint8 [n,H,W,C]"
        )
    n = len(images)
    if n < 2:
        raise InputError(f"got {n} images, expected at least 2: raise the number of images")
    if np.shape(x_0) != images.shape:
        raise InputError(f"got x_0 of shape {np.shape(x_0)} for images {images.shape}: not one arm")
    bad = int(np.count_nonzero(~np.isfinite(x_0).all(axis=(1, 2, 3))))
    if bad:
        raise InputError(f"x_0: {bad} of {n} images have NaN or infinite pixels")
    flat = images.reshape(n, -1)
    constant = int(np.count_nonzero((flat == flat[:, :1]).all(axis=1)))
    if constant:
        warnings.warn(f"{constant} of {n} images are a single constant value", stacklevel=3)
    return n


def _rows(values, name: str, n: int) -> np.ndarray:
    values = frechet.finite_features(values, name)
    if len(values) != n:
        raise InputError(
            f"got {len(values)} rows of {name} for {n} images, expected one each: pass the images "
            "of the seeds that both arms have"
        )
    return values
