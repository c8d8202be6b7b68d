"""What a number was measured with: one dict per results file, one line of text per number.

A metric is comparable with another only in the same feature space, against the same reference,
at the same number of images, seeds, guidance and image size. Steps and kept timesteps belong to
the arm that is measured, not to the protocol.
"""

from collections.abc import Sequence

from mpqdiff.errors import InputError

INDICATIVE_BELOW = 2000  # images; fewer give a set metric whose bias and noise are both large

_REFERENCE = "features {feature_space} ({feature_hash}), against {reference} (n={reference_count})"
_FIXED = " over the images, reference held fixed"
_FRECHET = "{fid_name}, Frechet distance, " + _REFERENCE + ", 95 % jackknife" + _FIXED
_FLOAT = "against the float arm on the same seeds, 95 % t interval over images"

OFFER = (
    "cut both to the seeds they share (on_shared_seeds), which gives equal numbers of images, and "
    "evaluate both again"
)

# The metrics of sets of images are noisy and (but for KID) biased at few images.
SET_METRICS = {
    "fid": _FRECHET,
    "fid_infinity": "{fid_name} extrapolated to infinitely many images, "
    + _REFERENCE
    + ", 95 % jackknife"
    + _FIXED,
    "sfid": "Frechet distance of spatial features, " + _REFERENCE + ", 95 % jackknife" + _FIXED,
    "delta_fid": _FRECHET + ", on common subsamples, minus the float arm's",
    "damage": "({fid_name} - floor) / (ceiling - floor), floor: n test images, ceiling: float "
    "model at {ceiling_steps} steps, " + _REFERENCE + "; floor and ceiling held fixed too",
    "kid": "unbiased cubic-kernel MMD^2, " + _REFERENCE + ", 95 % delete-one jackknife" + _FIXED,
    "is": "inception score, 1 split, logits of {feature_space} ({feature_hash}), 95 % delete-20 % "
    "jackknife",
    "precision": "k-NN precision, k=3, " + _REFERENCE + ", n of them, 95 % score interval" + _FIXED,
    "recall": "k-NN recall, k=3, "
    + _REFERENCE
    + ", n of them, 95 % delete-20 % jackknife"
    + _FIXED,
}
PAIRED_METRICS = {
    "psnr": "mean PSNR of x_0 in [-1, 1], " + _FLOAT,
    "ssim": "mean SSIM of x_0 in [-1, 1], 11x11 Gaussian window, " + _FLOAT,
    "perceptual": "mean squared distance of unit-length features of {feature_space} "
    "({feature_hash}), " + _FLOAT,
    "drift": "mean |x_t - float x_t| / |float x_t| over steps, " + _FLOAT,
    "clip_score": "mean 100 max(cos, 0) of image and text embeddings of the user's encoder, 95 % t "
    "interval over images",
    "x0_mse": "mean squared error of x_0, " + _FLOAT,
}
# In the order in which a report shows them. FID leads only where there are images enough for it.
LEADING = (
    "x0_mse", "psnr", "ssim", "perceptual", "drift", "clip_score", "kid", "precision", "recall",
    "is",
)  # fmt: skip
# Follow from the other fields, or name the run, so they are not compared.
_NOT_COMPARED = ("indicative", "leading", "numbers", "name", "publish", "is_fid", "fid_name")
# May differ where both arms are cut to their common images.
_CUT = ("n_images", "seeds")


def protocol(
    *,
    feature_space: str,
    feature_hash: str,
    reference: str,
    reference_count: int,
    n_images: int,
    seeds: Sequence[int],
    guidance: float,
    image_size: Sequence[int],
    sampler: str = "",
    ceiling_steps: int = 2,
    is_fid: bool = False,
) -> dict:
    """The protocol of a results file, JSON types only; `numbers` has one line per metric.

    `image_size` is (H, W, C); `guidance` the classifier-free scale (1 or 0: as the sampler
    defines "none"); `sampler` names it with its settings; `indicative` is True below 2000 images;
    `leading` lists the metrics in the order of `leading`. `is_fid` is the feature network's own;
    `fid_name` what its Frechet distance is called.
    Raises InputError on non-positive counts or sizes, no seed, or an empty name.
    """
    fields = {
        "feature_space": feature_space,
        "feature_hash": feature_hash,
        "reference": reference,
        "reference_count": int(reference_count),
        "n_images": int(n_images),
        "seeds": [int(seed) for seed in seeds],
        "guidance": float(guidance),
        "image_size": [int(size) for size in image_size],
        "ceiling_steps": int(ceiling_steps),
    }
    empty = [name for name, value in fields.items() if value in ("", [])]
    counts = [fields["reference_count"], fields["n_images"], *fields["image_size"]]
    if empty or min(counts) < 1 or len(fields["image_size"]) != 3:
        raise InputError(f"unusable protocol {fields}: expected names, counts >= 1 and (H, W, C)")
    fields["sampler"] = sampler
    fields["is_fid"], fields["fid_name"] = bool(is_fid), fid_name(feature_space, is_fid)
    fields["indicative"] = fields["n_images"] < INDICATIVE_BELOW
    fields["leading"] = list(leading(fields["n_images"]))
    fields["numbers"] = {
        metric: describe(fields, metric) for metric in {**SET_METRICS, **PAIRED_METRICS}
    }
    return fields


def fid_name(feature_space: str, is_fid: bool) -> str:
    """What a Frechet distance is called: the word FID alone is for the public Inception weights."""
    return "FID" if is_fid else f"FID ({feature_space} features)"


def leading(n_images: int) -> tuple[str, ...]:
    """The metrics in the order in which they should be read at `n_images`.

    Paired error first, always: it resolves what set metrics cannot. FID and what follows from it
    come after KID, and below 2000 images, where FID is indicative only, last of all.
    """
    frechet = ("fid", "delta_fid", "damage", "fid_infinity", "sfid")
    if n_images < INDICATIVE_BELOW:
        return (*LEADING, *frechet)
    place = LEADING.index("kid") + 1
    return (*LEADING[:place], *frechet, *LEADING[place:])


def describe(fields: dict, metric: str) -> str:
    """The one line that goes with a published value of `metric`."""
    known = {**SET_METRICS, **PAIRED_METRICS}
    if metric not in known:
        raise InputError(f"unknown metric {metric!r}; known: {', '.join(sorted(known))}")
    height, width, channels = fields["image_size"]
    seeds = ", ".join(map(str, fields["seeds"]))
    line = (
        f"{known[metric].format(**fields)}; {fields['n_images']} images of "
        f"{height}x{width}x{channels}, seeds {seeds}, guidance {fields['guidance']:g}"
    )
    if metric in SET_METRICS and fields["indicative"]:
        line += f"; indicative only (fewer than {INDICATIVE_BELOW} images)"
    return line


def comparable(a: dict, b: dict) -> bool:
    """True when the numbers of two protocols may be compared.

    Raises InputError naming every field that differs, with both values, and what to do: where only
    the numbers of images or the seeds differ, equal n on shared seeds is offered.
    """
    different = [
        name for name in {**a, **b} if name not in _NOT_COMPARED and a.get(name) != b.get(name)
    ]
    if different:
        values = "; ".join(f"{name}: {a.get(name)!r} and {b.get(name)!r}" for name in different)
        advice = "evaluate both again under one protocol"
        if all(name in _CUT for name in different):
            advice = OFFER
        raise InputError(f"protocols differ in {values}. Expected equal ones: {advice}")
    return True
