"""Sets of uint8 images on disk, read in batches: a folder of files, an .npz or an .npy.

Pixels are what the file holds, never scaled: floats cross to uint8 in `images.to_uint8` alone.
A set is read from its beginning in one pass, so that one far larger than memory can be.
"""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from mpqdiff.artifacts import save_arrays
from mpqdiff.errors import InputError
from mpqdiff.images import save_png

SUFFIXES = (".png", ".jpg", ".jpeg")
ARRAY = "arr_0"  # where guided-diffusion's sample and reference files keep their images
# What a file's pixel format is read as; others hold more than 8 bits, or colours of another kind.
MODES = {"1": "L", "L": "L", "LA": "L", "RGB": "RGB", "P": "RGB", "RGBA": "RGB"}
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_UNREADABLE = (
    OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


class ImageSet(NamedTuple):
    """`count` images of `shape` (H, W, C) in `path`; `batches(size)` gives uint8 [<=size,H,W,C].

    Every call of `batches` reads from the beginning. It raises InputError, naming the file, on an
    image that cannot be read or is not of `shape`, and where an array is cut short.
    """

    path: Path
    count: int
    shape: tuple[int, int, int]
    batches: Callable[[int], Iterator[np.ndarray]]


def open_images(path: str | Path, *, channels: int | None = None) -> ImageSet:
    """The images in `path`: a folder with PNG or JPEG files, or an array uint8 [n,H,W,C], [n,H,W].

    A folder is read recursively, in the order of relative paths, hidden files left out; an .npz
    has its images as `arr_0` or as its only array. `channels=3` gives grey images three equal
    channels, 1 takes one of three equal ones; with None they keep their own number, which must be
    the same in all.
    Raises InputError, naming the file, on a missing path, a folder without images, a first image
    that cannot be read, another kind of file or dtype, no image, or other axes.
    """
    path = Path(path)
    if channels not in (None, 1, 3):
        raise InputError(f"got channels={channels}, expected 1 (grey), 3 (RGB) or None")
    if path.is_dir():
        return _open_folder(path, channels)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected images there")
    if path.suffix not in (".npz", ".npy"):
        raise InputError(f"{path}: expected a folder of images, an .npz or an .npy")
    return _open_array(path, channels)


def write_images(path: str | Path, images, *, labels=None) -> None:
    """Write uint8 `images` [n,H,W,C] as `path`, an .npz, or as 000000.png and so on in a folder.

    `labels` [n] go beside them in an .npz (`arr_1`), as guided-diffusion has it; a folder holds
    none. Raises InputError on another dtype or shape, labels that do not fit, and on a folder that
    has images already, which would become part of the set.
    """
    path, images = Path(path), np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise InputError(
            f"got images {images.dtype} of shape {images.shape}, expected uint8 [n,H,W,C] with C 1 "
            "or 3: pass floats through images.to_uint8 first"
        )
    if path.suffix == ".npz":
        if labels is not None and np.shape(labels) != (len(images),):
            raise InputError(f"got labels {np.shape(labels)} for {len(images)} images")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(path, {ARRAY: images, "arr_1": labels})
        return
    if labels is not None:
        raise InputError(f"{path}: a folder of images holds no labels, write an .npz")
    if path.exists() and _files(path):
        raise InputError(f"{path}: has {len(_files(path))} images already; name an empty folder")
    for index, image in enumerate(images):
        save_png(path / f"{index:06d}.png", image)


def read_image(file: Path, *, channels: int | None = None) -> np.ndarray:
    """The image in `file`, uint8 [H,W,C]; `channels` as `open_images` has it.

    Raises InputError on a file that is damaged, transparent or of more than 8 bits, and on colour
    where grey is asked for.
    """
    try:
        with Image.open(file) as picture:
            picture.load()
            if picture.mode not in MODES:
                raise InputError(
                    f"{file}: pixel format {picture.mode}, expected 8-bit grey or RGB: convert it"
                )
            alpha = "A" in picture.getbands() or "transparency" in picture.info
            if alpha and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
                raise InputError(f"{file}: has transparent pixels: put it on a background")
            image = np.asarray(picture.convert(MODES[picture.mode]))
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{file}: cannot be read as an image ({error}); write it again") from error
    return _with_channels(image[..., None] if image.ndim == 2 else image, channels, file)


def _files(folder: Path) -> list[Path]:
    found = {path.relative_to(folder): path for path in folder.rglob("*")}
    return [
        found[name]
        for name in sorted(found, key=Path.as_posix)
        if name.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in name.parts)
        and found[name].is_file()
    ]


