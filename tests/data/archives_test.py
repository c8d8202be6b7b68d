"""The archive readers, on small archives made here and on the real ones where they are."""

import gzip
import hashlib
import io
import lzma
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mpqdiff.data import archives
from mpqdiff.errors import InputError

DATA = Path(os.environ.get("MPQDIFF_DATA", "../shared/data"))


def needs_data(name):
    return pytest.mark.skipif(
        not (DATA / name).is_dir(), reason=f"no {name} archives; set MPQDIFF_DATA to their folder"
    )


def sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def idx(array: np.ndarray) -> bytes:
    sizes = np.asarray(array.shape, ">u4").tobytes()
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """(files, images, labels) of 7 examples under the names of the training archives."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 28, 28), np.uint8)
    labels = rng.integers(0, 10, 7, np.uint8)
    names = archives.FASHION_MNIST_FILES["train"]
    for name, array in zip(names, (images, labels), strict=True):
        payload = idx(array)
        (tmp_path / name).write_bytes(payload)
        monkeypatch.setitem(archives.FASHION_MNIST, name, sha256(payload))
    return archives.local_files(tmp_path, names), images, labels


def test_idx_archives_give_examples_in_file_order(fashion):
    files, images, labels = fashion
    examples = archives.read_fashion_mnist(files, "train")
    np.testing.assert_array_equal(examples.images, images[..., None])
    np.testing.assert_array_equal(examples.labels, labels)
    assert (examples.images.dtype, examples.labels.dtype) == (np.uint8, np.int32)
    assert not examples.inexact.any()


def test_a_changed_byte_is_an_input_error(fashion):
    files, *_ = fashion
    path = files["train-images-idx3-ubyte.gz"]
    payload = bytearray(path.read_bytes())
    payload[100] ^= 1
    path.write_bytes(payload)
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte.gz: sha256 is .* expected"):
        archives.read_fashion_mnist(files, "train")


@pytest.mark.parametrize("damage", [lambda b: b[:-40], lambda b: b"", lambda b: b"text" * 9])
def test_undecodable_archive_is_an_input_error(fashion, monkeypatch, damage):
    files, *_ = fashion
    name = "train-labels-idx1-ubyte.gz"
    payload = damage(files[name].read_bytes())
    files[name].write_bytes(payload)
    monkeypatch.setitem(archives.FASHION_MNIST, name, sha256(payload))
    with pytest.raises(InputError, match="cannot be read"):
        archives.read_fashion_mnist(files, "train")


def test_missing_archives_are_named_with_their_folder(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").touch()
    with pytest.raises(InputError) as caught:
        archives.local_files(tmp_path, archives.FASHION_MNIST)
    lacking = str(caught.value).partition("expected")[0]
    assert str(tmp_path) in lacking
    assert "t10k-labels-idx1-ubyte.gz" in lacking
    assert "train-images" not in lacking
    assert "directory=None" in str(caught.value)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """(files, images, labels) of 10 training images in five array files, rows 3 and 8 inexact."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (10, 32, 32, 3), np.uint8)
    labels, inexact = rng.integers(0, 10, 10, np.uint8), np.asarray([3, 8], np.int32)
    *batches, table = archives.CIFAR10_FILES["train"]
    for name, rows in zip(batches, np.split(images, 5), strict=True):
        stream = io.BytesIO()
        np.save(stream, rows)
        (tmp_path / name).write_bytes(lzma.compress(stream.getvalue()))
    np.savez(tmp_path / table, train=labels, inexact_train=inexact)
    for name, array in (("images", images), ("labels", labels), ("inexact", inexact)):
        monkeypatch.setitem(archives.CIFAR10_ARRAYS, f"train_{name}", sha256(array.tobytes()))
    return archives.local_files(tmp_path, archives.CIFAR10_FILES["train"]), images, labels


def test_cifar_arrays_are_joined_and_inexact_rows_marked(cifar):
    files, images, labels = cifar
    examples = archives.read_cifar10(files, "train")
    np.testing.assert_array_equal(examples.images, images)
    np.testing.assert_array_equal(examples.labels, labels)
    assert np.flatnonzero(examples.inexact).tolist() == [3, 8]


def test_swapped_cifar_batches_are_an_input_error(cifar):
    files, *_ = cifar
    names = "train_images_1.npy.xz", "train_images_2.npy.xz"
    swapped = files | {names[0]: files[names[1]], names[1]: files[names[0]]}
    with pytest.raises(InputError, match=r"\(images\): sha256"):
        archives.read_cifar10(swapped, "train")


