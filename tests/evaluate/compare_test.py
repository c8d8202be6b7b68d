"""Verdicts: direction, ties, paired values, refusals; arms cut to the seeds they share."""

import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.evaluate import (
    evaluate,
    frechet,
    on_shared_seeds,
    paired,
    statistics,
    tie,
    verdict,
    verdicts,
)
from mpqdiff.evaluate.protocol import protocol


def _row(key, value, half, n=500):
    return {key: value, f"{key}_ci": [value - half, value + half], "n_images": n}


@pytest.mark.parametrize(
    ("key", "lower_is"),
    [("x0_mse", "better"), ("fid", "better"), ("delta_fid", "better"), ("damage", "better"),
     ("kid", "better"), ("drift", "better"), ("perceptual", "better"), ("psnr", "worse"),
     ("ssim", "worse"), ("recall", "worse"), ("is", "worse"), ("clip_score", "worse")],
)  # fmt: skip
def test_the_word_follows_the_metrics_direction(key, lower_is):
    low, high = _row(key, 1.0, 0.1), _row(key, 2.0, 0.1)
    assert verdict(low, high, key) == lower_is
    assert verdict(high, low, key) == {"better": "worse", "worse": "better"}[lower_is]
    assert verdict(low, low, key) == "tie"


def test_a_difference_inside_the_noise_is_a_tie():
    """Half-widths 0.3 and 0.4 make 0.5."""
    a = _row("fid", 10.0, 0.3)
    assert verdict(a, _row("fid", 10.49, 0.4), "fid") == "tie"
    assert tie(a, _row("fid", 10.49, 0.4), key="fid")
    assert verdict(a, _row("fid", 10.51, 0.4), "fid") == "better"
    assert not tie(a, _row("fid", 10.51, 0.4), key="fid")


def test_the_rate_of_false_verdicts_is_at_most_that_of_the_level():
    """Two arms of one distribution, on different seeds and on shared ones."""
    rng = np.random.default_rng(0)
    wrong = {"independent": 0, "paired": 0}
    for _ in range(400):
        difficulty = rng.exponential(1.0, 40)
        x, y = (difficulty + 0.3 * rng.normal(size=40) for _ in range(2))
        z = rng.exponential(1.0, 40) + 0.3 * rng.normal(size=40)
        rows = [_from_values(values) for values in (x, z)]
        wrong["independent"] += verdict(*rows) != "tie"
        wrong["paired"] += verdict(rows[0], _from_values(y), values=(x, y)) != "tie"
    assert all(count / 400 < 0.09 for count in wrong.values()), wrong


def _from_values(values):
    half = 2.02 * values.std(ddof=1) / np.sqrt(len(values))
    return _row("x0_mse", values.mean(), half, len(values))


def test_paired_values_decide_what_intervals_cannot():
    rng = np.random.default_rng(1)
    difficulty = rng.exponential(1.0, 100)
    worse = difficulty * 1.05
    a, b = _from_values(difficulty), _from_values(worse)
    assert verdict(a, b) == "tie"
    assert verdict(a, b, values=(difficulty, worse)) == "better"
    assert verdict(b, a, values=(worse, difficulty)) == "worse"


def test_paired_values_decide_between_fids_on_shared_seeds():
    """Linearised values, value + influence, take the place of per-image ones."""
    rng = np.random.default_rng(2)
    reference = frechet.target(*frechet.moments(rng.normal(size=(3000, 6))))
    base = rng.normal(0.2, 1.1, (400, 6))
    found = [frechet.linearised(x, reference) for x in (base, 1.02 * base)]
    rows = [_row("fid", one.value, 1.96 * one.influence.std() / 20) for one in found]
    values = tuple(one.value + one.influence for one in found)
    assert verdict(*rows, "fid") == "tie"
    assert verdict(*rows, "fid", values=values) == "better"


def test_verdicts_of_all_pairs_by_the_sharpest_test_there_is():
    """x0 errors decide by pairs; KID has intervals alone; c has no KID, float no x0 error."""
    rng = np.random.default_rng(3)
    difficulty = rng.exponential(1.0, 100)
    errors = {"a": difficulty, "b": difficulty * 1.05, "c": difficulty * 1.05}
    kids = {"float": 1.0, "a": 1.2, "b": 1.0}
    names = ["float", "a", "b", "c"]
    rows = [_from_values(errors[name]) if name in errors else {"n_images": 100} for name in names]
    for name, row in zip(names, rows, strict=True):
        row |= _row("kid", kids[name], 0.1, 100) if name in kids else {}
    values = [{"x0_mse": errors[name]} if name in errors else {} for name in names]
    found = dict(zip(names, verdicts(names, rows, values), strict=True))
    assert found["float"] == {"kid": {"a": "better", "b": "tie"}}
    assert found["a"] == {
        "x0_mse": {"b": "better", "c": "better"}, "kid": {"float": "worse", "b": "worse"},
    }  # fmt: skip
    assert found["b"]["x0_mse"] == {"a": "worse", "c": "tie"}
    assert found["c"] == {"x0_mse": {"a": "worse", "b": "tie"}}
    unpaired = verdicts(names, rows, [{}] * 4)
    assert unpaired[1]["x0_mse"] == {"b": "tie", "c": "tie"}


