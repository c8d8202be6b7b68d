"""The archives of Fashion-MNIST, CIFAR-10 and CIFAR-100, read with gzip, lzma, tar and numpy alone.

Every reader takes the paths of its files by name and gives `Examples` in the original order,
after the sha256 of what it read was found right. It raises InputError where a file is missing,
cut short or different.
"""

import gzip
import hashlib
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpqdiff.errors import InputError

FASHION_MNIST = {  # file name -> sha256 of the file (Zalando Research, MIT licence)
    "train-images-idx3-ubyte.gz": (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
    ),
    "train-labels-idx1-ubyte.gz": (
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
    ),
}
FASHION_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
# The unpacked stand-in of CIFAR-10: sha256 of the array bytes, for an xz file is not unique.
CIFAR10_ARRAYS = {
    "train_images": "c461bd4536fb85ed1eb486daab6efe1841bd78a4c1eb300d5c7b5ac7f9c941b4",
    "test_images": "ca999a174ec711bbad89d5cc53d425e155595742a396a5ba95d0a218eac0704a",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    "train_inexact": "6cbca04d8dbfc76e2100055d3984079532518dddc0ba55ef1ed629fbf5f761a5",
    "test_inexact": "e42347e2f666a290f22a2f04d245960870f04e52cc8dbabdd7513d15762c57c4",
}
CIFAR10_FILES = {
    "train": (*(f"train_images_{i}.npy.xz" for i in range(1, 6)), "labels.npz"),
    "test": ("test_images.npy.xz", "labels.npz"),
}
CIFAR10_BINARY = {
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
}
CIFAR10_MEMBERS = {
    "train": tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("cifar-10-batches-bin/test_batch.bin",),
}
CIFAR100_BINARY = {
    "cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
}
CIFAR100_MEMBERS = {
    "train": ("cifar-100-binary/train.bin",),
    "test": ("cifar-100-binary/test.bin",),
}
UNREADABLE = (
    OSError, EOFError, LookupError, ValueError, lzma.LZMAError, tarfile.TarError, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip
CIFAR_PIXELS = 3 * 32 * 32  # bytes: the planes of red, green and blue


class Examples(NamedTuple):
    """One split in original order: `images` uint8 [n,H,W,C], `labels` int32 [n], and `inexact`
    bool [n], true where the pixels are not the original ones (JPEG decodes, CIFAR-10 only)."""

    images: np.ndarray
    labels: np.ndarray
    inexact: np.ndarray


def local_files(folder: Path, names) -> dict[str, Path]:
    """Where each file of `names` lies in `folder`. Raises InputError where one is missing."""
    files = {name: Path(folder) / name for name in names}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        raise InputError(
            f"folder {folder} lacks {', '.join(missing)}; expected {', '.join(names)}. Put the "
            "archives there or name the folder that holds them; with directory=None "
            "tensorflow-datasets downloads the originals instead, which needs a network"
        )
    return files


def read_fashion_mnist(files: Mapping[str, Path], split: str) -> Examples:
    """`split` of the four original IDX archives; images [n,28,28,1]."""
    images, labels = (
        _idx(_checked(files[name], FASHION_MNIST[name]), files[name])
        for name in FASHION_MNIST_FILES[split]
    )
    return Examples(images[..., None], labels.astype(np.int32), np.zeros(len(labels), bool))


def read_cifar10(files: Mapping[str, Path], split: str) -> Examples:
    """`split` of the stand-in arrays; images [n,32,32,3] RGB."""
    *batches, table = (files[name] for name in CIFAR10_FILES[split])
    images = np.concatenate([_npy_xz(batch) for batch in batches])
    try:
        with table.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            labels, rows = stored[split], stored[f"inexact_{split}"]
    except UNREADABLE as error:
        raise _corrupted(table, error) from error
    for name, array in (("images", images), ("labels", labels), ("inexact", rows)):
        _check_sum(array.tobytes(), CIFAR10_ARRAYS[f"{split}_{name}"], f"{table.parent} ({name})")
    inexact = np.zeros(len(labels), bool)
    inexact[rows] = True
    return Examples(images, labels.astype(np.int32), inexact)


def read_cifar10_binary(files: Mapping[str, Path], split: str) -> Examples:
    """`split` of the original `cifar-10-binary.tar.gz`; images [n,32,32,3] RGB, all exact."""
    return _cifar(files, CIFAR10_BINARY, CIFAR10_MEMBERS[split], label_bytes=1)


def read_cifar100(files: Mapping[str, Path], split: str) -> Examples:
    """`split` of the original `cifar-100-binary.tar.gz`; images [n,32,32,3] RGB, all exact, and
    the fine labels of 100 classes."""
    return _cifar(files, CIFAR100_BINARY, CIFAR100_MEMBERS[split], label_bytes=2)


def _cifar(files, sums: Mapping[str, str], members, label_bytes: int) -> Examples:
    """Records of `label_bytes`, the last of which is the class, and CIFAR_PIXELS."""
    ((name, sha256),) = sums.items()
    payload = _checked(files[name], sha256)
    try:
        with tarfile.open(fileobj=io.BytesIO(payload), mode="r:gz") as archive:
            streams = [archive.extractfile(member) for member in members]
            records = b"".join(stream.read() for stream in streams if stream is not None)
        table = np.frombuffer(records, np.uint8).reshape(-1, label_bytes + CIFAR_PIXELS)
    except UNREADABLE as error:
        raise _corrupted(files[name], error) from error
    images = table[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = table[:, label_bytes - 1].astype(np.int32)
    return Examples(np.ascontiguousarray(images), labels, np.zeros(len(labels), bool))


def _checked(path: Path, sha256: str) -> bytes:
    payload = path.read_bytes()
    _check_sum(payload, sha256, str(path))
    return payload


def _check_sum(payload: bytes, sha256: str, name: str) -> None:
    found = hashlib.sha256(payload).hexdigest()
    if found != sha256:
        raise InputError(
            f"{name}: sha256 is {found} ({len(payload)} bytes), expected {sha256}; the data are "
            "cut short or changed: fetch them again"
        )


def _idx(packed: bytes, path: Path) -> np.ndarray:
    """An IDX array: u8 0, 0, 8 (uint8), rank; big-endian u32 sizes; then the bytes."""
    try:
        payload = gzip.decompress(packed)
        rank = payload[3]
        shape = np.frombuffer(payload, ">u4", count=rank, offset=4)
        return np.frombuffer(payload, np.uint8, offset=4 + 4 * rank).reshape(shape.tolist())
    except UNREADABLE as error:
        raise _corrupted(path, error) from error


def _npy_xz(path: Path) -> np.ndarray:
    try:
        with lzma.open(path) as stream:
            return np.load(io.BytesIO(stream.read()), allow_pickle=False)
    except UNREADABLE as error:
        raise _corrupted(path, error) from error


def _corrupted(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be read ({error}): fetch it again")
