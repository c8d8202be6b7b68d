"""Artifacts: whole or absent, continued after a kill, refused when changed."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff import artifacts
from mpqdiff.artifacts import MANIFEST, Store, chunked, digest, tree_digest
from mpqdiff.errors import InputError


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _write(folder: Path):
    (folder / "data.txt").write_text("content")
    artifacts.save_arrays(folder / "more.npz", {"x": np.arange(3), "absent": None})


def test_an_artifact_is_computed_once_and_then_read(tmp_path):
    calls = []

    def compute(folder):
        calls.append(folder)
        _write(folder)

    store = Store(tmp_path)
    folder = store.get("stage", version=1, key={"a": 1}, compute=compute)
    assert folder == store.get("stage", version=1, key={"a": 1}, compute=compute)
    assert len(calls) == 1
    assert _files(folder) == {"data.txt", "more.npz", MANIFEST}
    assert [entry["cached"] for entry in store.log] == [False, True]
    assert artifacts.load_arrays(folder / "more.npz").keys() == {"x"}
    others = [
        store.get("stage", version=2, key={"a": 1}, compute=compute),
        store.get("stage", version=1, key={"a": 2}, compute=compute),
        store.get("other", version=1, key={"a": 1}, compute=compute),
    ]
    assert len({folder, *others}) == len(calls) == 4


def test_a_failed_stage_leaves_only_its_partial_folder_and_its_chunks(tmp_path):
    calls = []

    def fails_at(last):
        def compute(folder):
            def chunk(index):
                calls.append(index)
                if index == last:
                    raise RuntimeError("cut")
                return {"x": np.full(2, index)}

            parts = chunked(folder, "part", quiet=True)(3, chunk)
            artifacts.save_arrays(folder / "all.npz", {"x": np.stack([p["x"] for p in parts])})

        return compute

    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="cut"):
        store.get("stage", version=1, key=0, compute=fails_at(1))
    (partial,) = (tmp_path / "artifacts" / "stage").iterdir()
    assert partial.name.endswith(".partial")
    assert _files(partial) == {"part_00000.npz"}
    before = (partial / "part_00000.npz").stat()
    folder = store.get("stage", version=1, key=0, compute=fails_at(None))
    assert calls == [0, 1, 1, 2]
    after = (folder / "part_00000.npz").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    np.testing.assert_array_equal(artifacts.load_arrays(folder / "all.npz")["x"][:, 0], [0, 1, 2])
    assert not partial.exists()


def test_a_stage_that_fails_at_once_leaves_nothing(tmp_path):
    def compute(folder):
        raise InputError("impossible")

    with pytest.raises(InputError, match="impossible"):
        Store(tmp_path).get("stage", version=1, key=0, compute=compute)
    assert list((tmp_path / "artifacts" / "stage").iterdir()) == []


KILLED = """
import sys, numpy as np
from pathlib import Path
from mpqdiff.artifacts import Store, chunked
def compute(folder):
    chunked(folder, "part", quiet=True)(3, lambda i: {"x": np.full(2, i)})
