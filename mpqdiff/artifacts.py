"""Stage outputs on disk, keyed by content: a killed run continues, a repeated one is free.

`workdir/artifacts/<stage>/<hash>/` holds one stage's output. The hash covers the stage's name and
version, the configuration it used and the hashes of its inputs. Work happens in
`<hash>.partial/`, where finished chunks survive a kill; the folder is renamed into place when it
is complete, with the sha256 of every file beside it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mpqdiff.errors import InputError

MANIFEST = "artifact.json"


def digest(*parts) -> str:
    """sha256 (first 16 hex digits) of JSON-able values, bytes and arrays."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray | jax.Array):
            array = np.asarray(part)
            state.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        elif isinstance(part, bytes):
            state.update(part)
        else:
            state.update(json.dumps(part, sort_keys=True, default=str).encode())
        state.update(b"\0")
    return state.hexdigest()[:16]


def tree_digest(tree) -> str:
    """The digest of a pytree of arrays: paths, dtypes, shapes and bytes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return digest(*(part for path, leaf in leaves for part in (jax.tree_util.keystr(path), leaf)))


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Atomic JSON; NaN and infinity, which are not JSON, are refused with InputError."""
    try:
        text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise InputError(f"{path} would hold NaN or infinity ({error}); not written") from error
    write_atomically(path, text.encode())


def read_json(path: Path):
    """The JSON value in `path`; InputError when it is missing, cut short or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); delete it and run again") from error


def save_arrays(path: Path, arrays: dict) -> None:
    """Atomic uncompressed .npz of a flat dict of arrays (None is left out)."""
    partial = path.with_name(f".{path.name}.partial.npz")
    try:
        kept: dict[str, Any] = {k: np.asarray(a) for k, a in arrays.items() if a is not None}
        np.savez(partial, **kept)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz; InputError when it is missing or corrupted."""
    try:
        # Opened here: on a damaged file, np.load would leave it open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it and run again") from error


class Store:
    """The artifacts of one workdir. `log` lists (stage, hash, cached) in the order of use."""

    def __init__(self, workdir: Path):
        self.workdir = Path(workdir)
        self.log: list[dict] = []
        try:
            (self.workdir / "artifacts").mkdir(parents=True, exist_ok=True)
            probe = self.workdir / ".writable"
            probe.write_bytes(b"mpqdiff")
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"workdir {self.workdir}: cannot be written ({error.strerror}); choose another "
                "--workdir or free some space"
            ) from error

    def get(self, stage: str, *, version: int, key, compute: Callable[[Path], None]) -> Path:
        """The folder of `stage` for `key`, computed by `compute(partial_folder)` if absent.

        `key` is any JSON-able value holding the configuration used and the inputs' hashes. A
        stored artifact whose files differ from their recorded hashes raises InputError.
        """
        name = digest(stage, version, key)
        folder = self.workdir / "artifacts" / stage / name
        cached = (folder / MANIFEST).exists()
        if cached:
            _check(folder)
        else:
            partial = folder.with_name(f"{name}.partial")
            partial.mkdir(parents=True, exist_ok=True)
            for leftover in partial.glob(".*.partial*"):  # of a write that a kill cut short
                leftover.unlink()
            try:
                compute(partial)
            except Exception:
                if not any(partial.iterdir()):  # finished chunks stay; an empty folder need not
                    partial.rmdir()
                raise
            files = {
                str(path.relative_to(partial)): digest(path.read_bytes())
                for path in sorted(partial.rglob("*"))
                if path.is_file() and path.name != MANIFEST
            }
            write_json(
                partial / MANIFEST,
                {"stage": stage, "version": version, "key": key, "files": files},
            )
            if folder.exists():  # an artifact without its manifest was tampered with
                shutil.rmtree(folder)
            os.replace(partial, folder)
        self.log.append({"stage": stage, "hash": name, "cached": cached})
        return folder


def _check(folder: Path) -> None:
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise InputError(
            f"artifact {folder / MANIFEST}: lists no files; delete {folder} and run again"
        )
    for name, expected in manifest["files"].items():
        path = folder / name
        found = digest(path.read_bytes()) if path.exists() else "missing"
        if found != expected:
            raise InputError(
                f"artifact {path}: content hash {found}, expected {expected}; it was changed or "
                f"damaged. Delete {folder} and run again"
            )


def chunked(folder: Path, name: str, *, quiet: bool = False) -> Callable:
    """`run(count, compute)`: the dicts of arrays `compute(i)` for i < count, kept as files.

    A chunk that is on disk already is read, not computed again.
    """

    def run(count: int, compute: Callable[[int], dict]) -> list[dict]:
        parts = []
        for index in tqdm(range(count), desc=name, disable=quiet or count < 2):
            path = folder / f"{name}_{index:05d}.npz"
            if not path.exists():
                save_arrays(path, compute(index))
                _kill_if_asked(name)
            parts.append(load_arrays(path))
        return parts

    return run


def _kill_if_asked(name: str) -> None:
    """Kill this process after the first chunk of the stage named by MPQDIFF_KILL_AFTER.

    A real SIGKILL, from inside, at a moment that a test can choose.
    """
    if os.environ.get("MPQDIFF_KILL_AFTER") == name:
        os.kill(os.getpid(), 9)
