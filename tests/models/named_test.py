"""A user's own model by name: what it must offer, and what is said when it does not."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mpqdiff import cli, models, sites, weights
from mpqdiff.errors import InputError
from mpqdiff.models import DiT
from mpqdiff.program.configured import denoiser

SOURCE = '''
import flax.linen as nn
import jax.numpy as jnp


class Tiny(nn.Module):
    """Two convolutions, and a scan over two layers of one Dense each where `scanned`."""

    image_size: int
    channels: int = 1
    num_classes: int | None = 3
    scanned: bool = False

    @nn.compact
    def __call__(self, x_t, t, cond):
        x = nn.Conv(8, (3, 3), name="stem")(x_t)
        time = jnp.stack([jnp.sin(t / 100), jnp.cos(t / 100)], -1)
        x = x + nn.Dense(8, name="time")(jnp.atleast_2d(time))[:, None, None]
        if self.num_classes:
            x = x + nn.Embed(self.num_classes + 1, 8, name="label")(cond)[:, None, None]
        if self.scanned:
            layer = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x, _ = layer(name="layers")(x, None)
        return nn.Conv(self.channels, (3, 3), name="final")(nn.silu(x))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(x.shape[-1], name="fc")(nn.silu(x)), None


class Keywords(nn.Module):
    image_size: int = 4
    channels: int = 1
    num_classes: int = 3

    @nn.compact
    def __call__(self, images, *, time):
        return nn.Dense(1)(images)


class Flat(Keywords):
    @nn.compact
    def __call__(self, x_t, t, cond):
        return nn.Dense(1)(x_t).reshape(x_t.shape[0], -1)


class Averaged(Keywords):
    @nn.compact
    def __call__(self, x_t, t, cond):
        return nn.BatchNorm(use_running_average=True)(x_t)


class Rows(Keywords):
    @nn.compact
    def __call__(self, x_t, t, cond):
        return nn.Dense(1)(x_t) + t[:, None, None, None]


class Sizeless(nn.Module):
    @nn.compact
    def __call__(self, x_t, t, cond):
        return x_t


def function():
    raise SystemExit
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with a package of own models in it."""
    package = tmp_path / "ours"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(SOURCE)
    (package / "broken.py").write_text("import nothing_of_that_name\n")
    (package / "failing.py").write_text("raise RuntimeError('no\\nluck')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # the command would set one for all tests
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "ours"]:
        del sys.modules[name]


def test_the_module_is_built_from_the_working_directory(here):
    before = list(sys.path)
    module = models.build("ours.nets:Tiny", image_size=4, channels=2)
    assert type(module).__name__ == "Tiny" and (module.image_size, module.channels) == (4, 2)
    assert sys.path == before


REFUSED = {
    "no module": ("ours.nots:Tiny", {}, r"cannot import 'ours.nots' \(there is none\).*PYTHONPATH"),
    "no package": ("theirs.nets:Tiny", {}, r"'theirs.nets' \(there is none\); looked in .* and in"),
    "import fails": ("ours.broken:Tiny", {}, "ModuleNotFoundError: No module named 'nothing_of"),
    "code fails": ("ours.failing:Tiny", {}, r"\(RuntimeError: no luck\)"),
    "no class": ("ours.nets:Huge", {}, r"ours/nets.py has no 'Huge'; its linen modules: Tiny, L"),
    "no linen module": ("ours.nets:function", {}, "expected a class of flax.linen.Module"),
    "of the system": ("os:system", {"command": "true"}, "expected a class of flax.linen.Module"),
    "no name": ("ours.nets:", {}, "expected package.module:ClassName"),
    "a path": ("ours/nets.py:Tiny", {}, "expected package.module:ClassName"),
    "bad kwargs": ("ours.nets:Tiny", {"wide": 3}, "'wide'.*its fields are image_size, channels, n"),
    "no size": ("ours.nets:Sizeless", {}, "image_size must be a positive integer; it lacks it"),
    "no number": ("ours.nets:Tiny", {"image_size": 4.0}, r"image_size must be .*; it has 4\.0"),
    "no labels": ("ours.nets:Tiny", {"image_size": 4, "num_classes": 0}, "integer or None; it has"),
    "other call": ("ours.nets:Keywords", {}, r"could not be called .*: TypeError: .*\(x_t, t, co"),
    "other t": ("ours.nets:Rows", {}, r"could not be called with t of shape \[\]: IndexError: "),
    "other shape": ("ours.nets:Flat", {}, r"gives \(2, 16\) for x_t \(2, 4, 4, 1\)"),
    "averages": ("ours.nets:Averaged", {}, "could not be called .*batch_stats"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_says_what_was_expected(here, what):
    name, kwargs, message = REFUSED[what]
    with pytest.raises(InputError, match=message) as raised:
        models.build(name, **kwargs)
    assert f"model {name!r}" in str(raised.value)


def drawn(module):
    shapes = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), shapes
    )


