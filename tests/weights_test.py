"""Weights files: what is saved comes back, and what cannot be used says why."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import save_file

from mpqdiff import models, weights
from mpqdiff.denoiser import from_linen
from mpqdiff.errors import InputError

KWARGS = dict(image_size=8, channels=1, patch=4, width=16, depth=1, num_heads=2, num_classes=3)
MODEL = {"name": "dit", "kwargs": KWARGS}


@pytest.fixture(scope="module")
def params():
    module = models.build("dit", **KWARGS)
    shapes = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes)


@pytest.fixture
def stored(tmp_path, params):
    """A good file, its tensors and its metadata."""
    path = tmp_path / "good.safetensors"
    weights.save(path, params, model=MODEL)
    with safe_open(path, framework="numpy") as file:
        names = file.keys()
        return path, {name: file.get_tensor(name) for name in names}, file.metadata()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_round_trip(tmp_path, params, dtype):
    path = tmp_path / "w.safetensors"
    weights.save(path, params, model=MODEL, dtype=dtype)
    module, loaded, model = weights.load(str(path))
    assert model == MODEL and module == models.build("dit", **KWARGS)
    jax.tree.map(
        lambda got, leaf: np.testing.assert_array_equal(got, np.asarray(leaf).astype(dtype)),
        loaded,
        params,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]  # no partial left
    x_t = jnp.ones((1, 8, 8, 1))
    assert from_linen(module)(loaded, x_t, 3, jnp.array([1])).eps.shape == x_t.shape


def test_the_embedded_model_loads():
    module, params, model = weights.load("fashion_dit")
    assert model["name"] == "dit" and module.num_classes == 10 and module.image_size == 28
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 1_060_816


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_values_that_the_file_cannot_hold_write_nothing(tmp_path, params, bad):
    bias = params["final"]["bias"].at[2].set(bad)
    changed = {**params, "final": {**params["final"], "bias": bias}}
    with pytest.raises(InputError, match="final/bias is not finite as float16: nothing was"):
        weights.save(tmp_path / "w.safetensors", changed, model=MODEL)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_lists_the_embedded_weights():
    with pytest.raises(InputError, match=r"'fashion_tid': no such file; embedded.*fashion_dit"):
        weights.load("fashion_tid")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(stored, keep):
    path = stored[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="cut short or damaged"):
        weights.load(str(path))


def edited(stored, change):
    path, tensors, metadata = stored
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    return str(path)


def test_missing_and_unexpected_leaves(stored):
    def swap(tensors):
        tensors["final/scale"] = tensors.pop("final/bias")

    match = r"missing \['final/bias'\], unexpected \['final/scale'\]"
    with pytest.raises(InputError, match=match):
        weights.load(edited(stored, swap))


def test_a_leaf_in_the_place_of_a_module(stored):
    def shadow(tensors):
        tensors["final"] = np.zeros(2, np.float16)

    with pytest.raises(InputError, match=r"unexpected \['final'\]"):
        weights.load(edited(stored, shadow))


def test_a_wrong_shape(stored):
    def cut(tensors):
        tensors["final/bias"] = tensors["final/bias"][:-1]

    with pytest.raises(InputError, match=r"final/bias has shape \(15,\), the model needs \(16,\)"):
        weights.load(edited(stored, cut))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_values_that_are_not_finite(stored, bad):
    def poison(tensors):
        tensors["block_0/mlp/fc1/kernel"] = tensors["block_0/mlp/fc1/kernel"].copy()
        tensors["block_0/mlp/fc1/kernel"][3, 4] = bad

    with pytest.raises(InputError, match="block_0/mlp/fc1/kernel holds NaN or infinity"):
        weights.load(edited(stored, poison))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "names no model"),
        ({"model": "{"}, "the metadata's model is '{', expected"),
        ({"model": "[1]"}, "expected"),
        ({"model": '{"name": "dit"}'}, "expected"),
        ({"model": json.dumps({"name": "vit", "kwargs": {}})}, "unknown model 'vit'"),
        ({"model": json.dumps({"name": "dit", "kwargs": {"wide": 1}})}, "wide"),
        ({"model": json.dumps({"name": "dit", "kwargs": {**KWARGS, "width": 32}})}, "has shape"),
    ],
)
def test_a_file_that_does_not_say_what_it_is(stored, metadata, message):
    path, tensors, _ = stored
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(InputError, match=message):
        weights.load(str(path))


def test_names_in_the_file_are_parameter_paths(stored, params):
    assert stored[1].keys() == traverse_util.flatten_dict(params, sep="/").keys()
    assert {tensor.dtype for tensor in stored[1].values()} == {np.dtype(np.float16)}
