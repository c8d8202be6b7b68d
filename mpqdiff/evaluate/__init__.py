"""Evaluation: every number of an arm's row in results.json, from arrays already in memory.

Paired same-seed fidelity leads (`paired`, `perceptual`, `drift`), then KID, then FID with an
interval. `evaluator` has the contract and the dict of metrics, `statistics` the streaming moments,
`compare` the verdicts; `protocol` says what the numbers mean. All values are Python floats, or
None where a number is not defined or was not asked for.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.evaluate import frechet, intervals
from mpqdiff.evaluate.compare import on_shared_seeds, tie, verdict, verdicts
from mpqdiff.evaluate.evaluator import METRICS, Estimate, Evaluator, Given, measure, spread
from mpqdiff.evaluate.statistics import finite_features
from mpqdiff.images import from_uint8

__all__ = [
    "METRICS", "Estimate", "Evaluator", "Given", "evaluate", "measure",
    "on_shared_seeds", "paired_numbers", "spread", "tie", "verdict", "verdicts",
]  # fmt: skip
_PAIRED = ("psnr", "ssim", "x0_mse")  # what two sets of x_0 are enough for


def evaluate(
    *,
    images,
    x_0=None,
    features,
    logits=None,
    reference: Any,
    float_x_0=None,
    float_images=None,
    float_features=None,
    ceiling_features=None,
    seed: int = 0,
    spatial=None,
    trajectory=None,
    float_trajectory=None,
    timesteps: Sequence[int] | None = None,
    image_embeddings=None,
    text_embeddings=None,
    metrics: Sequence[str] | None = None,
    values: bool = False,
) -> dict[str, Any]:
    """The metric part of one arm's row. Seeds and labels are paired by row across arms.

    Args:
      images: uint8 [n,H,W,C], what the features were extracted from.
      x_0: float32 [n,H,W,C], the sampler's output before the uint8 boundary; None for images
        from elsewhere, which have no paired metrics.
      float_images: uint8 [n,H,W,C] of arm 0, where x_0 are latents and `images` are decoded from
        them: PSNR and SSIM are then taken on the images, x0_mse on the latents.
      features: [n,D]; logits: [n,classes]: the evaluation network's, of `images`.
      reference: has train_mean [D], train_cov [D,D]; where it also has train_features [m,D]
        (KID, precision, recall), test_features [t,D] (damage), spatial_mean and spatial_cov
        (sFID), those metrics are taken. `statistics.load` gives one from a file.
      float_x_0, float_features, float_trajectory: arm 0's on the same seeds. None (or the arm's
        own) for arm 0, whose paired metrics are then None: an infinite PSNR is not JSON.
      ceiling_features: [>= n, D] of the float model at 2 steps; None leaves `damage` None.
      seed: of the jackknife's subsamples; equal seeds make arms share them.
      spatial: [n,...], the network's spatial features, for sFID.
      trajectory: [S,n,...] x_t at the `timesteps` [S] (default: 0 to S-1) of both arms.
      image_embeddings, text_embeddings: [n,E] of a user's own text-image encoder.
      metrics: names from METRICS; None takes every one that the arguments allow, but
        `fid_infinity`. A metric named here whose arguments are missing is an InputError.
      values: the row has `values` too, {metric: [n]}: `Estimate.values` of the metrics that have
        them, by which `verdicts` pairs arms. Arrays: take them out before the row becomes JSON.

    Returns, for every metric, its name and name_ci, [low, high] at 95 %; `delta_fid`, `damage`
    with theirs; `n_images`; `drift_curve` (timesteps, mean, low, high) where there are
    trajectories. None besides: intervals of set metrics below 3 images, precision and recall
    below 4, SSIM of images under 11 pixels, PSNR where some image is equal to float's, damage
    where test or ceiling features are fewer than n (with a warning).

    Raises InputError on fewer than 2 images, features, logits or x_0 with NaN (with their
    number), arrays of different n, feature spaces of different D, or arms of different shape.
    Warns about constant images, and where the images are too few for the rank of FID's covariance.
    """
    n = _check_images(images, x_0, latents=float_images is not None)
    features = _rows(features, "features", n)
    float_features = _rows(float_features, "float_features", n)
    train = frechet.target(reference.train_mean, reference.train_cov)
    _same_space(features, train, "features")
    spatial_target = None
    if spatial is not None and getattr(reference, "spatial_mean", None) is not None:
        spatial_target = frechet.target(reference.spatial_mean, reference.spatial_cov)
        spatial = _rows(np.reshape(spatial, (len(spatial), -1)), "spatial features", n)
        _same_space(spatial, spatial_target, "spatial features")
    own = x_0 is not None and float_x_0 is x_0
    given = Given(
        features=features,
        logits=_rows(logits, "logits", n),
        spatial=spatial,
        x_0=x_0,
        **_pixels(images, float_images),
        trajectory=trajectory,
        float_features=None if own else float_features,
        float_x_0=None if own else float_x_0,
        float_trajectory=None if float_trajectory is trajectory else float_trajectory,
        image_embeddings=_rows(image_embeddings, "image embeddings", n),
        text_embeddings=_rows(text_embeddings, "text embeddings", n),
        reference=train,
        spatial_reference=spatial_target,
        reference_features=getattr(reference, "train_features", None),
        omitted=intervals.omissions(n, seed=seed) if n > 2 else None,
    )
    found = measure(given, metrics)
    row: dict[str, Any] = _flat(found, values)
    fid = found.get("fid", Estimate())
    row |= _difference(fid, given, float_features)
    row |= _damage_numbers(fid, n, reference, train, ceiling_features)
    row["n_images"] = n
    curve = found.get("drift", Estimate()).curve
    if curve is not None:
        steps = curve.timesteps if timesteps is None else [int(t) for t in timesteps]
        row["drift_curve"] = curve._replace(timesteps=steps)._asdict()
    return row


def _pixels(images, float_images) -> dict[str, Any]:
    if float_images is None:
        return {}
    return {"pixels": from_uint8(images), "float_pixels": from_uint8(float_images)}


def paired_numbers(
    x_0, float_x_0, *, images=None, float_images=None, values: bool = False
) -> dict[str, Any]:
    """x0 MSE, PSNR and SSIM with intervals against float's x_0 on the same seeds; None for it.

    `images`, `float_images`, `values` as `evaluate` has them.
    """
    if float_x_0 is None or float_x_0 is x_0:
        return _flat(dict.fromkeys(_PAIRED, Estimate()), values)
    given = Given(x_0=x_0, float_x_0=float_x_0, **_pixels(images, float_images))
    return _flat(measure(given, _PAIRED), values)


def _floor_and_ceiling(n, reference, train, ceiling_features) -> tuple[float, float] | None:
    """FIDs at n images of n test features (the same ones for every arm) and of the first n of
    `ceiling_features`. None, with a warning, where there are fewer or the ceiling is not higher.
    """
    test_features = getattr(reference, "test_features", None)
    if ceiling_features is None or test_features is None:
        return None
    counts = {"test": len(test_features), "ceiling": len(ceiling_features)}
    for name, count in counts.items():
        if count < n:
            warnings.warn(
                f"damage is null: {count} {name} features for {n} images, needs {n}", stacklevel=4
            )
            return None
    ceiling = frechet.fid(_rows(np.asarray(ceiling_features)[:n], "ceiling_features", n), train)
    floor = frechet.fid(spread(test_features, n), train)
    if ceiling <= floor:
        warnings.warn(
            f"damage is null: the float model at 2 steps has FID {ceiling:.6g}, not above that of "
            f"{n} test images, {floor:.6g}",
            stacklevel=4,
        )
        return None
    return floor, ceiling


def _damage_numbers(fid: Estimate, n, reference, train, ceiling_features) -> dict[str, Any]:
    """`damage`, (FID - floor) / (ceiling - floor): 0 as good as held-out real images, 1 as bad as
    the float model at 2 steps. Its interval is FID's, scaled; floor and ceiling are taken as given.
    """
    numbers: dict[str, Any] = {"damage": None, "damage_ci": None}
    if fid.value is None:
        return numbers
    ends = _floor_and_ceiling(n, reference, train, ceiling_features)
    if ends is None:
        return numbers
    floor, ceiling = ends
    numbers["damage"] = (fid.value - floor) / (ceiling - floor)
    if fid.ends is not None:
        numbers["damage_ci"] = [(end - floor) / (ceiling - floor) for end in fid.ends]
    return numbers


def _difference(fid: Estimate, given: Given, float_features) -> dict[str, Any]:
    """FID minus the float arm's, on common subsamples (or image by image), and its interval."""
    numbers: dict[str, Any] = {"delta_fid": None, "delta_fid_ci": None}
    if fid.value is None or float_features is None or given.reference is None:
        return numbers
    base, terms = frechet.terms(float_features, given.reference, given.omitted)
    value = fid.value - base.value
    numbers["delta_fid"] = value
    if fid.terms is not None and terms is not None:
        difference = fid.terms - terms
        numbers["delta_fid_ci"] = frechet.ends(value, difference, float_features, given.omitted)
    return numbers


