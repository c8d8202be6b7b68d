"""What `mpqdiff run` prints of its results, and the verdicts in them."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from mpqdiff import fidelity, results
from mpqdiff.evaluate import paired_numbers
from mpqdiff.evaluate.protocol import protocol


def arm(name, x0_mse, verdict, fid):
    """A row of results.json as far as the table reads it."""
    return {
        "arm": name, "avg_w_bits": 4.5, "bytes": 700_000, "compression": 5.8,
        "ms_per_image": {"median": 7.25}, "speedup": 2.0, "x0_mse": x0_mse, "psnr": 25.5,
        "kid": 0.0123, "fid": fid, "damage": 0.1, "execution": "integer",
        "against_plan": {"x0_mse": verdict} if verdict else {},
    }  # fmt: skip


def described(**changes):
    fields = {
        "feature_space": "toy", "feature_hash": "h", "reference": "real", "reference_count": 9,
        "n_images": 256, "seeds": [0], "guidance": 1.0, "image_size": (8, 8, 1),
    }  # fmt: skip
    return protocol(**{**fields, **changes})


def shown(**changes):
    arms = [arm("float", None, None, 20.0), arm("plan", 1e-2, None, 26.0),
            arm("uniform", 1.01e-2, "tie", 26.1)]  # fmt: skip
    return results.table({"protocol": described(**changes), "arms": arms}).splitlines()


def test_paired_error_and_kid_stand_before_fid_and_a_tie_is_called_one():
    head, *rows = shown()
    names = ["x0 MSE", "vs plan", "PSNR dB", "KID", "Frechet", "damage"]
    assert [head.index(name) for name in names] == sorted(head.index(name) for name in names)
    assert rows[2].split()[6:8] == ["1.01e-02", "tie"] and rows[1].split()[6:8] == ["1.00e-02", "-"]
    assert any("inside the noise it is a tie" in line for line in rows[3:])


@pytest.mark.parametrize("is_fid", [True, False])
@pytest.mark.parametrize("n", [256, 5000])
def test_fid_without_a_qualifier_is_for_the_public_weights_and_few_images_are_marked(is_fid, n):
    head, *rows = shown(is_fid=is_fid, n_images=n)
    assert ("FID" in head, "Frechet" in head) == (is_fid, not is_fid)
    assert ("Frechet: FID (toy features)" in rows) is not is_fid
    assert any("indicative only: fewer than 2000" in line for line in rows) is (n < 2000)


def test_every_pair_of_arms_is_judged_by_its_images():
    """The plan's error is 10 % of another arm's, whose images differ far more than that."""
    rng = np.random.default_rng(0)
    base = rng.uniform(-0.5, 0.5, (60, 12, 12, 1))
    error = rng.normal(size=base.shape) * rng.uniform(0.01, 0.3, (60, 1, 1, 1))
    arms = cast(Any, [SimpleNamespace(name=name) for name in ("float", "plan", "near", "far")])
    rows = [{}] + [
        paired_numbers(base + scale * error, base, values=True) for scale in (1.0, 1.0001, 1.1)
    ]
    found = fidelity._judged(arms, rows)
    assert all("values" not in row for row in found)
    assert found[0]["against"] == found[0]["against_plan"] == {}
    assert found[3]["against"]["x0_mse"] == {"plan": "worse", "near": "worse"}
    assert found[1]["against"]["psnr"] == {"near": "better", "far": "better"}
    assert found[3]["against_plan"] == {"x0_mse": "worse", "psnr": "worse"}
    low, high = found[3]["x0_mse_ci"]
    assert low < found[1]["x0_mse"] < high  # which the intervals alone call a tie
