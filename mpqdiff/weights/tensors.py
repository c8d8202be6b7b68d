"""Safetensors files read and written tensor by tensor, so that memory holds one of them at a time.

Each read opens the file anew: the pages of a mapping that stays open count as memory of the
process, as many as were read.
"""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

CODES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(np.int32): "I32",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
}


class Layout(NamedTuple):
    """Shape and type of a tensor that is still to come."""

    shape: tuple[int, ...]
    dtype: Any = np.float32

    @property
    def bytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


def layout(tensors: Mapping[str, np.ndarray]) -> dict[str, Layout]:
    """That of tensors which are there."""
    return {name: Layout(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def describe(path: Path) -> tuple[list[str], dict[str, str]]:
    """(names, metadata) of a file. Raises SafetensorError or OSError."""
    with safe_open(path, framework="numpy") as file:
        return list(file.keys()), file.metadata() or {}


def read(path: Path, name: str) -> np.ndarray:
    """One tensor. Raises SafetensorError, OSError or TypeError (a type that NumPy lacks)."""
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(name)


def write(
    path: Path,
    layouts: Mapping[str, Layout],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> int:
    """Write `tensors` as they come, each at its place; returns the size of the file in bytes.

    Not atomic: `path` is a name that nobody reads. All of `layouts` must come, in any order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, one in layouts.items():
        places = [end, end := end + one.bytes]
        code = CODES[np.dtype(one.dtype)]
        header[name] = {"dtype": code, "shape": list(one.shape), "data_offsets": places}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    left = set(layouts)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            one = layouts[name]
            assert tensor.shape == tuple(one.shape), (name, tensor.shape, one.shape)
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            # Contiguous: a view would be written as it lies in memory.
            np.ascontiguousarray(tensor, np.dtype(one.dtype).newbyteorder("<")).tofile(file)
            left.discard(name)
    assert not left, f"{sorted(left)} never came"
    return 8 + len(text) + end