def _flat(found: dict[str, Estimate], values: bool) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, estimate in found.items():
        row[name], row[f"{name}_ci"] = estimate.value, estimate.ends
    if values:
        kept = {name: estimate.values for name, estimate in found.items()}
        row["values"] = {name: rows for name, rows in kept.items() if rows is not None}
    return row


def _check_images(images, x_0, *, latents: bool) -> int:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise InputError(
            f"got images {images.dtype} of shape {images.shape}, expected uint8 [n,H,W,C]"
        )
    n = len(images)
    if n < 2:
        raise InputError(f"got {n} images, expected at least 2: raise the number of images")
    if x_0 is not None and not latents and np.shape(x_0) != images.shape:
        raise InputError(f"got x_0 of shape {np.shape(x_0)} for images {images.shape}: not one arm")
    bad = 0 if x_0 is None else int(np.count_nonzero(~np.isfinite(x_0).all(axis=(1, 2, 3))))
    if bad:
        raise InputError(f"x_0: {bad} of {n} images have NaN or infinite pixels")
    flat = images.reshape(n, -1)
    constant = int(np.count_nonzero((flat == flat[:, :1]).all(axis=1)))
    if constant:
        warnings.warn(f"{constant} of {n} images are a single constant value", stacklevel=3)
    return n


def _rows(values, name: str, n: int) -> Any:
    if values is None:
        return None
    values = finite_features(values, name)
    if len(values) != n:
        raise InputError(
            f"got {len(values)} rows of {name} for {n} images, expected one each: pass the images "
            "of the seeds that both arms have"
        )
    return values


def _same_space(values, target: frechet.Target, name: str) -> None:
    if values.shape[1] != target.mean.size:
        raise InputError(
            f"got {name} of {values.shape[1]} dimensions, the reference has {target.mean.size}: "
            "extract both with the same evaluation network"
        )
