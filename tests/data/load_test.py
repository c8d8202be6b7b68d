"""`data.load`: small archives made here, prepared by tensorflow-datasets without TensorFlow."""

import gzip
import hashlib
import http.server
import io
import subprocess
import sys
import tarfile
import textwrap
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mpqdiff import data
from mpqdiff.data import archives
from mpqdiff.errors import InputError

COUNTS = {"train": 40, "test": 12}  # examples of the small set


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder with a Fashion-MNIST of a few random images; `archives` expects its sums."""
    rng = np.random.default_rng(0)
    target = tmp_path / "data" / "fashion_mnist"
    target.mkdir(parents=True)
    for split, names in archives.FASHION_MNIST_FILES.items():
        images = rng.integers(0, 256, (COUNTS[split], 28, 28), np.uint8)
        labels = rng.integers(0, 10, COUNTS[split], np.uint8)
        for name, array in zip(names, (images, labels), strict=True):
            sizes = np.asarray(array.shape, ">u4").tobytes()
            payload = gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())
            (target / name).write_bytes(payload)
            sha256 = hashlib.sha256(payload).hexdigest()
            monkeypatch.setitem(archives.FASHION_MNIST, name, sha256)
    return target.parent


def original(folder, split="train"):
    files = archives.local_files(folder / "fashion_mnist", archives.FASHION_MNIST)
    return archives.read_fashion_mnist(files, split)


@pytest.mark.parametrize("split", data.SPLITS)
def test_load_gives_the_original_order_and_needs_the_archives_once(folder, tmp_path, split):
    expected = original(folder, split)
    load = partial(data.load, "fashion_mnist", directory=folder, cache=tmp_path / "cache")
    images, labels = load(split=split)
    np.testing.assert_array_equal(images, expected.images)
    np.testing.assert_array_equal(labels, expected.labels)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    assert list((tmp_path / "cache").rglob(f"*{split}.array_record*"))
    for archive in (folder / "fashion_mnist").iterdir():
        archive.unlink()
    np.testing.assert_array_equal(load(split=split)[0], images)
    assert len(load(split="train")[0]) == 40
    assert len(load(split="test")[0]) == 12


def test_the_prepared_set_is_an_ordinary_tfds_set(folder, tmp_path):
    import tensorflow_datasets as tfds

    data.load("fashion_mnist", directory=folder, cache=tmp_path)
    builder = tfds.builder_from_directory(tmp_path / "fashion_mnist" / "local" / "1.0.0")
    source = builder.as_data_source("train")
    expected = original(folder)
    ids = [int(source[row]["id"]) for row in range(len(source))]
    assert sorted(ids) == list(range(COUNTS["train"]))
    assert ids != sorted(ids)
    np.testing.assert_array_equal(source[5]["image"], expected.images[ids[5]])


def test_drop_inexact_leaves_out_the_marked_rows(folder, tmp_path, monkeypatch):
    expected = original(folder)
    marks = np.arange(COUNTS["train"]) % 5 == 2
    from mpqdiff.data.fashion_mnist import FashionMnist

    monkeypatch.setitem(
        FashionMnist.READERS, "local",
        lambda files, split: expected._replace(inexact=marks),
    )  # fmt: skip
    load = partial(data.load, "fashion_mnist", directory=folder, cache=tmp_path)
    np.testing.assert_array_equal(load()[0], expected.images)
    images, labels = load(drop_inexact=True)
    np.testing.assert_array_equal(images, expected.images[~marks])
    np.testing.assert_array_equal(labels, expected.labels[~marks])


def test_a_killed_preparation_is_redone(folder, tmp_path):
    script = f"""
    import os, signal, sys
    from mpqdiff import data
    from mpqdiff.data import archives
    archives.FASHION_MNIST.update({dict(archives.FASHION_MNIST)!r})
    from mpqdiff.data.fashion_mnist import FashionMnist

    def examples(self, files, split):
        for key, row in generate(self, files, split):
            if split == "test" and key == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            yield key, row

    generate = FashionMnist._generate_examples
    FashionMnist._generate_examples = examples
    data.load("fashion_mnist", directory={str(folder)!r}, cache={str(tmp_path / "cache")!r})
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -9, killed.stderr
    assert list((tmp_path / "cache").rglob("*incomplete*")), "killed before anything was written"
    images, labels = data.load("fashion_mnist", directory=folder, cache=tmp_path / "cache")
    np.testing.assert_array_equal(images, original(folder).images)
    np.testing.assert_array_equal(labels, original(folder).labels)


