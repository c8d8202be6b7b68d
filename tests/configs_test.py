"""Every config in `configs/`: it is valid, and its smoke form runs, resumes and verifies.

All in one process: a second experiment must not see the first one's compiled programs.
"""

import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mpqdiff import conditioning, outcome, pipeline, weights
from mpqdiff import models as model_list
from mpqdiff.artifacts import read_json
from mpqdiff.config import validate
from mpqdiff.denoiser import from_linen
from mpqdiff.sites import list_sites

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))
# Parameters of the networks as their authors have them.
GOLDEN = {
    "dit_xl2_256": 675_129_632 - 256 * 1152,  # without the fixed position table
    "ldm_church": 294_966_916,
    "ldm_bedroom": 274_056_163,
    "sd15": 859_520_964,
    "celebahq_unet": 113_673_219,
    "cifar10_unet": 35_746_307,
}
# The others have the embedded models, which are run here under their own names.
SMOKE = [name for name in NAMES if name not in ("mpq_diff", "planner", "quickstart")]


@pytest.fixture(scope="module", autouse=True)
def kept_programs(tmp_path_factory):
    """Compiled programs are kept on disk, as the commands do: what resumes compiles nothing."""
    before = {
        key: getattr(jax.config, key)
        for key in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    for key, value in before.items():
        jax.config.update(key, value)
    compilation_cache.reset_cache()


def load(name: str, *arguments: str):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](*arguments)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("ablations/*.py")), ids=lambda path: path.stem)
def test_an_ablation_is_valid_in_every_arm(path):
    make = runpy.run_path(str(path))["get_config"]
    for argument in ("", "smoke", *(["steps"] if path.stem == "diffpro" else [])):
        config = make(argument)
        validate(config)
        for recipe in pipeline.recipes(config):
            validate(recipe)
            pipeline.check_names(recipe)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_valid_and_its_model_is_the_published_one(name):
    config = load(name)
    validate(config)
    module = model_list.build(config.model.name, **config.model.kwargs.to_dict())
    if name in GOLDEN:
        shapes = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == GOLDEN[name]


@pytest.mark.parametrize("name", SMOKE)
def test_the_smoke_form_runs_resumes_and_verifies(name, tmp_path):
    config = load(name, "smoke")
    validate(config)
    config.arms = {}
    config.sample.update(num_images=4, batch=4)
    config.evaluate.timing_rounds = 1
    first = outcome.run(pipeline.Experiment(config, tmp_path), command="first")
    assert [arm["arm"] for arm in first["arms"]] == ["float", "plan"]
    assert all(arm["fid"] is None and arm["x0_mse"] is None for arm in first["arms"])
    plan = (tmp_path / "plan.json").read_bytes()
    again = pipeline.Experiment(config, tmp_path)
    outcome.run(again, command="again")
    assert all(entry["cached"] for entry in again.store.log)
    assert (tmp_path / "plan.json").read_bytes() == plan
    assert "verified" in outcome.verify_only(again)
    kept = read_json(tmp_path / "results.json")["arms"]
    assert [arm["bytes"] for arm in kept] == [arm["bytes"] for arm in first["arms"]]
    assert kept[1]["bytes"] < kept[0]["bytes"] and kept[1]["execution"] == "integer"


@pytest.mark.parametrize("name", ["fashion_dit", "fashion_unet"])
def test_embedded_weights_are_those_of_their_config(name):
    module, params, model = weights.load(name)
    config = load(name)
    assert model["name"] == config.model.name
    assert model["kwargs"] == json.loads(json.dumps(config.model.kwargs.to_dict()))
    assert 1e6 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 2e6
    assert (weights.ZOO / f"{name}.safetensors").stat().st_size < 8e6
    inputs = conditioning.load(config, module).input_shapes((28, 28, 1), 1)
    sites, remainder = list_sites(from_linen(module), params, *inputs)
    assert sum(entry.macs for entry in [*sites, *remainder]) <= 60e6


def test_a_latent_models_samples_are_decoded(tmp_path):
    config = load("ldm_bedroom", "smoke")
    # A shift, because the norms of a random decoder hide the scale of what it is given.
    config.autoencoder.kwargs = dict(widths=(8, 8), layers=1, groups=4, shift_factor=1.0)
    config.arms = {}
    config.sample.update(num_images=2, batch=2)
    experiment = pipeline.Experiment(config, tmp_path)
    arm = outcome.stages(experiment, outcome.Clock())[0]
    latents, images = arm.samples[1], arm.images
    assert latents.shape == (2, 8, 8, 3) and images.shape == (2, 16, 16, 3)
    assert images.dtype == np.uint8
    decoder, params = experiment.autoencoder.module, experiment.autoencoder.params
    decoded = decoder.apply({"params": params}, latents, method="to_images")
    np.testing.assert_allclose(
        experiment.autoencoder.decode(latents, batch=1), decoded, atol=1e-4 * np.abs(decoded).max()
    )
    expected = np.clip(np.rint((np.asarray(decoded) + 1) * 127.5), 0, 255)
    assert np.abs(expected - images).max() <= 1  # rounding of halves
