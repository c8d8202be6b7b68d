"""The one boundary between float images in [-1, 1] and uint8 ones, and PNG files of the latter.

Convention: uint8 u stands for u / 127.5 - 1, so -1 is black, 1 is white, and all 256 levels
survive a round trip. Rounding is half to even: the float grey 0.0 (127.5) becomes 128.
Everything past the sampler (features, metrics, files) takes uint8; an image already in [0, 1]
that is scaled a second time comes out washed out, so nothing else in the package scales images.
`evaluate.image_folder` reads and writes sets of uint8 images and never converts any.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mpqdiff.errors import InputError


def to_uint8(x) -> np.ndarray:
    """uint8 of float images `x` [...] in [-1, 1]: round((x + 1) * 127.5), clipped to [0, 255].

    Raises InputError on a dtype that is not floating, and on NaN or infinity.
    """
    x = np.asarray(x)
    # Asked this way round because numpy does not count bfloat16 among its floating dtypes.
    if x.dtype.kind in "biuc":
        raise InputError(f"got images of dtype {x.dtype}, expected floats in [-1, 1]")
    x = x.astype(np.float32)
    bad = int(np.count_nonzero(~np.isfinite(x)))
    if bad:
        raise InputError(f"{bad} of {x.size} pixels are NaN or infinite: check the sampler")
    return np.clip(np.rint((x + 1.0) * 127.5), 0, 255).astype(np.uint8)


def from_uint8(images) -> Any:
    """float32 in [-1, 1] of uint8 `images` [...], a host, device or traced array as they are.

    Raises InputError on another dtype.
    """
    images = images if hasattr(images, "astype") else np.asarray(images)
    _check_uint8(images)
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def save_png(path, image) -> None:
    """Write `image` uint8 [H,W,C], C 1 (grey) or 3 (RGB), losslessly to `path`.

    The file appears whole or not at all. Raises InputError on another dtype or shape.
    """
    image = _uint8(image)
    if image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise InputError(f"got an image of shape {image.shape}, expected [H,W,1] or [H,W,3]")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(partial, format="PNG")
    os.replace(partial, path)


def grid(images, *, columns: int | None = None, gap: int = 1) -> np.ndarray:
    """Tile uint8 `images` [n,H,W,C] row by row into one [rows*(H+gap)-gap, ..., C] picture.

    `columns` defaults to the ceiling of sqrt(n); `gap` pixels of black separate the tiles.
    Raises InputError on another dtype or rank, no image, or a column count below 1.
    """
    images = _uint8(images)
    if images.ndim != 4 or len(images) == 0:
        raise InputError(f"got images of shape {images.shape}, expected [n,H,W,C] with n >= 1")
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    if columns < 1:
        raise InputError(f"got columns={columns}, expected at least 1")
    rows = -(-n // columns)
    tiles = np.zeros((rows * columns, height + gap, width + gap, channels), np.uint8)
    tiles[:n, :height, :width] = images
    tiles = tiles.reshape(rows, columns, height + gap, width + gap, channels)
    picture = tiles.transpose(0, 2, 1, 3, 4).reshape(rows * (height + gap), -1, channels)
    return picture[: picture.shape[0] - gap, : picture.shape[1] - gap]


def save_grid(path, images, *, columns: int | None = None, gap: int = 1) -> None:
    """Write the `grid` of uint8 `images` [n,H,W,C] to the PNG file `path`."""
    save_png(path, grid(images, columns=columns, gap=gap))


def _uint8(images) -> np.ndarray:
    images = np.asarray(images)
    _check_uint8(images)
    return images


def _check_uint8(images) -> None:
    if images.dtype != np.uint8:
        raise InputError(f"got images of dtype {images.dtype}, expected uint8: call to_uint8 first")
