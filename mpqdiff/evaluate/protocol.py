"""What a number was measured with: one dict per results file, one line of text per number.

A metric is comparable with another only in the same feature space, against the same reference,
at the same number of images, seeds, guidance and image size. Steps and kept timesteps belong to
the arm that is measured, not to the protocol.
"""

from collections.abc import Sequence

from mpqdiff.errors import InputError

INDICATIVE_BELOW = 2000  # images; fewer give a set metric whose bias and noise are both large

_REFERENCE = "features {feature_space} ({feature_hash}), against {reference} (n={reference_count})"
_FRECHET = "Frechet distance, " + _REFERENCE + ", 95 % delete-20 % jackknife"
_FLOAT = "against the float arm on the same seeds, 95 % t interval over images"

# The metrics of sets of images are noisy and (but for KID) biased at few images.
SET_METRICS = {
    "fid": _FRECHET,
    "delta_fid": _FRECHET + " on common subsamples, minus the float arm's",
    "damage": "(FID - floor) / (ceiling - floor), floor: n test images, ceiling: float model at "
    "{ceiling_steps} steps, " + _REFERENCE,
    "kid": "unbiased cubic-kernel MMD^2, " + _REFERENCE + ", 95 % delete-one jackknife",
    "is": "inception score, 1 split, logits of {feature_space} ({feature_hash})",
    "precision": "k-NN precision, k=3, " + _REFERENCE + ", n of them",
    "recall": "k-NN recall, k=3, " + _REFERENCE + ", n of them",
}
PAIRED_METRICS = {
    "psnr": "mean PSNR of x_0 in [-1, 1], " + _FLOAT,
    "ssim": "mean SSIM of x_0 in [-1, 1], 11x11 Gaussian window, against the float arm on the "
    "same seeds",
    "x0_mse": "mean squared error of x_0, " + _FLOAT,
}
# Follow from the other fields, so they are not compared.
_DERIVED = ("indicative", "numbers")


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
) -> dict:
    """The protocol of a results file, JSON types only; `numbers` has one line per metric.

    `image_size` is (H, W, C); `guidance` the classifier-free scale (1 or 0: as the sampler
    defines "none"); `sampler` names it with its settings; `indicative` is True below 2000 images.
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
    fields["indicative"] = fields["n_images"] < INDICATIVE_BELOW
    fields["numbers"] = {
        metric: describe(fields, metric) for metric in {**SET_METRICS, **PAIRED_METRICS}
    }
    return fields


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

    Raises InputError naming every field that differs, with both values.
    """
    fields = [name for name in {**a, **b} if name not in _DERIVED]
    different = [
        f"{name}: {a.get(name)!r} and {b.get(name)!r}"
        for name in fields
        if a.get(name) != b.get(name)
    ]
    if different:
        raise InputError(
            f"protocols differ in {'; '.join(different)}. Expected equal ones: evaluate both "
            "again under one protocol"
        )
    return True
