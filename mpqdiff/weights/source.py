"""Reading weights that other code bases wrote: safetensors, torch pickles (as data only), folders.

Tensors are read one by one when they are asked for. Pickled code is never run.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (numpy knows bfloat16 by name once this is imported)
import numpy as np
from safetensors import SafetensorError

from mpqdiff.errors import InputError
from mpqdiff.weights import tensors

SAFETENSORS, PICKLES = (".safetensors",), (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("ema", "state_dict", "model")  # of training checkpoints, the one to use first
PREFIXES = ("module.", "_orig_mod.")  # of data-parallel and of compiled modules


class State(Mapping[str, np.ndarray]):
    """A state dict whose tensors are read when asked for, each time anew."""

    def __init__(self, readers: Mapping[str, Callable[[], np.ndarray]]):
        self._readers = readers

    def __getitem__(self, key: str) -> np.ndarray:
        return self._readers[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def renamed(self, rename: Callable[[str], str]) -> "State":
        """The same tensors under other names. Raises InputError when two get the same."""
        readers = {rename(key): reader for key, reader in self._readers.items()}
        if len(readers) < len(self):
            raise InputError("tensors under both older and newer names of the same layer")
        return State(readers)


class Source(NamedTuple):
    """Where weights came from, the config.json beside them ({} if none), and the state dict."""

    path: Path
    config: dict[str, Any]
    state: State


def open_source(path: str | Path) -> Source:
    """Weights in a file, or in a folder as diffusers writes it.

    Raises InputError naming the file (and the key) when there is none, when it is damaged or cut
    short, or when it is a pickle that holds more than data.
    """
    path = Path(path)
    if path.is_dir():
        main = _main_file(path)
    elif path.is_file():
        main = path
    else:
        raise InputError(f"source {path}: no such file or folder")
    config = main.parent / "config.json"
    state = _state(main)
    if not state:
        raise InputError(f"source {main}: holds no tensors")
    return Source(path, _json(config) if config.is_file() else {}, _without_prefix(state))


def _main_file(folder: Path) -> Path:
    """The weights of a folder: an index of shards before single files, safetensors before others,
    and of several precisions the one without a suffix."""
    if (folder / "model_index.json").is_file():
        parts = sorted(child.parent.name for child in folder.glob("*/config.json"))
        raise InputError(
            f"source {folder}: a whole pipeline; name one of its folders: {', '.join(parts)}"
        )
    for ending in (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin"):
        found = sorted(child for child in folder.glob(f"*{ending}") if child.is_file())
        plain = [child for child in found if "." not in child.name.removesuffix(ending)]
        if len(plain or found) == 1:
            return (plain or found)[0]
        if found:
            names = ", ".join(child.name for child in found)
            raise InputError(f"source {folder}: several weights ({names}); name one of them")
    raise InputError(f"source {folder}: no .safetensors or .bin file in this folder")


def _state(path: Path) -> State:
    if path.name.endswith(".index.json"):
        return _sharded(path)
    if path.suffix in SAFETENSORS:
        return _safetensors(path)
    if path.suffix in PICKLES:
        return _pickled(path)
    known = ", ".join(SAFETENSORS + PICKLES)
    raise InputError(f"source {path}: expected a folder or a file ending in {known}")


def _sharded(path: Path) -> State:
    shards = _json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise InputError(f"source {path}: no weight_map of tensor names to files")
    readers = {}
    for name in sorted(set(shards.values())):
        shard = path.parent / name
        if shard.parent.resolve() != path.parent.resolve() or not shard.is_file():
            raise InputError(f"source {path}: its file {name} is not beside it")
        readers |= _state(shard)._readers
    different = sorted(set(readers) ^ set(shards))
    if different:
        raise InputError(f"source {path}: does not agree with its files on {different[0]}")
    return State(readers)


def _safetensors(path: Path) -> State:
    try:
        keys, _ = tensors.describe(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"source {path}: cut short or damaged ({error})") from error

    def read(key):
        try:
            return tensors.read(path, key)
        except (SafetensorError, OSError, TypeError) as error:
            raise InputError(f"source {path}: {key} cannot be read ({error})") from error

    return State({key: lambda key=key: read(key) for key in keys})


def _pickled(path: Path) -> State:
    try:
        import torch
    except ImportError as error:
        raise InputError(f"source {path}: reading it needs torch (pip install torch)") from error
    try:
        # train.py of DiT keeps its arguments, a plain record, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        raise InputError(
            f"source {path}: holds more than tensors, which is never run, or is damaged "
            f"({_reason(error)}); if you trust it, save its tensors alone, as safetensors"
        ) from error
    except (RuntimeError, EOFError, IndexError, KeyError, ValueError, TypeError, OSError) as error:
        raise InputError(f"source {path}: cut short or damaged ({_reason(error)})") from error

    def read(tensor):
        tensor = tensor.detach()
        return (tensor if tensor.dtype == torch.float32 else tensor.float()).numpy()

    held = _unwrapped(loaded, torch.is_tensor)
    other = [key for key, value in held.items() if not torch.is_tensor(value)]
    if other:
        raise InputError(f"source {path}: {other[0]!r} is not a tensor; expected a state dict")
    return State({key: lambda tensor=tensor: read(tensor) for key, tensor in held.items()})


def _unwrapped(loaded, is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    """The state dict in what a training checkpoint holds; EMA weights before trained ones."""
    if not isinstance(loaded, dict):
        return {type(loaded).__name__: loaded}
    if any(is_tensor(value) for value in loaded.values()):
        return loaded
    inner = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict)), None)
    return loaded if inner is None else inner


def _without_prefix(state: State) -> State:
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = state.renamed(lambda key, prefix=prefix: key.removeprefix(prefix))
    return state


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"source {path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"source {path}: expected a JSON object, got {type(value).__name__}")
    return value


def _reason(error: BaseException) -> str:
    """What torch says, without its advice to load the file unsafely."""
    foreign = re.search(r"(?i)unsupported (global|class|operand)[: ]+(GLOBAL )?(\S+)", str(error))
    return f"{foreign[3]} in it" if foreign else type(error).__name__