def test_rows_offer_the_values_that_verdicts_pair():
    """Two arms whose FIDs' intervals overlap, on shared seeds."""
    rng = np.random.default_rng(4)
    real = rng.normal(size=(2000, 6))
    moments = statistics.moments(real)
    reference = statistics.Reference(moments.mean, moments.cov, 2000, train_features=real)
    x_0 = rng.uniform(-1, 1, (400, 12, 12, 1)).astype(np.float32)
    images = rng.integers(0, 256, x_0.shape, np.uint8)
    base = rng.normal(0.2, 1.1, (400, 6))
    logits = rng.normal(size=(400, 3))
    rows = [
        evaluate(images=images, x_0=x_0 * scale, float_x_0=x_0, features=base * scale,
                 float_features=base, logits=logits, reference=reference, values=True)
        for scale in (0.98, 1.0 - 1e-3)
    ]  # fmt: skip
    values = [row.pop("values") for row in rows]
    paired_metrics = {"psnr", "ssim", "perceptual", "x0_mse"}
    assert all(set(kept) == paired_metrics | {"fid", "kid", "precision"} for kept in values)
    for row, kept in zip(rows, values, strict=True):
        for name, per_image in kept.items():
            assert per_image.mean() == pytest.approx(row[name], rel=1e-9), name
    assert verdict(rows[0], rows[1], "fid") == "tie"
    assert verdicts(["a", "b"], rows, values)[0]["fid"] == {"b": "better"}


def test_what_cannot_be_compared_is_refused():
    a = _row("x0_mse", 1.0, 0.1)
    with pytest.raises(InputError, match=r"rows \[1\] have no kid_ci; .* x0_mse"):
        verdict(a | _row("kid", 1.0, 0.1), a, "kid")
    for key in ("fid", "kid", "x0_mse"):
        with pytest.raises(InputError, match=r"500 and 200 images.*on_shared_seeds"):
            verdict(_row(key, 1.0, 0.1), _row(key, 1.0, 0.1, n=200), key)
    with pytest.raises(InputError, match="unknown metric 'lpips'"):
        verdict(a, a, "lpips")
    with pytest.raises(InputError, match="one per shared seed"):
        verdict(a, a, values=(np.ones(3), np.ones(4)))


def test_rows_of_different_protocols_are_refused():
    one, other = (
        protocol(
            feature_space="f", feature_hash="h", reference=reference, reference_count=9,
            n_images=500, seeds=[0], guidance=1.0, image_size=(8, 8, 1),
        )
        for reference in ("train", "test")
    )  # fmt: skip
    rows = _row("fid", 1.0, 0.1), _row("fid", 2.0, 0.1)
    assert verdict(*rows, "fid", protocols=(one, one)) == "better"
    with pytest.raises(InputError, match="reference: 'train' and 'test'"):
        verdict(*rows, "fid", protocols=(one, other))


def test_arms_are_cut_to_their_shared_seeds():
    a = {
        "seeds": np.array([3, 1, 7, 9]),
        "x_0": np.arange(4.0),
        "logits": np.arange(8).reshape(4, 2),
    }
    b = {"seeds": [9, 2, 3], "x_0": np.array([90.0, 20.0, 30.0])}
    first, second = on_shared_seeds(a, b)
    assert first["seeds"].tolist() == second["seeds"].tolist() == [3, 9]
    assert first["x_0"].tolist() == [0.0, 3.0]
    assert first["logits"].tolist() == [[0, 1], [6, 7]]
    assert second["x_0"].tolist() == [30.0, 90.0]


def test_a_seed_may_be_a_pair_of_the_runs_and_the_images_number():
    seeds = np.stack([np.full(5, 1234), np.arange(5)], axis=1)
    a = {"seeds": seeds, "features": np.arange(5.0)}
    b = {"seeds": seeds[:3], "features": np.arange(3.0) + 1}
    first, second = on_shared_seeds(a, b)
    assert len(first["features"]) == len(second["features"]) == 3
    assert paired.paired_difference(first["features"], second["features"]).value == -1.0
    other = seeds + [1, 0]
    with pytest.raises(InputError, match="share 0 seeds"):
        on_shared_seeds(a, b | {"seeds": other[:3]})


def test_unusable_seeds():
    a = {"seeds": np.arange(4), "x_0": np.zeros((4, 2))}
    with pytest.raises(InputError, match="share 1 seeds"):
        on_shared_seeds(a, {"seeds": [3, 8]})
    with pytest.raises(InputError, match="arm b has x_0; expected seeds too"):
        on_shared_seeds(a, {"x_0": np.zeros(3)})
    with pytest.raises(InputError, match="arm b: 1 seeds come twice"):
        on_shared_seeds(a, {"seeds": [1, 1, 2]})
    with pytest.raises(InputError, match=r"arm a: 4 seeds, but rows of \{'x_0': 3\}"):
        on_shared_seeds(a | {"x_0": np.zeros(3)}, a)