@pytest.mark.parametrize("name", ["train_images_4.npy.xz", "labels.npz"])
def test_truncated_cifar_file_is_an_input_error(cifar, name):
    files, *_ = cifar
    files[name].write_bytes(files[name].read_bytes()[:-30])
    with pytest.raises(InputError, match=f"{name}.*cannot be read"):
        archives.read_cifar10(files, "train")


def test_binary_cifar_planes_become_channels(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (5, 32, 32, 3), np.uint8)
    labels = np.asarray([9, 0, 3, 3, 7], np.uint8)
    path = tmp_path / "cifar-10-binary.tar.gz"
    members = {
        name: labels[row : row + 1].tobytes() + images[row].transpose(2, 0, 1).tobytes()
        for row, name in enumerate(archives.CIFAR10_MEMBERS["train"])
    }
    monkeypatch.setitem(archives.CIFAR10_BINARY, path.name, tar_of(path, members))
    examples = archives.read_cifar10_binary({path.name: path}, "train")
    np.testing.assert_array_equal(examples.images, images)
    np.testing.assert_array_equal(examples.labels, labels)


def tar_of(path, members):
    """A .tar.gz of {name: bytes}; gives its sha256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, payload in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
    return sha256(path.read_bytes())


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """(files, images, fine labels) of 5 training and 3 test records, in one archive."""
    rng = np.random.default_rng(3)
    images, fine = rng.integers(0, 256, (8, 32, 32, 3), np.uint8), rng.integers(0, 100, 8, np.uint8)
    coarse = rng.integers(0, 20, 8, np.uint8)
    planes = images.transpose(0, 3, 1, 2).reshape(8, -1)
    records = np.concatenate([coarse[:, None], fine[:, None], planes], axis=1)
    ((name, _),) = archives.CIFAR100_BINARY.items()
    members = {
        "cifar-100-binary/fine_label_names.txt": b"apple\n",
        "cifar-100-binary/test.bin": records[5:].tobytes(),
        "cifar-100-binary/train.bin": records[:5].tobytes(),
    }
    monkeypatch.setitem(archives.CIFAR100_BINARY, name, tar_of(tmp_path / name, members))
    return {name: tmp_path / name}, images, fine


@pytest.mark.parametrize(("split", "rows"), [("train", slice(5)), ("test", slice(5, 8))])
def test_cifar100_records_give_fine_labels(cifar100, split, rows):
    files, images, fine = cifar100
    examples = archives.read_cifar100(files, split)
    np.testing.assert_array_equal(examples.images, images[rows])
    np.testing.assert_array_equal(examples.labels, fine[rows])
    assert (examples.images.dtype, examples.labels.dtype) == (np.uint8, np.int32)
    assert not examples.inexact.any()


def test_another_cifar100_archive_is_an_input_error(cifar100):
    files, *_ = cifar100
    (path,) = files.values()
    tar_of(path, {"cifar-100-binary/train.bin": bytes(3074)})
    with pytest.raises(InputError, match=r"cifar-100-binary\.tar\.gz: sha256 is .* expected"):
        archives.read_cifar100(files, "train")


@pytest.mark.parametrize(
    "members",
    [{"cifar-100-binary/train.bin": bytes(3074 + 3073)}, {"cifar-100-binary/test.bin": b""}, None],
)
def test_a_damaged_cifar100_archive_is_an_input_error(cifar100, monkeypatch, members):
    """Half a record, a member that is not there, a stream cut short."""
    files, *_ = cifar100
    ((name, path),) = files.items()
    if members is None:
        path.write_bytes(path.read_bytes()[:-200])
    else:
        tar_of(path, members)
    monkeypatch.setitem(archives.CIFAR100_BINARY, name, sha256(path.read_bytes()))
    with pytest.raises(InputError, match=f"{name}: cannot be read"):
        archives.read_cifar100(files, "train")


@needs_data("fashion_mnist")
def test_the_real_fashion_archives():
    files = archives.local_files(DATA / "fashion_mnist", archives.FASHION_MNIST)
    train, test = (archives.read_fashion_mnist(files, split) for split in ("train", "test"))
    assert train.images.shape == (60000, 28, 28, 1)
    assert test.images.shape == (10000, 28, 28, 1)
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert train.images.mean() / 255 == pytest.approx(0.28604, abs=1e-5)
    assert train.images.std() / 255 == pytest.approx(0.35302, abs=1e-5)


@needs_data("cifar10")
def test_the_real_cifar_test_arrays():
    files = archives.local_files(DATA / "cifar10", archives.CIFAR10_FILES["test"])
    test = archives.read_cifar10(files, "test")
    assert test.images.shape == (10000, 32, 32, 3)
    assert test.inexact.sum() == 25
    assert np.bincount(test.labels).tolist() == [1000] * 10
