"""Downstream accuracy and class agreement: what they reward, how they pair, what they refuse."""

import shutil

import numpy as np
import pytest

from mpqdiff import data
from mpqdiff.errors import InputError
from mpqdiff.evaluate import downstream
from mpqdiff.evaluate.downstream import Real, class_agreement, correct, real_images
from mpqdiff.evaluate.intervals import proportion_interval, t_quantile

CLASSES, SIDE = 3, 8


def examples(count, seed, noise=60):
    """Images whose bright third of the rows is their class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % CLASSES
    images = rng.integers(0, noise, (count, SIDE, SIDE, 1))
    for image, label in zip(images, labels, strict=True):
        image[label * 2 + 1 : label * 2 + 3] += 150
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def real():
    return Real(*examples(90, seed=9))


@pytest.fixture(scope="module")
def good(real):
    return correct(*examples(200, seed=1), real, num_classes=CLASSES, seeds=(0, 1), epochs=5)


def test_images_that_show_their_labels_teach(good):
    assert good.shape == (2, 90)
    assert good.dtype == bool
    assert good.mean() > 0.95


def test_images_of_other_classes_than_asked_for_teach_nothing(real, good):
    """What FID does not see: the same images, their labels moved."""
    images, labels = examples(200, seed=1)
    moved = (labels + 1) % CLASSES
    bad = correct(images, moved, real, num_classes=CLASSES, seeds=(0, 1), epochs=5)
    assert bad.mean() < 0.05
    numbers = downstream.downstream(bad, good)
    assert numbers["downstream_delta"] == pytest.approx(bad.mean() - good.mean())
    assert numbers["downstream_delta_ci"][1] < -0.8


def test_equal_seeds_give_the_same_classifier_whatever_else_was_trained(real):
    """On images that one epoch does not suffice for, so that any difference would show."""
    hard, labels = examples(200, seed=1, noise=100)
    hard //= 8
    both = correct(hard, labels, real, num_classes=CLASSES, seeds=(0, 1), epochs=1)
    alone = correct(hard, labels, real, num_classes=CLASSES, seeds=(1,), epochs=1)
    assert (both[0] != both[1]).any()
    np.testing.assert_array_equal(alone[0], both[1])


def test_numbers_and_their_interval_by_hand():
    rng = np.random.default_rng(0)
    right, other = rng.random((3, 400)) < 0.8, rng.random((3, 400)) < 0.7
    numbers = downstream.downstream(right, other)
    assert numbers["downstream_accuracy"] == right.mean()
    assert numbers["downstream_accuracy_float"] == other.mean()
    delta = right.mean() - other.mean()
    difference = right.astype(float) - other
    seeds = t_quantile(2) * difference.mean(1).std(ddof=1) / np.sqrt(3)
    images = 1.96 * difference.mean(0).std(ddof=1) / np.sqrt(400)
    low, high = numbers["downstream_delta_ci"]
    assert (low + high) / 2 == pytest.approx(delta) == numbers["downstream_delta"]
    assert high - low == pytest.approx(2 * np.hypot(seeds, images), rel=1e-4)


def test_the_interval_covers_no_difference():
    """Two arms of one accuracy, with scatter between seeds: 0 lies inside about 95 times in 100."""
    rng = np.random.default_rng(1)
    inside, rounds = 0, 300
    for _ in range(rounds):
        skill = rng.normal(0.8, 0.02, (2, 3, 1))
        hard = rng.random((1, 200))
        right, other = hard < skill
        low, high = downstream.downstream(right, other)["downstream_delta_ci"]
        inside += low <= 0.0 <= high
    assert inside / rounds > 0.92


def test_what_is_not_known_is_null(good):
    assert set(downstream.downstream(None, None).values()) == {None}
    assert set(downstream.downstream(good, None).values()) == {None}
    one = downstream.downstream(good[:1], good[:1])
    assert one["downstream_delta"] == 0.0
    assert one["downstream_delta_ci"] is None
    with pytest.raises(InputError, match=r"got \(2, 90\) and \(1, 90\) answers"):
        downstream.downstream(good, good[:1])


def test_class_agreement_counts_equal_classes():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(50, 10))
    other = logits + rng.normal(size=(50, 10))
    hits = int((logits.argmax(1) == other.argmax(1)).sum())
    found = class_agreement(other, logits)
    assert 0 < hits < 50
    assert found["class_agreement"] == hits / 50
    assert found["class_agreement_ci"] == proportion_interval(hits, 50).ends
    same = class_agreement(2 * logits + 1, logits)
    assert same["class_agreement"] == same["class_agreement_ci"][1] == 1.0
    assert same["class_agreement_ci"][0] == pytest.approx(50 / (50 + 1.96**2), rel=1e-4)


@pytest.mark.parametrize(
    ("logits", "other", "message"),
    [
        (np.zeros((3, 4)), np.zeros((4, 4)), r"got logits \(3, 4\) and \(4, 4\)"),
        (np.zeros((0, 4)), np.zeros((0, 4)), "with n >= 1"),
        (np.full((3, 4), np.nan), np.zeros((3, 4)), "3 of 3 rows have NaN"),
    ],
)
def test_class_agreement_refuses(logits, other, message):
    with pytest.raises(InputError, match=message):
        class_agreement(logits, other)


def test_unusable_training_sets(real):
    images, labels = examples(60, seed=1)
    cases = [
        (images.astype(np.float32), labels, {}, "generated images float32"),
        (images[:, :6], labels, {}, "with sides that 4 divides"),
        (images, labels[:-1], {}, r"generated labels int32 of shape \(59,\) for 60 images"),
        (images, labels + 1, {}, "from 0 to 2"),
        (images, labels.astype(np.float32), {}, "labels float32"),
        (images[:49], labels[:49], {}, "got 49 images"),
        (images, labels, {"seeds": ()}, "0 seeds"),
        (images, labels, {"epochs": 0}, "0 epochs"),
        (images.repeat(2, axis=1), labels, {}, r"shape \(16, 8, 1\) for real ones of \(8, 8, 1\)"),
    ]
    for own, answers, changes, message in cases:
        with pytest.raises(InputError, match=message):
            correct(own, answers, real, num_classes=CLASSES, **changes)
    with pytest.raises(InputError, match="real labels"):
        correct(images, labels, Real(real.images, real.labels + 1), num_classes=CLASSES)


def test_real_images_are_those_prepared_and_none_is_fetched(tmp_path, monkeypatch):
    assert real_images("fashion_mnist", cache=tmp_path) is None
    assert real_images("no_such_set", cache=tmp_path) is None
    assert real_images("fashion_mnist", directory=tmp_path, cache=tmp_path) is None
    images, labels = examples(9, seed=0)
    stored = tmp_path / "fashion_mnist" / "download"
    stored.mkdir(parents=True)
    version = data.DATASETS["fashion_mnist"].version
    np.savez(
        stored / f"{version}-test.npz", images=images, labels=labels, inexact=np.zeros(9, bool)
    )
    found = real_images("fashion_mnist", cache=tmp_path)
    assert found is not None
    np.testing.assert_array_equal(found.images, images)
    monkeypatch.setenv("MPQDIFF_CACHE", str(tmp_path))
    assert real_images("fashion_mnist") is not None
    shutil.move(stored, stored.with_name("local"))
    found = real_images("fashion_mnist", cache=tmp_path)
    assert found is not None
    np.testing.assert_array_equal(found.labels, labels)
    (stored.with_name("local") / f"{version}-test.npz").write_bytes(b"damaged")
    with pytest.raises(InputError, match="is damaged"):
        real_images("fashion_mnist", cache=tmp_path)


def test_archives_in_the_users_folder_are_used(tmp_path):
    (tmp_path / "fashion_mnist").mkdir()
    with pytest.raises(InputError, match="fashion_mnist"):  # none in it: not passed over silently
        real_images("fashion_mnist", directory=tmp_path, cache=tmp_path / "cache")
