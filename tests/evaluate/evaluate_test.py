"""The arm's row: keys, JSON, floor and ceiling, arm 0, seeds, bad input; and its protocol."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.evaluate import evaluate, frechet, protocol, spread, tie
from mpqdiff.evaluate.kernel_distance import kernel_distance
from mpqdiff.evaluate.manifold import precision_recall

KEYS = {
    "fid", "fid_ci", "delta_fid", "delta_fid_ci", "damage", "kid", "kid_ci", "sfid", "is",
    "precision", "recall", "psnr", "psnr_ci", "ssim", "x0_mse", "x0_mse_ci", "n_images",
}  # fmt: skip
NUMBERS = KEYS - {"sfid", "n_images"}
N, SIDE, DIMENSIONS = 64, 12, 6


def _reference(seed=0, count=150):
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(2, count, DIMENSIONS)).astype(np.float16)
    mean, cov = frechet.moments(train)
    return SimpleNamespace(train_mean=mean, train_cov=cov, train_features=train, test_features=test)


def _float_arm(n=N):
    rng = np.random.default_rng(1)
    return {
        "x_0": rng.uniform(-1, 1, (n, SIDE, SIDE, 1)).astype(np.float32),
        "features": rng.normal(0.1, 1.0, (n, DIMENSIONS)).astype(np.float32),
        "logits": rng.normal(0.0, 3.0, (n, 10)).astype(np.float32),
    }


def _arm(noise, n=N, seed=2, **changes):
    """Arguments of `evaluate` for an arm `noise` away from the float one."""
    rng = np.random.default_rng(seed)
    arm = {key: x + noise * rng.normal(size=x.shape) for key, x in _float_arm(n).items()}
    arm["x_0"] = arm["x_0"].astype(np.float32)
    images = np.random.default_rng(3).integers(0, 256, arm["x_0"].shape, dtype=np.uint8)
    ceiling = np.random.default_rng(4).normal(3.0, 2.0, (N, DIMENSIONS))
    arguments = {
        "images": images, **arm, "reference": _reference(), "ceiling_features": ceiling,
        "float_x_0": _float_arm(n)["x_0"], "float_features": _float_arm(n)["features"],
    }  # fmt: skip
    return {**arguments, **changes}


def test_has_every_key_as_json_numbers():
    row = evaluate(**_arm(0.3))
    assert set(row) == KEYS
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    for key in NUMBERS:
        values = row[key] if key.endswith("_ci") else [row[key]]
        assert all(type(value) is float for value in values), key
    assert row["sfid"] is None
    assert row["n_images"] == N
    for key in ("fid", "delta_fid", "kid", "psnr", "x0_mse"):
        low, high = row[f"{key}_ci"]
        assert low < row[key] < high
        assert (low + high) / 2 == pytest.approx(row[key])


def test_every_number_is_its_metric_of_these_arrays():
    arguments = _arm(0.3)
    row, reference = evaluate(**arguments), arguments["reference"]
    train = reference.train_mean, reference.train_cov

    def fid(features):
        return frechet.frechet_distance(*frechet.moments(features), *train)

    assert row["fid"] == pytest.approx(fid(arguments["features"]))
    assert row["delta_fid"] == pytest.approx(row["fid"] - fid(arguments["float_features"]))
    assert row["kid"] == kernel_distance(arguments["features"], reference.train_features).value
    real = spread(reference.train_features, N)
    assert len(real) == N
    assert (row["precision"], row["recall"]) == precision_recall(arguments["features"], real)
    error = np.mean((arguments["x_0"].astype(np.float64) - arguments["float_x_0"]) ** 2)
    assert row["x0_mse"] == pytest.approx(error)


def test_damage_is_zero_for_test_features_and_one_at_the_ceiling():
    arguments = _arm(0.1)
    floor = spread(arguments["reference"].test_features, N)
    assert evaluate(**{**arguments, "features": floor})["damage"] == pytest.approx(0.0)
    ceiling = arguments["ceiling_features"]
    assert evaluate(**{**arguments, "features": ceiling})["damage"] == pytest.approx(1.0)
    assert 0.0 < evaluate(**_arm(2.0))["damage"] < 1.0


def test_damage_is_taken_at_the_arms_own_number_of_images():
    arguments = _arm(0.1, n=20)
    reference = arguments["reference"]
    train = frechet.target(reference.train_mean, reference.train_cov)
    floor = frechet.fid(spread(reference.test_features, 20), train)
    ceiling = frechet.fid(arguments["ceiling_features"][:20], train)
    row = evaluate(**arguments)
    assert row["damage"] == pytest.approx((row["fid"] - floor) / (ceiling - floor))


def test_damage_is_null_where_it_has_no_meaning():
    assert evaluate(**_arm(0.1, ceiling_features=None))["damage"] is None
    with pytest.warns(UserWarning, match="30 test features for 64 images"):
        row = evaluate(**_arm(0.1, reference=_reference(count=30)))
    assert row["damage"] is None
    assert row["fid"] is not None
    ceiling = spread(_reference().train_features, N)
    with pytest.warns(UserWarning, match="not above"):
        row = evaluate(**_arm(0.1, ceiling_features=ceiling))
    assert row["damage"] is None


def test_arm_zero_has_no_paired_numbers_and_no_difference():
    arguments = _arm(0.0)
    arguments["float_x_0"] = arguments["x_0"]
    row = evaluate(**arguments)
    assert all(row[key] is None for key in ("psnr", "psnr_ci", "ssim", "x0_mse", "x0_mse_ci"))
    assert row["delta_fid"] == 0.0
    assert row["delta_fid_ci"] == [0.0, 0.0]
    alone = evaluate(**_arm(0.0, float_x_0=None, float_features=None))
    assert alone["x0_mse"] is None
    assert alone["delta_fid"] is None


def test_an_arm_equal_to_float_has_zero_error_and_no_infinite_psnr():
    row = evaluate(**_arm(0.0))
    assert row["x0_mse"] == 0.0
    assert row["psnr"] is None
    assert row["ssim"] == pytest.approx(1.0)


def test_more_noise_is_worse_and_shared_subsamples_sharpen_the_difference():
    little, much = evaluate(**_arm(0.05)), evaluate(**_arm(1.5))
    assert little["psnr"] > much["psnr"]
    assert little["ssim"] > much["ssim"]
    for key in ("x0_mse", "fid", "kid", "delta_fid", "damage"):
        assert little[key] < much[key], key
    widths = [np.ptp(little[key]) for key in ("delta_fid_ci", "fid_ci")]
    assert widths[0] < 0.5 * widths[1]


def test_repeats_by_seed():
    assert evaluate(**_arm(0.3, seed=2)) == evaluate(**_arm(0.3, seed=2))
    first, second = (evaluate(**{**_arm(0.3), "seed": seed}) for seed in (0, 1))
    assert first["fid"] == second["fid"]
    assert first["fid_ci"] != second["fid_ci"]


@pytest.mark.parametrize(("n", "missing"), [(2, {"fid_ci", "delta_fid_ci", "kid_ci"}), (3, set())])
def test_very_few_images_leave_undefined_numbers_null(n, missing):
    row = evaluate(**_arm(0.3, n=n))
    null = {key for key, value in row.items() if value is None}
    assert null == missing | {"precision", "recall", "sfid"}


def test_small_images_have_no_ssim():
    arguments = _arm(0.3)
    for key in ("images", "x_0", "float_x_0"):
        arguments[key] = arguments[key][:, :8]
    row = evaluate(**arguments)
    assert row["ssim"] is None
    assert row["psnr"] is not None


def test_ties():
    one, same, worse = (evaluate(**_arm(s, seed=i)) for i, s in enumerate((0.3, 0.3, 0.6)))
    for key in ("x0_mse", "psnr", "fid"):
        assert tie(one, same, key=key), key
    assert not tie(one, worse)
    assert not tie(worse, one, key="psnr")
    with pytest.raises(InputError, match=r"rows \[1\] have no x0_mse_ci"):
        tie(one, evaluate(**_arm(0.3, float_x_0=None)))
    with pytest.raises(InputError, match="64 and 20 images"):
        tie(one, evaluate(**_arm(0.3, n=20)), key="fid")


def test_unusable_arrays():
    nan = _arm(0.3)
    nan["features"][[1, 5, 9], 0] = np.nan
    with pytest.raises(InputError, match="features: 3 of 64 rows"):
        evaluate(**nan)
    nan = _arm(0.3)
    nan["x_0"][4] = np.inf
    with pytest.raises(InputError, match="x_0: 1 of 64 images"):
        evaluate(**nan)
    with pytest.raises(InputError, match="got 1 images"):
        evaluate(**_arm(0.3, n=1))
    with pytest.raises(InputError, match="expected uint8"):
        evaluate(**_arm(0.3, images=_arm(0.3)["x_0"]))
    with pytest.raises(InputError, match="not one arm"):
        evaluate(**_arm(0.3, x_0=_arm(0.3)["x_0"][:5]))
    with pytest.raises(InputError, match="seeds that both arms have"):
        evaluate(**_arm(0.3, float_x_0=_arm(0.3, n=80)["x_0"]))
    with pytest.raises(InputError, match="80 rows of float_features"):
        evaluate(**_arm(0.3, float_features=_arm(0.3, n=80)["features"]))
    with pytest.raises(InputError, match="same evaluation network"):
        evaluate(**_arm(0.3, features=np.ones((N, 5))))


def test_constant_images_warn():
    arguments = _arm(0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(**arguments)
    arguments["images"][[0, 3]] = 7
    with pytest.warns(UserWarning, match="2 of 64 images are a single constant value"):
        evaluate(**arguments)


def _protocol(**changes):
    fields = {
        "feature_space": "fashion_classifier", "feature_hash": "ab12", "reference": "fashion_mnist",
        "reference_count": 60000, "n_images": 256, "seeds": range(2), "guidance": 0.0,
        "image_size": (28, 28, 1),
    }  # fmt: skip
    return protocol.protocol(**{**fields, **changes})


def test_protocol_is_json_and_names_everything_in_one_line_per_number():
    fields = _protocol()
    assert json.loads(json.dumps(fields)) == fields
    names = {key.removesuffix("_ci") for key in NUMBERS}
    assert set(fields["numbers"]) == names
    for part in ("fashion_classifier", "ab12", "fashion_mnist", "60000", "256 images", "28x28x1"):
        assert part in fields["numbers"]["fid"]
    assert all("\n" not in line and "seeds 0, 1" in line for line in fields["numbers"].values())


@pytest.mark.parametrize(("n", "indicative"), [(1999, True), (2000, False)])
def test_few_images_mark_set_metrics_as_indicative(n, indicative):
    fields = _protocol(n_images=n)
    assert fields["indicative"] is indicative
    assert ("indicative" in fields["numbers"]["fid"]) is indicative
    assert "indicative" not in fields["numbers"]["psnr"]


def test_comparable_names_the_fields_that_differ():
    assert protocol.comparable(_protocol(), _protocol()) is True
    with pytest.raises(InputError) as error:
        protocol.comparable(_protocol(), _protocol(n_images=5000, guidance=1.5))
    message = str(error.value)
    assert "n_images: 256 and 5000" in message
    assert "guidance: 0.0 and 1.5" in message
    assert "seeds:" not in message
    assert "numbers" not in message


def test_unusable_protocols():
    with pytest.raises(InputError, match="counts >= 1"):
        _protocol(n_images=0)
    with pytest.raises(InputError, match="names"):
        _protocol(feature_space="")
    with pytest.raises(InputError, match="names"):
        _protocol(seeds=[])
    with pytest.raises(InputError, match="unknown metric 'lpips'"):
        protocol.describe(_protocol(), "lpips")