Store(Path(sys.argv[1])).get("stage", version=1, key=0, compute=compute)
"""


def test_sigkill_after_the_first_chunk_keeps_it(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    killed = subprocess.run(command, env={**os.environ, "MPQDIFF_KILL_AFTER": "part"}, check=False)
    assert killed.returncode == -9
    (partial,) = (tmp_path / "artifacts" / "stage").iterdir()
    assert _files(partial) == {"part_00000.npz"}
    first = (partial / "part_00000.npz").stat().st_mtime_ns
    # What a kill in the middle of a write would leave; it must not become part of the artifact.
    (partial / ".part_00001.npz.partial.npz").write_bytes(b"PK")
    (partial / ".all.json.1234.partial").write_bytes(b"{")

    def compute(folder):
        chunked(folder, "part", quiet=True)(3, lambda i: {"x": np.full(2, i)})

    folder = Store(tmp_path).get("stage", version=1, key=0, compute=compute)
    assert (folder / "part_00000.npz").stat().st_mtime_ns == first
    assert _files(folder) == {MANIFEST, *(f"part_0000{i}.npz" for i in range(3))}


@pytest.mark.parametrize("damage", ["changed", "cut", "removed"])
@pytest.mark.parametrize("name", ["data.txt", "more.npz"])
def test_a_damaged_artifact_is_refused_by_name(tmp_path, name, damage):
    folder = Store(tmp_path).get("stage", version=1, key=0, compute=_write)
    path = folder / name
    if damage == "changed":
        data = bytearray(path.read_bytes())
        data[3] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        path.unlink()
    with pytest.raises(InputError, match=f"{name}: content hash .* Delete .*{folder.name}"):
        Store(tmp_path).get("stage", version=1, key=0, compute=_write)


@pytest.mark.parametrize("text", ["", '{"files": {', "[]", "{}", '{"files": 3}'])
def test_a_damaged_manifest_is_refused_by_name(tmp_path, text):
    folder = Store(tmp_path).get("stage", version=1, key=0, compute=_write)
    (folder / MANIFEST).write_text(text)
    with pytest.raises(InputError, match=MANIFEST):
        Store(tmp_path).get("stage", version=1, key=0, compute=_write)


def test_a_folder_without_manifest_is_computed_again(tmp_path):
    folder = Store(tmp_path).get("stage", version=1, key=0, compute=_write)
    (folder / MANIFEST).unlink()
    (folder / "stray.txt").write_text("x")
    folder = Store(tmp_path).get("stage", version=1, key=0, compute=_write)
    assert _files(folder) == {"data.txt", "more.npz", MANIFEST}


def test_a_damaged_chunk_is_refused_by_name(tmp_path):
    run = chunked(tmp_path, "part", quiet=True)
    run(1, lambda index: {"x": np.zeros(3)})
    path = tmp_path / "part_00000.npz"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"part_00000\.npz: cannot be read"):
        run(1, lambda index: {"x": np.zeros(3)})


def test_json_refuses_nan_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    artifacts.write_json(path, {"a": 1})
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"value\.json would hold NaN"):
            artifacts.write_json(path, {"a": value})
    assert artifacts.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["value.json"]


def _full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    artifacts.write_json(path, {"a": 1})
    artifacts.save_arrays(tmp_path / "x.npz", {"x": np.zeros(2)})
    monkeypatch.setattr(os, "replace", _full)
    with pytest.raises(OSError, match="No space left"):
        artifacts.write_json(path, {"a": 2})
    with pytest.raises(OSError, match="No space left"):
        artifacts.save_arrays(tmp_path / "x.npz", {"x": np.ones(2)})
    assert artifacts.read_json(path) == {"a": 1}
    assert artifacts.load_arrays(tmp_path / "x.npz")["x"].sum() == 0
    assert sorted(os.listdir(tmp_path)) == ["value.json", "x.npz"]


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_workdir_that_is_a_file_is_refused(tmp_path, below):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*choose another --workdir"):
        Store(tmp_path / "taken" / below)


def test_a_full_workdir_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", _full)
    with pytest.raises(InputError, match="No space left on device"):
        Store(tmp_path / "new")


def test_digests_see_type_shape_and_value():
    values = [
        np.zeros(4, np.float32), np.zeros(4, np.int32), np.zeros((2, 2), np.float32),
        np.ones(4, np.float32), b"x", "x", {"a": 1}, {"a": 2}, None,
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": 1, "b": (2,)}) == digest({"b": [2], "a": 1})
    assert digest(np.zeros(4, np.float32)) == digest(jnp.zeros(4))
    assert digest("a", "b") != digest("ab")
    tree = {"a": np.zeros(2), "b": np.ones(2)}
    assert tree_digest(tree) == tree_digest(dict(reversed(tree.items())))
    assert tree_digest(tree) != tree_digest({"a": np.ones(2), "b": np.zeros(2)})
