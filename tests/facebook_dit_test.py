"""facebookresearch/DiT state dicts: our output is that of the model written out in torch."""

import argparse
import json
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mpqdiff import models, sites, weights  # noqa: E402
from mpqdiff.denoiser import from_linen  # noqa: E402
from mpqdiff.errors import InputError  # noqa: E402
from mpqdiff.models import DIT_SIZES  # noqa: E402
from mpqdiff.weights import facebook_dit  # noqa: E402
from mpqdiff.weights.convert import convert  # noqa: E402

functional = torch.nn.functional
# (width, depth, heads, patch, grid, input channels, output channels, classes)
SHAPES = {
    "learned variance": (24, 2, 3, 2, 4, 4, 8, 5),
    "eps only, patches of 4": (16, 1, 2, 4, 2, 3, 3, 3),
    "one pixel a token": (32, 3, 4, 1, 3, 1, 2, 2),
}
T = np.array([0, 17, 500, 999])
# Parameters with the position table, of the sizes that models_test.py leaves out.
PARAMETERS = {
    ("B", 4): 130_475_648,
    ("B", 8): 130_881_536,
    ("L", 2): 458_102_816,
    ("L", 8): 458_594_816,
    ("XL", 4): 675_074_432,
    ("XL", 8): 675_683_072,
}


def position_table(width, grid):
    """[1, grid * grid, width]: of the column, then of the row, sines before cosines."""
    rate = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows = []
    for row in range(grid):
        for column in range(grid):
            waves = [f(place * rate) for place in (column, row) for f in (torch.sin, torch.cos)]
            rows.append(torch.cat(waves))
    return torch.stack(rows)[None].float()


