"""The columns of the tables of arms, in the order in which their numbers should be read.

Metrics stand in the order of `protocol["leading"]`: paired error first, then KID; FID before the
other set metrics where the images are enough for it, else last. `{fid}` in a title or hint becomes
the protocol's name of its Frechet distance, which is "FID" for the public Inception weights alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from mpqdiff.evaluate import protocol
from mpqdiff.report.numbers import percent, pick, prefixed, short, small, times, whole


class Column(NamedTuple):
    """A column of a table of arms. `better` is +1, -1, or 0 where neither end is better."""

    key: str
    title: str
    hint: str
    show: Callable[[Any], str]
    better: int = 0
    interval: str | None = None


SIZES = (
    Column("avg_w_bits", "Mean bits", "over all site weights", "{:.2f}".format),
    Column("bytes", "Bytes", "all that is passed to the denoiser on the device", whole),
    Column("compression", "Compression", "float32 file over this file", times),
)  # fmt: skip
METRICS = (
    Column("x0_mse", "x0 MSE", "paired with the float samples of the same seeds", small, -1,
           "x0_mse_ci"),
    Column("psnr", "PSNR, dB", "paired with the float images of the same seeds", "{:.2f}".format,
           +1, "psnr_ci"),
    Column("kid", "KID", "kernel distance to the reference features", small, -1, "kid_ci"),
    Column("fid", "{fid}", "Frechet distance to the reference features", short, -1, "fid_ci"),
    Column("damage", "Damage", "({fid} - floor) / (ceiling - floor)", percent, -1, "damage_ci"),
    Column("delta_fid", "{fid} − float", "on the image seeds both have", short, -1,
           "delta_fid_ci"),
)  # fmt: skip
IMAGES = Column("n_images", "Images", "behind the metrics", whole)
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
    Column("ms_per_image_batch_1.iqr", "IQR, one image", "interquartile range at batch 1", short),
    Column("fraction_of_peak", "Of peak", "products against the fastest measured here", percent),
    Column("energy_j", "Energy, J", "per image", small, -1),
    Column("energy_label", "Energy is", "measured, or modelled from 45 nm constants", str),
)  # fmt: skip
FURTHER = (
    Column("ssim", "SSIM", "paired with the float images of the same seeds", short, +1, "ssim_ci"),
    Column("perceptual", "Perceptual", "2 (1 - cosine) of features, paired", small, -1,
           "perceptual_ci"),
    Column("drift", "Drift", "relative deviation of x_t, mean over steps, paired", small, -1,
           "drift_ci"),
    Column("clip_score", "CLIP score", "of the user's encoder", short, +1, "clip_score_ci"),
    Column("sfid", "s{fid}", "Frechet distance of spatial features", short, -1, "sfid_ci"),
    Column("is", "IS", "inception score, of the evaluation network's classes", short, +1, "is_ci"),
    Column("precision", "Precision", "share of images inside the real manifold", short, +1,
           "precision_ci"),
    Column("recall", "Recall", "share of real images inside the arm's manifold", short, +1,
           "recall_ci"),
    Column("class_agreement", "Same class", "as the float image, by the evaluation network",
           percent, +1, "class_agreement_ci"),
    Column("downstream_accuracy", "Downstream accuracy",
           "on real images, of classifiers trained on the samples", percent, +1),
    Column("downstream_delta", "Downstream − float",
           "accuracy minus that of the float samples' classifiers", percent, +1,
           "downstream_delta_ci"),
    Column("against_plan.x0_mse", "x0 MSE, against the plan", "paired test at 95 %", str),
    Column("file_bytes", "File bytes", "bit-packed", whole),
    Column("bitops", "BitOPs", "MACs x weight bits x activation bits", prefixed),
    Column("predicted_ms", "Predicted, ms", "by the latency model, before the arms were timed",
           short),
    Column("predicted_speedup", "Predicted speed-up", "of the same, against the first arm", times),
    Column("resident_bytes", "Resident bytes", "what the compiled loop keeps", whole),
    Column("peak_bytes", "Peak bytes", "of the executable", whole),
    Column("seed", "Seed", "of the images", str),
)  # fmt: skip
BITOPS = (
    Column("bitops_terms.total", "Total", "per image, at the planned widths", prefixed),
    Column("bitops_terms.weights", "Weights", "products with weights in integers", prefixed),
    Column("bitops_terms.attention", "Attention", "products of two activations", prefixed),
    Column("bitops_terms.zero_points", "Zero points", "corrections for them", prefixed),
    Column("bitops_terms.float", "Float", "products left in float", prefixed),
    Column("bitops_terms.executed", "Executed", "as the kernels multiply", prefixed),
)
HEALTH = (
    Column("health.clip_rate.mean", "Clip rate", "share of values beyond their scale, mean over "
           "sites", "{:.3%}".format, -1),
    Column("health.clip_rate.max", "Largest", "of the sites' clip rates", "{:.3%}".format, -1),
    Column("health.clip_rate.site", "Where", "the site of the largest clip rate", str),
    Column("health.not_finite", "Not finite", "NaN and infinities among the values", whole),
    Column("health.images", "Images", "that were looked at, over all their steps", whole),
)  # fmt: skip


def quality(results: dict) -> tuple[Column, ...]:
    """Sizes, then METRICS in the order of the protocol, then the number of images."""
    return (*SIZES, *_ordered(METRICS, results), IMAGES)


def present(columns: tuple[Column, ...], results: dict) -> tuple[Column, ...]:
    """Those of `columns` that some arm has a value for, metrics in the order of the protocol."""
    arms = results["arms"]
    kept = [c for c in columns if any(pick(arm, c.key) is not None for arm in arms)]
    return _ordered(tuple(kept), results)


def leading(results: dict) -> list[str]:
    """Names of metrics in the order of the protocol; where it has none, by the number of images."""
    found = (results.get("protocol") or {}).get("leading")
    counts = [arm.get("n_images") or 0 for arm in results["arms"]]
    return list(found or protocol.leading(max(counts)))


def fid_name(results: dict) -> str:
    """What the results' Frechet distance is called."""
    described = results.get("protocol") or {}
    space = described.get("feature_space") or "unnamed"
    return described.get("fid_name") or protocol.fid_name(space, bool(described.get("is_fid")))


def _ordered(columns: tuple[Column, ...], results: dict) -> tuple[Column, ...]:
    """Metrics by `leading`, the other columns after them as they were; names filled in."""
    order, name = leading(results), fid_name(results)
    place = {key: i for i, key in enumerate(order)}
    found = sorted(columns, key=lambda column: place.get(column.key, len(order)))
    return tuple(
        column._replace(title=column.title.format(fid=name), hint=column.hint.format(fid=name))
        for column in found
    )
