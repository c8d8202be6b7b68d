"""The arm's row: keys, JSON, floor and ceiling, arm 0, seeds, optional metrics, bad input."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.evaluate import (
    METRICS,
    Given,
    evaluate,
    frechet,
    intervals,
    measure,
    spread,
    statistics,
)
from mpqdiff.evaluate.kernel_distance import kernel_distance
from mpqdiff.evaluate.manifold import precision_recall
from mpqdiff.evaluate.text_alignment import clip_scores

NAMES = {
    "fid", "sfid", "kid", "is", "precision", "recall", "psnr", "ssim", "perceptual", "x0_mse",
    "drift", "clip_score", "delta_fid", "damage",
}  # fmt: skip
KEYS = {*NAMES, *(f"{name}_ci" for name in NAMES), "n_images"}
OPTIONAL = {"sfid", "sfid_ci", "drift", "drift_ci", "clip_score", "clip_score_ci"}
NUMBERS = KEYS - OPTIONAL - {"n_images"}
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
    assert all(row[key] is None for key in OPTIONAL)
    assert row["n_images"] == N
    for key in NAMES - OPTIONAL:
        low, high = row[f"{key}_ci"]
        assert low < row[key] < high, key
        if key not in ("precision", "recall"):  # those end at 0 and 1
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
    paired = [name for name, metric in METRICS.items() if metric.kind == "paired"]
    assert all(row[key] is row[f"{key}_ci"] is None for key in paired)
    assert row["delta_fid"] == 0.0
    assert row["delta_fid_ci"] == [0.0, 0.0]
    alone = evaluate(**_arm(0.0, float_x_0=None, float_features=None))
    assert alone["x0_mse"] is None
    assert alone["delta_fid"] is None


def test_an_arm_equal_to_float_has_zero_error_and_no_infinite_psnr():
    row = evaluate(**_arm(0.0))
    assert row["x0_mse"] == row["perceptual"] == 0.0
    assert row["psnr"] is row["psnr_ci"] is None
    assert row["ssim"] == pytest.approx(1.0)


def test_more_noise_is_worse_and_shared_subsamples_sharpen_the_difference():
    little, much = evaluate(**_arm(0.05)), evaluate(**_arm(1.5))
    assert little["psnr"] > much["psnr"]
    assert little["ssim"] > much["ssim"]
    for key in ("x0_mse", "perceptual", "fid", "kid", "delta_fid", "damage"):
        assert little[key] < much[key], key
    widths = [np.ptp(little[key]) for key in ("delta_fid_ci", "fid_ci")]
    assert widths[0] < 0.5 * widths[1]


def test_repeats_by_seed():
    assert evaluate(**_arm(0.3, seed=2)) == evaluate(**_arm(0.3, seed=2))
    first, second = (evaluate(**{**_arm(0.3), "seed": seed}) for seed in (0, 1))
    assert first["fid"] == second["fid"]
    assert first["fid_ci"] != second["fid_ci"]


def test_very_few_images_leave_undefined_numbers_null_and_warn_with_the_rank():
    sets = {"precision", "precision_ci", "recall", "recall_ci"}
    intervals_of_sets = {"fid_ci", "delta_fid_ci", "damage_ci", "kid_ci", "is_ci"}
    for n, missing in ((2, sets | intervals_of_sets), (3, sets), (4, {"recall_ci"}), (5, set())):
        with pytest.warns(UserWarning, match=f"{n} images has rank {n - 1} of 6 in 6 dimensions"):
            row = evaluate(**_arm(0.3, n=n))
        assert {key for key, value in row.items() if value is None} == missing | OPTIONAL, n
    arguments = _arm(0.3, n=7)
    arguments["features"][0] = arguments["features"][1]
    with pytest.warns(UserWarning, match="7 images has rank 5 of 6"):
        evaluate(**arguments)


def test_small_images_have_no_ssim():
    arguments = _arm(0.3)
    for key in ("images", "x_0", "float_x_0"):
        arguments[key] = arguments[key][:, :8]
    row = evaluate(**arguments)
    assert row["ssim"] is None
    assert row["psnr"] is not None


def _further(n=N):
    """Spatial features, trajectories and embeddings, and a reference that has spatial ones."""
    rng = np.random.default_rng(5)
    reference = _reference()
    reference.spatial_mean, reference.spatial_cov = frechet.moments(rng.normal(size=(200, 12)))
    trajectory = rng.normal(size=(3, n, SIDE, SIDE, 1))
    return {
        "spatial": rng.normal(0.2, 1.0, (n, 2, 3, 2)), "reference": reference,
        "trajectory": trajectory * np.array([1.0, 1.1, 1.3])[:, None, None, None, None],
        "float_trajectory": trajectory, "timesteps": np.array([9, 4, 0]),
        "image_embeddings": rng.normal(1.0, 1.0, (n, 8)), "text_embeddings": np.ones((n, 8)),
    }  # fmt: skip


def test_optional_metrics_are_those_of_their_arrays():
    arguments = _further()
    row = evaluate(**_arm(0.3, **arguments))
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert set(row) == {*KEYS, "drift_curve"}
    assert all(row[key] is not None for key in KEYS)
    spatial = frechet.moments(arguments["spatial"].reshape(N, -1))
    reference = arguments["reference"]
    assert row["sfid"] == pytest.approx(
        frechet.frechet_distance(*spatial, reference.spatial_mean, reference.spatial_cov)
    )
    assert row["drift"] == pytest.approx((0.0 + 0.1 + 0.3) / 3)
    assert row["drift_ci"] == pytest.approx([0.4 / 3, 0.4 / 3])  # every image alike
    assert row["drift_curve"]["timesteps"] == [9, 4, 0]
    assert row["drift_curve"]["mean"] == pytest.approx([0.0, 0.1, 0.3])
    scores = clip_scores(arguments["image_embeddings"], arguments["text_embeddings"])
    assert row["clip_score"] == pytest.approx(scores.mean())


def test_fid_infinity_is_an_option():
    row = evaluate(**_arm(0.3), metrics=["fid", "fid_infinity"])
    assert row["fid_infinity"] < row["fid"]
    assert row["fid_infinity_ci"][0] < row["fid_infinity"] < row["fid_infinity_ci"][1]
    assert "fid_infinity" not in evaluate(**_arm(0.3))


def test_metrics_can_be_chosen_and_say_what_they_miss():
    row = evaluate(**_arm(0.3), metrics=["kid"])
    assert set(row) == {
        "kid", "kid_ci", "delta_fid", "delta_fid_ci", "damage", "damage_ci", "n_images"
    }  # fmt: skip
    assert row["damage"] is row["delta_fid"] is None
    with pytest.raises(InputError, match="'sfid' needs spatial, spatial_reference"):
        evaluate(**_arm(0.3), metrics=["fid", "sfid"])
    with pytest.raises(InputError, match="unknown metric 'lpips'; known: clip_score"):
        evaluate(**_arm(0.3), metrics=["lpips"])


def test_images_from_elsewhere_need_no_x_0_no_logits_and_a_file_of_statistics(tmp_path):
    own, real = _arm(0.3), _reference().train_features.astype(np.float64)
    statistics.save(tmp_path / "real.npz", statistics.moments(real))
    row = evaluate(
        images=own["images"], features=own["features"],
        reference=statistics.load(tmp_path / "real.npz"),
    )  # fmt: skip
    assert row["fid"] == pytest.approx(evaluate(**own)["fid"])
    given = {"fid", "fid_ci", "n_images"}
    assert {key for key, value in row.items() if value is not None} == given


def test_every_metric_has_a_contract():
    for name, metric in METRICS.items():
        assert metric.kind in ("set", "paired"), name
        assert metric.better in ("lower", "higher"), name
        assert metric.needs
        assert set(metric.needs) <= set(Given._fields), name


def test_values_per_image_average_to_the_metric():
    arguments = _arm(0.3)
    reference = arguments["reference"]
    given = Given(
        features=arguments["features"], float_features=arguments["float_features"],
        x_0=arguments["x_0"], float_x_0=arguments["float_x_0"], logits=arguments["logits"],
        reference=frechet.target(reference.train_mean, reference.train_cov),
        reference_features=reference.train_features, omitted=intervals.omissions(N, seed=0),
    )  # fmt: skip
    found = measure(given)
    with_values = {name for name, one in found.items() if one.values is not None}
    assert with_values == {"fid", "kid", "precision", "psnr", "ssim", "perceptual", "x0_mse"}
    for name in with_values:
        assert found[name].values.shape == (N,)
        assert found[name].values.mean() == pytest.approx(found[name].value, rel=1e-9), name


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
    with pytest.raises(InputError, match="spatial features of 4 dimensions, the reference has 12"):
        evaluate(**_arm(0.3, **(_further() | {"spatial": np.ones((N, 4))})))
    with pytest.raises(InputError, match="9 rows of text embeddings"):
        evaluate(**_arm(0.3, **(_further() | {"text_embeddings": np.ones((9, 8))})))


def test_constant_images_warn():
    arguments = _arm(0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(**arguments)
    arguments["images"][[0, 3]] = 7
    with pytest.warns(UserWarning, match="2 of 64 images are a single constant value"):
        evaluate(**arguments)