def test_import_and_load_need_no_tensorflow(folder, tmp_path):
    script = f"""
    import sys
    from mpqdiff import data
    assert not {{"tensorflow", "tensorflow_datasets", "jax"}} & set(sys.modules), "heavy import"

    from importlib.machinery import PathFinder
    find = PathFinder.find_spec  # from here on tensorflow cannot be found, installed or not
    PathFinder.find_spec = lambda name, *rest: None if name == "tensorflow" else find(name, *rest)
    from mpqdiff.data import archives
    archives.FASHION_MNIST.update({dict(archives.FASHION_MNIST)!r})
    images, _ = data.load("fashion_mnist", directory={str(folder)!r}, cache={str(tmp_path)!r})
    assert len(images) == {COUNTS["train"]}
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_cifar100_from_its_archive(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    records = rng.integers(0, 100, (9, 2 + 3072), np.uint8)
    ((name, _),) = archives.CIFAR100_BINARY.items()
    path = tmp_path / "cifar100" / name
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for split, rows in (("train", records[:6]), ("test", records[6:])):
            member = tarfile.TarInfo(f"cifar-100-binary/{split}.bin")
            member.size = rows.size
            archive.addfile(member, io.BytesIO(rows.tobytes()))
    load = partial(data.load, "cifar100", directory=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(InputError, match=r"cifar-100-binary\.tar\.gz: sha256"):
        load()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(archives.CIFAR100_BINARY, name, sha256)
    images, labels = load()
    np.testing.assert_array_equal(labels, records[:6, 1])
    np.testing.assert_array_equal(images[..., 2], records[:6, -1024:].reshape(-1, 32, 32))
    assert len(load(split="test")[0]) == 3


@pytest.fixture
def host(folder, monkeypatch):
    """A local web server in the place of the originals' host; gives nothing when closed."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder / "fashion_mnist")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from mpqdiff.data.fashion_mnist import FashionMnist

    monkeypatch.setattr(FashionMnist, "URL", f"http://127.0.0.1:{server.server_port}/")
    yield server
    server.shutdown()
    server.server_close()


def test_without_a_directory_the_originals_are_downloaded(folder, tmp_path, host):
    images, labels = data.load("fashion_mnist", directory=None, cache=tmp_path)
    np.testing.assert_array_equal(images, original(folder).images)
    np.testing.assert_array_equal(labels, original(folder).labels)


def test_a_failed_download_is_an_input_error(folder, tmp_path, host):
    (folder / "fashion_mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"cannot prepare fashion_mnist.*network"):
        data.load("fashion_mnist", directory=None, cache=tmp_path)
    assert not list(tmp_path.rglob("*.npz"))


def test_missing_archives_write_nothing(folder, tmp_path):
    (folder / "fashion_mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"lacks t10k-labels-idx1-ubyte\.gz"):
        data.load("fashion_mnist", directory=folder, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.array_record*"))


def test_a_damaged_archive_is_an_input_error(folder, tmp_path):
    path = folder / "fashion_mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: sha256"):
        data.load("fashion_mnist", directory=folder, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npz"))


def flip_middle(path: Path):
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 255
    path.write_bytes(payload)


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:-2000])


@pytest.mark.parametrize("damage", [flip_middle, cut])
def test_damage_to_the_cache_is_an_input_error(folder, tmp_path, damage):
    load = partial(data.load, "fashion_mnist", directory=folder, cache=tmp_path)
    load()
    (arrays,) = (tmp_path / "fashion_mnist" / "local").glob("*-train.npz")
    damage(arrays)
    with pytest.raises(InputError, match=r"is damaged.*delete it"):
        load()
    arrays.unlink()
    (records,) = tmp_path.rglob("*train.array_record*")
    damage(records)
    with pytest.raises(InputError, match=r"cannot be read.*delete that folder"):
        load()


def test_unusable_names_and_folders(folder, tmp_path):
    with pytest.raises(
        InputError, match="unknown data set 'mnist'; known: cifar10, cifar100, fash"
    ):
        data.load("mnist", directory=folder, cache=tmp_path)
    with pytest.raises(InputError, match="unknown split 'valid'; known: test, train"):
        data.load("fashion_mnist", directory=folder, cache=tmp_path, split="valid")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="writable"):
        data.load("fashion_mnist", directory=folder, cache=tmp_path / "file")
