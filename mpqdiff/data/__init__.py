"""Image data sets by name: `load` gives uint8 images and labels in their original order.

Archives are checked by sha256, prepared once by tensorflow-datasets as array_record files, read
back without TensorFlow, and kept as plain arrays beside them, so that later loads take a second.
"""

import importlib
import os
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpqdiff.data.archives import Examples
from mpqdiff.errors import InputError, unknown_name


class Dataset(NamedTuple):
    """What is known of a set before it is read. `builder` (module, class) is imported on first
    use; `version` names the layout of what is prepared, and rises when that changes."""

    num_classes: int
    image_shape: tuple[int, int, int]
    builder: tuple[str, str]
    version: str


DATASETS = {
    "fashion_mnist": Dataset(
        10, (28, 28, 1), ("mpqdiff.data.fashion_mnist", "FashionMnist"), "1.0.0"
    ),
    "cifar10": Dataset(10, (32, 32, 3), ("mpqdiff.data.cifar10", "Cifar10"), "1.0.0"),
    "cifar100": Dataset(100, (32, 32, 3), ("mpqdiff.data.cifar100", "Cifar100"), "1.0.0"),
}
SPLITS = ("train", "test")


def default_cache() -> Path:
    """$MPQDIFF_CACHE, or `mpqdiff` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MPQDIFF_CACHE") or Path(base) / "mpqdiff")


def load(
    name: str,
    *,
    directory: str | Path | None,
    cache: str | Path | None = None,
    split: str = "train",
    drop_inexact: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n,H,W,C] and labels int32 [n] of `split`, in original order.

    `directory/<name>/` holds the archives; `directory=None` lets tensorflow-datasets download the
    originals, for which a network must reach their hosts. What is prepared goes to `cache`
    (default `default_cache()`) and is written whole or not at all; once it is there, neither
    archives nor network are needed. `drop_inexact` leaves out the pictures whose pixels are not
    the original ones (111 of the local CIFAR-10).

    Raises InputError on an unknown name or split, missing or damaged archives, a failed
    download, a damaged cache, or a cache folder that cannot be written.
    """
    if name not in DATASETS:
        raise unknown_name("data set", name, DATASETS)
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    source = "download" if directory is None else "local"
    cache = default_cache() if cache is None else Path(cache)
    stored = cache / name / source / f"{DATASETS[name].version}-{split}.npz"
    if stored.exists():
        examples = _read_arrays(stored)
    else:
        folder = None if directory is None else Path(directory) / name
        examples = _prepare(name, split, source, folder, cache)
        _write_arrays(stored, examples)
    kept = ~examples.inexact if drop_inexact else slice(None)
    return examples.images[kept], examples.labels[kept]


def _prepare(name: str, split: str, source: str, folder: Path | None, cache: Path) -> Examples:
    from mpqdiff.data import prepare  # imports tensorflow-datasets: seconds, and only needed here

    module, class_name = DATASETS[name].builder
    builder = getattr(importlib.import_module(module), class_name)(
        data_dir=str(cache), config=source
    )
    prepare.prepare(builder, folder)
    return prepare.read_back(builder, split)


def _write_arrays(path: Path, examples: Examples) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, **examples._asdict())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error}: name a writable cache folder") from error


def _read_arrays(path: Path) -> Examples:
    try:
        # Opened here because np.load leaves a damaged file open. Zip members carry a checksum.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return Examples(**{field: stored[field] for field in Examples._fields})
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}): delete it and run again") from error
