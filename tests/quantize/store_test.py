"""The saved model: bit-exact, bit-packed at every width, refused when damaged."""

import errno
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mpqdiff.costs.bytes import file_bytes, fixed_bytes
from mpqdiff.errors import InputError
from mpqdiff.plan import Plan
from mpqdiff.quantize import store
from mpqdiff.quantize.activations import Table
from mpqdiff.sites import Site

WIDTHS = {f"layer_{bits}": bits for bits in range(2, 9)}
SHAPE = (7, 5)  # 35 values: no width but 8 fills whole bytes


def _model(rows=3):
    rng = np.random.default_rng(0)
    tensors = {}
    for path, bits in WIDTHS.items():
        limit = (1 << (bits - 1)) - 1
        qvalue = rng.integers(-limit, limit + 1, SHAPE).astype(np.int8)
        qvalue[0, 0], qvalue[-1, -1] = limit, -limit
        tensors[path] = {"qvalue": qvalue, "scale": rng.random(5, np.float32)}
        if bits % 2:
            tensors[path]["bias"] = rng.standard_normal(5).astype(np.float32)
        if bits > 4:
            tensors[path]["colsum"] = qvalue.sum(axis=0, dtype=np.int32)
    plan = Plan(
        model={"hash": "h"},
        w_bits=dict(WIDTHS),
        a_bits=dict.fromkeys(WIDTHS, 8),
        mode="step_table" if rows else "online",
        groups=((9, 0),),
        timesteps=(9, 0),
        system="test",
        objective=0.1 + 0.2,
    )
    columns = len(WIDTHS)
    steps = Table(
        jnp.arange(rows, dtype=jnp.int32),
        jnp.asarray(rng.random((rows, columns), np.float32)),
        jnp.asarray(rng.integers(-128, 128, (rows, columns)), jnp.int8),
    )
    left = {"norm": {"scale": rng.standard_normal(6).astype(np.float32)}}
    return plan, tensors, left, steps


@pytest.mark.parametrize("rows", [3, 0])
def test_round_trip_is_bit_exact(tmp_path, rows):
    plan, tensors, left, steps = _model(rows)
    path = tmp_path / "model.safetensors"
    assert store.save(path, plan, tensors, left, steps) == path.stat().st_size
    found_plan, found, found_steps = store.load(path)
    assert found_plan.hash == plan.hash
    assert found_plan.objective is None  # the decision travels, not what led to it
    assert found.keys() == tensors.keys()
    for site, entry in tensors.items():
        assert found[site].keys() == entry.keys()
        for name, array in entry.items():
            assert found[site][name].dtype == array.dtype
            np.testing.assert_array_equal(found[site][name], array)
    for one, other in zip(found_steps, steps, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert os.listdir(tmp_path) == [path.name]


def test_the_payload_is_the_predicted_file_bytes(tmp_path):
    plan, tensors, left, steps = _model()
    path = tmp_path / "model.safetensors"
    size = store.save(path, plan, tensors, left, steps)
    with safe_open(path, framework="numpy") as stored:
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    sites = [
        Site(path, "dense", SHAPE, 35, 5 if "bias" in entry else 0, 35, path)
        for path, entry in tensors.items()
    ]
    fixed = fixed_bytes(sum(a.nbytes for a in jax.tree.leaves(left)), 3, len(WIDTHS))
    expected = sum(file_bytes(site, WIDTHS[site.path], False) for site in sites)
    assert sum(a.nbytes for a in arrays.values()) == expected + fixed["file_bytes"]
    assert size - expected - fixed["file_bytes"] < 8192  # header: names, shapes and the plan
    assert arrays["sites/layer_3/qvalue"].nbytes == -(-35 * 3 // 8)
    assert not any("colsum" in name for name in arrays)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    store.save(path, *_model())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"model\.safetensors: damaged or incomplete"):
        store.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="absent"):
        store.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("removed", ["sites/layer_5/qvalue", "steps/scale", "metadata"])
def test_a_file_that_lacks_something_is_refused(tmp_path, removed):
    path = tmp_path / "model.safetensors"
    store.save(path, *_model())
    with safe_open(path, framework="numpy") as stored:
        metadata = stored.metadata() if removed != "metadata" else None
        arrays = {n: stored.get_tensor(n) for n in stored.keys() if n != removed}  # noqa: SIM118
    save_file(arrays, path, metadata=metadata)
    with pytest.raises(InputError, match="damaged or incomplete"):
        store.load(path)


def test_a_width_that_does_not_match_the_data_is_refused(tmp_path):
    plan, tensors, left, steps = _model()
    path = tmp_path / "model.safetensors"
    store.save(path, plan, tensors, left, steps)
    with safe_open(path, framework="numpy") as stored:
        metadata = dict(stored.metadata())
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    metadata["plan"] = metadata["plan"].replace('"w_bits": 5', '"w_bits": 6')
    save_file(arrays, path, metadata=metadata)
    with pytest.raises(InputError, match="35 values of 6 bits take 27 bytes"):
        store.load(path)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(store.files, "write", full)
    with pytest.raises(OSError, match="No space left"):
        store.save(tmp_path / "model.safetensors", *_model())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("width", [2, 5, 8])
def test_header_bound_holds_and_is_close(tmp_path, width):
    plan, tensors, left, steps = _model(3)
    plan = replace(plan, w_bits=dict.fromkeys(plan.w_bits, width))
    size = store.save(tmp_path / "model.safetensors", plan, narrow(tensors), left, steps)
    payload = sum(
        -(-entry["qvalue"].size * width // 8)
        + sum(entry[leaf].nbytes for leaf in ("scale", "bias") if leaf in entry)
        for entry in tensors.values()
    )
    payload += sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves((left, steps)))
    sites = [Site(p, "dense", (1, 1), 1, 0, 0, p) for p in tensors]
    bound = store.header_bytes(plan, sites, left)
    assert size <= payload + bound
    assert bound < 2 * (size - payload)


def narrow(tensors):
    """The same shapes, with values that fit every width."""
    return {p: {**e, "qvalue": np.clip(e["qvalue"], -1, 1)} for p, e in tensors.items()}
