"""The feature network and the reference as shipped, and what happens when they are damaged."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpqdiff import data
from mpqdiff.errors import InputError
from mpqdiff.evaluate import features, train_features

DATA = Path(os.environ.get("MPQDIFF_DATA", "../shared/data"))
needs_data = pytest.mark.skipif(
    not (DATA / "fashion_mnist").is_dir(),
    reason="no fashion_mnist archives; set MPQDIFF_DATA to the folder that holds them",
)
WEIGHTS, REFERENCE = "fashion_classifier.safetensors", "fashion_reference.npz"


@pytest.fixture(scope="module")
def network():
    return features.load()


@pytest.fixture(scope="module")
def reference():
    return features.load_reference()


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return data.load(
        "fashion_mnist", directory=DATA, cache=tmp_path_factory.mktemp("cache"), split="test"
    )


@pytest.fixture
def zoo(tmp_path):
    """A copy of the shipped files, to be damaged."""
    for name in (WEIGHTS, REFERENCE):
        shutil.copy(features.ZOO / name, tmp_path / name)
    return tmp_path


def pictures(count):
    return np.random.default_rng(3).integers(0, 256, (count, 28, 28, 1), np.uint8)


def test_extract_does_not_depend_on_the_batch(network):
    images = pictures(7)
    values, logits = features.extract(network, images, batch=7)
    assert values.shape == (7, 64)
    assert logits.shape == (7, 10)
    assert values.dtype == logits.dtype == np.float32
    compiled = features.forward._cache_size()
    padded = features.extract(network, images, batch=4)
    assert features.forward._cache_size() == compiled + 1
    np.testing.assert_allclose(padded[0], values, atol=1e-4)
    np.testing.assert_allclose(padded[1], logits, atol=1e-4)
    again = features.extract(network, images, batch=4)
    np.testing.assert_array_equal(again[0], padded[0])
    np.testing.assert_array_equal(again[1], padded[1])


@pytest.fixture
def spatial_network():
    """A network with spatial features that takes any size, and the batches that it was given."""
    seen = []

    def apply(images):
        seen.append(images)
        level = np.asarray(images, np.float32).reshape(len(images), -1)
        return features.Features(level[:, :1], level[:, 1:3], level)

    return features.FeatureNetwork("spy", "0", apply, None, batch=4), seen


def test_a_stream_holds_one_batch_of_uint8_at_a_time(spatial_network):
    network, seen = spatial_network
    images = pictures(10)[:, :3, :2]
    taken = 0
    for part in features.stream(network, images):
        assert len(seen) == taken // 4 + 1, "a later batch was made before it was asked for"
        count = len(part.features)
        rows = images[taken : taken + count].reshape(count, -1)
        np.testing.assert_array_equal(part.spatial, rows)
        taken += count
    assert taken == 10
    assert all(batch.dtype == np.uint8 and batch.shape == (4, 3, 2, 1) for batch in seen)


@pytest.mark.parametrize("batch", [None, 1, 3, 10, 64])
def test_collect_gives_every_output_of_every_image(spatial_network, batch):
    network, _ = spatial_network
    images = pictures(10)[:, :2, :2]
    flat = images.reshape(10, -1).astype(np.float32)
    found = features.collect(network, images, batch=batch)
    for got, wanted in zip(found, (flat[:, :1], flat[:, 1:3], flat), strict=True):
        np.testing.assert_array_equal(got, wanted)
    two = features.extract(network, images, batch=batch)
    assert len(two) == 2
    for got, wanted in zip(two, found, strict=False):
        np.testing.assert_array_equal(got, wanted)


def test_the_classifier_has_no_spatial_features(network):
    found = features.collect(network, pictures(2), batch=2)
    assert found.spatial is None
    np.testing.assert_array_equal(
        found.features, features.extract(network, pictures(2), batch=2)[0]
    )
    assert network.accepts((28, 28, 1)) and not network.accepts((28, 28, 3))
    assert not network.is_fid


def by_hand(tensors, images):
    """The shipped network in plain numpy, float64."""
    x = images / 127.5 - 1.0
    for layer, pool in enumerate((2, 2, 1)):
        kernel = tensors[f"Conv_{layer}/kernel"].astype(np.float64)
        n, height, width, _ = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = sum(
            padded[:, row : row + height, column : column + width] @ kernel[row, column]
            for row in range(3)
            for column in range(3)
        )
        x = np.max(
            [x[:, row::pool, column::pool] for row in range(pool) for column in range(pool)], 0
        )
        groups = x.reshape(n, -1, 8, x.shape[-1] // 8)
        spread = np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
        x = ((groups - groups.mean((1, 3), keepdims=True)) / spread).reshape(x.shape)
        scale, bias = (tensors[f"GroupNorm_{layer}/{name}"] for name in ("scale", "bias"))
        x = np.maximum(x * scale + bias, 0)
    values = x.reshape(len(x), -1) @ tensors["features/kernel"] + tensors["features/bias"]
    return values, values @ tensors["logits/kernel"] + tensors["logits/bias"]


def test_the_network_computes_what_its_weights_say(network):
    tensors = {k: v.astype(np.float64) for k, v in load_file(features.ZOO / WEIGHTS).items()}
    expected = by_hand(tensors, pictures(3))
    for found, wanted in zip(features.extract(network, pictures(3)), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "images",
    [
        pictures(2).astype(np.float32),
        pictures(2).astype(np.int32),
        pictures(2)[..., 0],
        pictures(2).repeat(3, axis=-1),
        pictures(0),
        pictures(2).tolist(),
    ],
)
def test_only_uint8_images_of_the_right_shape_enter(network, images):
    with pytest.raises(InputError, match=r"fashion_classifier takes uint8 \[n, 28, 28, 1\]"):
        features.extract(network, images)


def test_a_batch_of_none_is_refused(network):
    with pytest.raises(InputError, match="batch=0"):
        features.extract(network, pictures(2), batch=0)


def test_shipped_files_are_small_and_described():
    weights = (features.ZOO / WEIGHTS).read_bytes()
    assert len(weights) <= 2e6
    assert (features.ZOO / REFERENCE).stat().st_size <= 1.5e6
    card = (features.ZOO / "fashion_classifier.md").read_text()
    assert hashlib.sha256(weights).hexdigest() in card
    assert all(tensor.dtype == np.float16 for tensor in load_file(features.ZOO / WEIGHTS).values())


def test_reference_belongs_to_the_shipped_network(network, reference):
    assert reference.network_hash == network.hash
    assert (reference.num_train, reference.num_test) == (60000, 10000)
    assert reference.train_features.shape == (4000, 64)
    assert reference.test_features.shape == (5000, 64)


@pytest.mark.parametrize("split", ["train", "test"])
def test_stored_features_sample_the_stored_statistics(reference, split):
    mean, cov, values, indices = (
        getattr(reference, f"{split}_{part}") for part in ("mean", "cov", "features", "indices")
    )
    assert mean.dtype == cov.dtype == np.float64
    assert values.dtype == np.float32
    assert len(np.unique(indices)) == len(indices) == len(values)
    assert indices.min() >= 0
    assert indices.max() < getattr(reference, f"num_{split}")
    np.testing.assert_array_equal(cov, cov.T)
    assert np.linalg.eigvalsh(cov).min() > 1e-6 * np.trace(cov), "features are degenerate"
    error = np.sqrt(np.diag(cov) / len(values))
    assert (np.abs(values.mean(0, dtype=np.float64) - mean) < 4.5 * error).all()
    np.testing.assert_allclose(values.var(0), np.diag(cov), rtol=0.15)


def test_the_head_labels_stored_test_features(network, reference):
    head = network.apply.args[1]["logits"]
    logits = reference.test_features @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    assert np.mean(logits.argmax(1) == reference.test_labels) >= 0.92


@needs_data
def test_accuracy_of_the_shipped_classifier(network, held_out):
    images, labels = held_out
    values, logits = features.extract(network, images)
    accuracy = np.mean(logits.argmax(1) == labels)
    assert accuracy >= 0.92
    card = (features.ZOO / "fashion_classifier.md").read_text()
    assert f"test accuracy | {accuracy:.3f}" in card
    reference = features.load_reference(network=network)
    rows = reference.test_indices
    np.testing.assert_allclose(values[rows], reference.test_features, rtol=2e-3, atol=5e-3)
    np.testing.assert_array_equal(labels[rows], reference.test_labels)
    np.testing.assert_allclose(values.mean(0, dtype=np.float64), reference.test_mean, atol=1e-4)
    cov = np.cov(values.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(cov, reference.test_cov, atol=1e-4 * np.trace(cov))


@pytest.mark.parametrize("name", [WEIGHTS, REFERENCE])
@pytest.mark.parametrize("kept", [0, 5, 5000, -100])
def test_truncated_files_are_input_errors(zoo, name, kept):
    (zoo / name).write_bytes((zoo / name).read_bytes()[:kept])
    with pytest.raises(InputError, match=f"{name}: not a complete"):
        features.load_reference(folder=zoo)


def test_a_flipped_byte_in_the_reference_is_an_input_error(zoo):
    payload = bytearray((zoo / REFERENCE).read_bytes())
    payload[len(payload) // 2] ^= 255
    (zoo / REFERENCE).write_bytes(payload)
    with pytest.raises(InputError, match="not a complete reference"):
        features.load_reference(folder=zoo)


def test_weights_that_are_not_finite_or_of_other_shapes(zoo):
    tensors = load_file(zoo / WEIGHTS)
    bad = tensors["logits/bias"].copy()
    bad[3] = np.nan
    save_file(tensors | {"logits/bias": bad}, zoo / WEIGHTS)
    with pytest.raises(InputError, match="not finite in logits/bias"):
        features.load(folder=zoo)
    save_file(tensors | {"logits/bias": bad[:9]}, zoo / WEIGHTS)
    with pytest.raises(InputError, match="expected those of network 'fashion_classifier'"):
        features.load(folder=zoo)


@pytest.mark.parametrize("field", ["train_mean", "test_cov", "train_features"])
def test_a_reference_with_nan_is_an_input_error(zoo, field):
    with np.load(zoo / REFERENCE) as stored:
        arrays = dict(stored)
    arrays[field][1] = np.nan
    np.savez(zoo / REFERENCE, **arrays)
    with pytest.raises(InputError, match=f"not finite in the {field[:4].rstrip('_')}"):
        features.load_reference(folder=zoo)


def test_a_reference_that_lacks_or_mixes_fields_is_an_input_error(zoo):
    with np.load(zoo / REFERENCE) as stored:
        arrays = dict(stored)
    np.savez(zoo / REFERENCE, **{k: v for k, v in arrays.items() if k != "test_cov"})
    with pytest.raises(InputError, match="not a complete reference"):
        features.load_reference(folder=zoo)
    np.savez(zoo / REFERENCE, **arrays | {"test_labels": arrays["train_labels"]})
    with pytest.raises(InputError, match="shapes of the test statistics"):
        features.load_reference(folder=zoo)


def test_a_reference_of_other_weights_is_refused(zoo):
    tensors = load_file(zoo / WEIGHTS)
    save_file(tensors | {"logits/bias": tensors["logits/bias"] + np.float16(1)}, zoo / WEIGHTS)
    other = features.load(folder=zoo)
    with pytest.raises(InputError, match="features of different weights cannot be compared"):
        features.load_reference(network=other)


def test_unknown_and_missing_names(tmp_path):
    with pytest.raises(InputError, match="unknown feature network 'resnet'; known: fashion_cl"):
        features.load("resnet")
    with pytest.raises(InputError, match="cannot be read"):
        features.load(folder=tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        features.load_reference("other_reference")


def test_shifted_moves_whole_pictures():
    images = np.zeros((200, 28, 28, 1), np.uint8)
    images[:, 10:15, 8:20] = np.arange(1, 61, dtype=np.uint8).reshape(5, 12, 1)
    moved = train_features.shifted(images, np.random.default_rng(0))
    assert moved.shape == images.shape
    assert moved.dtype == np.uint8
    shifts = set()
    for picture in moved:
        row, column, _ = np.argwhere(picture)[0] - [10, 8, 0]
        shifts.add((int(row), int(column)))
        np.testing.assert_array_equal(np.roll(picture, (-row, -column), (0, 1)), images[0])
    steps = range(-train_features.MAX_SHIFT, train_features.MAX_SHIFT + 1)
    assert shifts == {(row, column) for row in steps for column in steps}


def test_training_writes_files_that_load(tmp_path, monkeypatch):
    images, labels = pictures(96), np.arange(96, dtype=np.int32) % 10
    images[:, :3] = labels[:, None, None, None] * 28  # a class can be read off the first rows

    def small(name, *, directory, split):
        return (images, labels) if split == "train" else (images[:40], labels[:40])

    monkeypatch.setattr(train_features.data, "load", small)
    settings = {
        "epochs": 2, "batch": 32, "learning_rate": 1e-3, "weight_decay": 0.05, "seed": 0
    }  # fmt: skip
    with pytest.raises(InputError, match="--batch=97 exceeds the 96 training images"):
        train_features.run(None, tmp_path, settings | {"batch": 97})
    train_features.run(None, tmp_path, settings)
    network = features.load(folder=tmp_path)
    reference = features.load_reference(folder=tmp_path)
    values, _ = features.extract(network, images)
    np.testing.assert_allclose(reference.train_mean, values.mean(0), atol=1e-4)
    np.testing.assert_allclose(reference.train_cov, np.cov(values.T), atol=1e-4)
    assert (reference.num_train, reference.num_test) == (96, 40)
    card = (tmp_path / "fashion_classifier.md").read_text()
    assert network.hash in card
    assert "--epochs=2 --batch=32" in card
    assert not list(tmp_path.glob(".*")), "temporary files are left"