def random_state(width, depth, heads, patch, grid, channels, outputs, classes, seed=0):
    """Every tensor of the published layout, drawn."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        spread = 0.3 if len(shape) == 1 else prod(shape[1:]) ** -0.5
        return torch.randn(shape, generator=generator) * spread

    state = {"pos_embed": position_table(width, grid)}

    def layer(name, out, *inputs):
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(out, *inputs), draw(out)

    layer("x_embedder.proj", width, channels, patch, patch)
    layer("t_embedder.mlp.0", width, 256)
    layer("t_embedder.mlp.2", width, width)
    state["y_embedder.embedding_table.weight"] = draw(classes + 1, width)
    for block in (f"blocks.{index}" for index in range(depth)):
        layer(f"{block}.attn.qkv", 3 * width, width)
        layer(f"{block}.attn.proj", width, width)
        layer(f"{block}.mlp.fc1", 4 * width, width)
        layer(f"{block}.mlp.fc2", width, 4 * width)
        layer(f"{block}.adaLN_modulation.1", 6 * width, width)
    layer("final_layer.linear", patch * patch * outputs, width)
    layer("final_layer.adaLN_modulation.1", 2 * width, width)
    return state


def reference(state, x, t, y, heads):
    """The model as published, in torch: x [B,C,H,W] -> [B,C',H,W]."""

    def linear(name, value):
        return functional.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def modulated(value, shift, scale):
        normed = functional.layer_norm(value, value.shape[-1:], eps=1e-6)
        return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    silu = functional.silu
    kernel = state["x_embedder.proj.weight"]
    width, patch = kernel.shape[0], kernel.shape[-1]
    x = functional.conv2d(x, kernel, state["x_embedder.proj.bias"], stride=patch)
    batch, grid = x.shape[0], x.shape[-1]
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    frequencies = torch.exp(-np.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = t[:, None].float() * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
    c = c + state["y_embedder.embedding_table.weight"][y]
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks")})
    for block in (f"blocks.{index}" for index in range(depth)):
        parts = linear(f"{block}.adaLN_modulation.1", silu(c)).chunk(6, dim=1)
        h = modulated(x, parts[0], parts[1])
        qkv = linear(f"{block}.attn.qkv", h).reshape(batch, -1, 3, heads, width // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = ((q @ k.transpose(-1, -2)) * (width // heads) ** -0.5).softmax(-1) @ v
        h = linear(f"{block}.attn.proj", attention.transpose(1, 2).reshape(batch, -1, width))
        x = x + parts[2].unsqueeze(1) * h
        h = linear(f"{block}.mlp.fc1", modulated(x, parts[3], parts[4]))
        h = linear(f"{block}.mlp.fc2", functional.gelu(h, approximate="tanh"))
        x = x + parts[5].unsqueeze(1) * h
    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c)).chunk(2, dim=1)
    x = linear("final_layer.linear", modulated(x, shift, scale))
    x = x.reshape(batch, grid, grid, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(batch, -1, grid * patch, grid * patch)


def converted(folder, saved, heads):
    torch.save(saved, folder / "DiT.pt")
    (folder / "config.json").write_text(json.dumps({"num_heads": heads}))
    line = convert(str(folder / "DiT.pt"), folder / "out.safetensors")
    return *weights.load(str(folder / "out.safetensors"))[:2], line


def difference(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", SHAPES)
def test_output_is_that_of_the_published_model(tmp_path, name):
    shape = SHAPES[name]
    _, _, heads, patch, grid, channels, outputs, classes = shape
    state = random_state(*shape)
    module, params, line = converted(tmp_path, state, heads)
    assert f"{len(state) - 1} source tensors used, 1 left out; left out: pos_embed" in line
    x = torch.randn((4, channels, grid * patch, grid * patch), generator=torch.Generator())
    labels = np.array([0, 1, classes, 1])
    expected = reference(state, x, torch.tensor(T), torch.tensor(labels), heads)
    expected = expected.permute(0, 2, 3, 1).numpy()
    x_t = jnp.asarray(x.permute(0, 2, 3, 1).numpy())
    out = jax.jit(from_linen(module))(params, x_t, T, labels)
    assert difference(out.eps, expected[..., :channels]) < 1e-4
    assert (out.log_variance is not None) == (outputs == 2 * channels)
    if out.log_variance is not None:
        assert difference(out.log_variance, expected[..., channels:]) < 1e-4


def test_of_a_training_checkpoint_the_ema_is_taken(tmp_path):
    shape = SHAPES["eps only, patches of 4"]
    ema = random_state(*shape)
    trained = random_state(*shape, seed=1)
    saved = {
        "model": {f"module.{key}": value for key, value in trained.items()},
        "ema": ema,
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-S/4", image_size=256),
    }
    _, params, _ = converted(tmp_path, saved, shape[2])
    expected = ema["final_layer.linear.weight"].numpy().T
    np.testing.assert_array_equal(params["final"]["kernel"], expected)
    del saved["ema"]
    _, params, _ = converted(tmp_path, saved, shape[2])
    expected = trained["final_layer.linear.weight"].numpy().T
    np.testing.assert_array_equal(params["final"]["kernel"], expected)


def state_of(name="eps only, patches of 4", **changes):
    return {**{k: v.numpy() for k, v in random_state(*SHAPES[name]).items()}, **changes}


def test_sizes_are_read_from_the_tensors():
    found = facebook_dit.describe(state_of(), {"num_heads": 2})
    module = models.build("dit", **facebook_dit.module_kwargs(found))
    assert (module.image_size, module.patch, module.width, module.depth) == (8, 4, 16, 1)
    assert (module.channels, module.num_classes, module.learn_variance) == (3, 3, False)


def test_heads_are_known_for_the_papers_sizes_alone():
    with pytest.raises(InputError, match=r"depth 1 and width 16 is none of the paper's.*num_heads"):
        facebook_dit.describe(state_of(), {})
    for size in DIT_SIZES.values():
        assert facebook_dit.HEADS[size["depth"], size["width"]] == size["num_heads"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": np.zeros((1, 4, 16), np.float32)}, "not the fixed sine-cosine table"),
        ({"pos_embed": np.zeros((1, 5, 16), np.float32)}, "not the fixed sine-cosine table"),
        ({"pos_embed": np.zeros((2, 4, 16), np.float32)}, "no state dict of facebook"),
        ({"x_embedder.proj.weight": np.zeros((16, 48), np.float32)}, "no state dict of facebook"),
        ({"final_layer.linear.bias": np.zeros(80, np.float32)}, "5 output channels for 3"),
    ],
)
def test_state_dicts_of_another_model_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        facebook_dit.describe(state_of(**change), {"num_heads": 2})


def test_a_table_rounded_to_half_precision_is_the_table():
    table = state_of()["pos_embed"].astype(np.float16)
    assert facebook_dit.describe(state_of(pos_embed=table), {"num_heads": 2})["image_size"] == 8


def published(size, patch, latent=32):
    kwargs = dict(image_size=latent, channels=4, patch=patch, num_classes=1000)
    module = models.build("dit", **kwargs, learn_variance=True, **DIT_SIZES[size])
    return module, jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))


@pytest.mark.parametrize(("size", "patch"), PARAMETERS)
def test_parameter_counts_of_the_paper(size, patch):
    _, made = published(size, patch)
    count = sum(prod(leaf.shape) for leaf in jax.tree.leaves(made))
    assert count + (32 // patch) ** 2 * DIT_SIZES[size]["width"] == PARAMETERS[size, patch]


def test_macs_at_512_pixels():
    """XL/2 on latents of 64 x 64: 524.5 G MACs, the paper's "Gflops"."""
    module, made = published("XL", 2, latent=64)
    found, remainder = sites.list_sites(
        from_linen(module), made, *sites.example_inputs((64, 64, 4))
    )
    assert remainder == []
    assert sum(site.macs for site in found) / 1e9 == pytest.approx(524.5, abs=0.1)