def _open_folder(folder: Path, channels: int | None) -> ImageSet:
    files = _files(folder)
    if not files:
        raise InputError(f"{folder}: holds no image; expected files named {', '.join(SUFFIXES)}")
    shape = read_image(files[0], channels=channels).shape
    assert len(shape) == 3
    read = partial(_of_shape, shape=shape, first=files[0], channels=channels)

    def batches(size: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(files), size):
                yield np.stack(list(pool.map(read, files[start : start + size])))

    return ImageSet(folder, len(files), shape, batches)


def _of_shape(file: Path, *, shape, first: Path, channels: int | None) -> np.ndarray:
    image = read_image(file, channels=channels)
    if image.shape != shape:
        raise InputError(
            f"{file}: an image {_size(image.shape)} among images {_size(shape)} ({first}): "
            "expected one size and one number of channels; resize them the same way"
        )
    return image


def _open_array(path: Path, channels: int | None) -> ImageSet:
    with _stream(path) as stream:
        stored, n = _shape(stream, path)
    shape = (*stored[:2], channels or stored[2])

    def batches(size: int) -> Iterator[np.ndarray]:
        with _stream(path) as stream:
            _shape(stream, path)
            for start in range(0, n, size):
                rows = _rows(stream, min(size, n - start), stored, path)
                yield _with_channels(rows, channels, path)
            if _read(stream, 1, path):
                raise InputError(f"{path}: has more bytes than its header says: write it again")

    return ImageSet(path, n, shape, batches)


def _stream(path: Path) -> Any:
    """The bytes of the .npy in `path`, which may be a member of an .npz."""
    if path.suffix == ".npy":
        return path.open("rb")
    try:
        archive = zipfile.ZipFile(path)
    except _UNREADABLE as error:
        raise InputError(f"{path}: not a complete .npz ({error}); write it again") from error
    with archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        name = ARRAY if ARRAY in names or len(names) != 1 else names[0]
        if name not in names:
            raise InputError(f"{path}: has the arrays {names}, expected the images as {ARRAY}")
        return archive.open(f"{name}.npy")  # keeps the file open until it is closed itself


def _shape(stream: IO[bytes], path: Path) -> tuple[tuple[int, int, int], int]:
    """((H, W, C), n) from the header of an .npy, which is read past."""
    try:
        shape, columns_first, dtype = _HEADERS[npy.read_magic(stream)](stream)
    except (*_UNREADABLE, KeyError) as error:
        raise InputError(f"{path}: not a complete array ({error}); write it again") from error
    if dtype != np.uint8:
        raise InputError(
            f"{path}: images of dtype {dtype}, expected uint8: pass floats in [-1, 1] through "
            "mpqdiff.images.to_uint8, which also rounds them"
        )
    shape = (*shape, 1) if len(shape) == 3 else shape
    if len(shape) != 4 or shape[-1] not in (1, 3) or min(shape) < 1 or columns_first:
        order = ", in column order" if columns_first else ""
        raise InputError(
            f"{path}: images of shape {shape}{order}, expected [n,H,W,C] in row order with n, H, W "
            "at least 1 and C 1 (grey) or 3 (RGB)"
        )
    return shape[1:], shape[0]


def _rows(stream: IO[bytes], count: int, shape: tuple[int, int, int], path: Path) -> np.ndarray:
    wanted = count * int(np.prod(shape))
    data = _read(stream, wanted, path)
    if len(data) != wanted:
        raise InputError(f"{path}: cut short, its header promises more images: write it again")
    return np.frombuffer(data, np.uint8).reshape(count, *shape)


def _read(stream: IO[bytes], count: int, path: Path) -> bytes:
    try:
        return stream.read(count)
    except _UNREADABLE as error:
        raise InputError(f"{path}: damaged ({error}); write it again") from error


def _with_channels(images: np.ndarray, channels: int | None, path: Path) -> np.ndarray:
    """`images` [...,C] with `channels` of them, where that changes no colour."""
    if channels == 3 and images.shape[-1] == 1:
        return np.repeat(images, 3, -1)
    if channels == 1 and images.shape[-1] == 3:
        if (images != images[..., :1]).any():
            raise InputError(
                f"{path}: has colours, expected grey images: make them grey, or name a feature "
                "network that takes colours"
            )
        return images[..., :1]
    return images


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
