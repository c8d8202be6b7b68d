"""Which differences between arms the report may speak of: better, worse, or a tie in the noise."""

import math

from mpqdiff.evaluate import METRICS, compare
from mpqdiff.evaluate.protocol import INDICATIVE_BELOW
from mpqdiff.report.columns import Column


def word(a: dict, b: dict, key: str) -> str | None:
    """ "better", "worse" or "tie": arm `a` against `b` in metric `key`; None where unknown.

    What the evaluation found by pairing their images (`against` of results.json) where it is
    there, else by the interval of the difference of independent arms (`compare.verdict`). Unknown
    without intervals, and at different numbers of images.
    """
    paired = ((a.get("against") or {}).get(key) or {}).get(b["arm"])
    if paired is not None:
        return paired
    ends = [end for arm in (a, b) for end in arm.get(f"{key}_ci") or [None]]
    if key not in METRICS or None in (a.get(key), b.get(key), *ends):
        return None
    if a.get("n_images") is None or a["n_images"] != b.get("n_images"):
        return None
    return compare.verdict(a, b, key)


def ties(arms: list[dict], column: Column) -> list[tuple[str, ...]]:
    """For each arm: best, tie with the best, tie with the float. Arm 0 is the float model.

    Only for metrics in which arms are compared: what follows from FID has FID's.
    """
    labels: list[list[str]] = [[] for _ in arms]
    rated = [i for i, arm in enumerate(arms) if i > 0 and arm.get(column.key) is not None]
    if column.key not in METRICS or not rated:
        return [()] * len(arms)
    best = max(rated, key=lambda i: column.better * arms[i][column.key])
    for i in rated:
        if len(rated) > 1:
            if i == best:
                labels[i].append("best")
            elif word(arms[i], arms[best], column.key) == "tie":
                labels[i].append("tie with best")
        if word(arms[i], arms[0], column.key) == "tie":
            labels[i].append("tie with float")
    return [tuple(words) for words in labels]


def rival(arms: list[dict], chosen: dict) -> tuple[dict, str] | None:
    """The best other system within the chosen arm's bytes, and `word` of the chosen arm against it.

    By paired PSNR. None where no such arm has one, or the two cannot be compared.
    """
    if chosen.get("psnr") is None or chosen.get("bytes") is None:
        return None
    others = [arm for arm in arms[1:] if arm.get("system") != chosen.get("system")
              and arm.get("psnr") is not None
              and (arm.get("bytes") or math.inf) <= chosen["bytes"]]  # fmt: skip
    if not others:
        return None
    best = max(others, key=lambda arm: arm["psnr"])
    found = word(chosen, best, "psnr")
    return None if found is None else (best, found)


def indicative(arm: dict) -> bool:
    """Whether the arm has a Frechet distance from too few images to rank by."""
    return arm.get("fid") is not None and (arm.get("n_images") or 0) < INDICATIVE_BELOW