@pytest.mark.parametrize("scanned", [False, True])
def test_own_models_are_traced_and_ours_keep_their_parameters(here, scanned):
    module = models.build("ours.nets:Tiny", image_size=4, num_classes=None, scanned=scanned)
    params, row = drawn(module), np.array([3, 500], np.int32)
    x_t = np.random.default_rng(1).standard_normal((2, 4, 4, 1)).astype(np.float32)
    denoise, held = denoiser(module, params, x_t, row, np.zeros(2, np.int32))
    found, left = sites.list_sites(denoise, held, x_t[:1], row[0], row[:1])
    names = ["stem", "time", *(["layers/fc:0", "layers/fc:1"] if scanned else []), "final"]
    assert [site.path for site in found] == names and not left
    expected = module.apply({"params": params}, x_t, row, row)
    np.testing.assert_allclose(denoise(held, x_t, row, row).eps, expected, rtol=1e-4, atol=1e-5)
    ours = DiT(image_size=8, channels=1, patch=4, width=16, depth=1, num_heads=2, num_classes=3)
    assert denoiser(ours, params, x_t, row, row).params is params


def test_weights_of_an_own_model_name_it_and_import_nothing_unasked(here):
    name, kwargs = "ours.nets:Tiny", {"image_size": 4}
    params = drawn(models.build(name, **kwargs))
    weights.save(here / "w.safetensors", params, model={"name": name, "kwargs": kwargs})
    module, loaded, model = weights.load(str(here / "w.safetensors"), own=name)
    assert model["name"] == name and type(module).__name__ == "Tiny"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), loaded, params)
    for module in [one for one in sys.modules if one.startswith("ours.")]:
        del sys.modules[module]
    for own in ("", "dit", "ours.nets:Layer"):
        with pytest.raises(InputError, match=r"for 'ours.nets:Tiny', code that a file may not"):
            weights.load(str(here / "w.safetensors"), own=own)
    assert "ours.nets" not in sys.modules


@pytest.fixture
def guide(here):
    """The files of docs/extend.md beside each other, and the command that shrinks its run."""
    text = (Path(__file__).parents[2] / "docs" / "extend.md").read_text()
    section = text.split("### Named in a config")[1].split("### In Python")[0]
    for name, block in zip(
        ("nets.py", "own.py"), re.findall(r"```python\n(.*?)```", section, re.S), strict=True
    ):
        (here / name).write_text(block)
    yield ["plan", "--config=own.py", "--workdir=runs", "--config.diffusion.num_steps=3",
           "--config.calibration.samples=4", "--config.calibration.timesteps=2"]  # fmt: skip
    sys.modules.pop("nets", None)


def test_a_plan_of_a_model_named_in_a_config(here, guide):
    assert cli.main(guide) == 0
    plan = json.loads((here / "runs" / "plan.json").read_text())
    widths = {path: entry["w_bits"] for path, entry in plan["sites"].items()}
    assert set(widths) == {"time", "stem", "final"} and widths["time"] in (4, 8)
    assert widths["stem"] == widths["final"] == 8 and plan["model"]["name"] == "nets:Net"


def test_a_name_that_is_wrong_exits_with_2(guide, capsys):
    assert cli.main([*guide, "--config.model.name=knits:Net"]) == 2
    assert "cannot import 'knits'" in capsys.readouterr().err
