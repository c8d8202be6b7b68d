"""PixArt: our output is diffusers', from the same weights, with text, masks and sizes."""

import json
import os
import shutil
from functools import cache
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from mpqdiff import sites, weights  # noqa: E402
from mpqdiff.denoiser import from_linen  # noqa: E402
from mpqdiff.errors import InputError  # noqa: E402
from mpqdiff.models.pixart import Caption, PixArt  # noqa: E402
from mpqdiff.weights import diffusers_pixart  # noqa: E402
from mpqdiff.weights.convert import convert  # noqa: E402

SMALL = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=24,
    sample_size=8,
    patch_size=2,
    caption_channels=10,
)
CONFIGS = {
    "sigma-like": {},
    "alpha at 1024-like: sizes, spread positions": dict(
        use_additional_conditions=True, interpolation_scale=2
    ),
    "eps only, larger norm epsilon": dict(
        out_channels=4, norm_eps=0.1, num_layers=1, num_attention_heads=1, attention_head_dim=24
    ),
}
T = np.array([0, 500, 999])


def random_model(**changes):
    model = diffusers.PixArtTransformer2DModel(**{**SMALL, **changes}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            spread = 0.3 if weight.ndim == 1 else weight[0].numel() ** -0.5
            weight.normal_(generator=generator).mul_(spread)
    return model


def inputs(channels=4):
    rng = np.random.default_rng(1)
    x_t = rng.normal(size=(3, 8, 8, channels)).astype(np.float32)
    text = rng.normal(size=(3, 6, SMALL["caption_channels"])).astype(np.float32)
    mask = (np.arange(6) < np.array([[6], [4], [1]])).astype(np.float32)
    sizes = np.array([[1024, 1024], [512, 768], [64, 2048]], np.float32)
    return x_t, Caption(text, mask, sizes, sizes[:, :1] / sizes[:, 1:])


def theirs(model, caption, t=T):
    x_t, _ = inputs()
    sizes = model.config.use_additional_conditions
    extra = (
        dict(resolution=torch.tensor(caption.resolution), aspect_ratio=caption.aspect_ratio)
        if sizes
        else dict(resolution=None, aspect_ratio=None)
    )
    extra = {k: v if v is None else torch.as_tensor(v) for k, v in extra.items()}
    mask = None if caption.mask is None else torch.tensor(caption.mask)
    with torch.no_grad():
        out = model(
            torch.tensor(x_t).permute(0, 3, 1, 2),
            encoder_hidden_states=torch.tensor(caption.embeddings),
            timestep=torch.tensor(t),
            added_cond_kwargs=extra,
            encoder_attention_mask=mask,
        ).sample
    return out.permute(0, 2, 3, 1).numpy()


def difference(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module", autouse=True)
def little_effort():
    """Compiling is most of the work here, and nothing is timed."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """By name of CONFIGS: (theirs, our compiled denoiser, params, what was printed, folder)."""

    @cache
    def make(name):
        folder, model = tmp_path_factory.mktemp("pixart"), random_model(**CONFIGS[name])
        model.save_pretrained(folder / "source")
        line = convert(str(folder / "source"), folder / "out.safetensors")
        module, params, _ = weights.load(str(folder / "out.safetensors"))
        denoise = jax.jit(from_linen(module))
        return model, denoise, params, line, folder

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_output_is_that_of_diffusers(converted, name):
    model, denoise, params, line, _ = converted(name)
    assert f"{len(model.state_dict())} source tensors used, 0 left out" in line
    x_t, caption = inputs()
    for mask in (caption.mask, None):
        caption = caption._replace(mask=mask)
        expected = theirs(model, caption)
        out = denoise(params, x_t, T, caption)
        assert difference(out.eps, expected[..., :4]) < 1e-4
        if model.config.out_channels == 8:
            assert difference(out.log_variance, expected[..., 4:]) < 1e-4
        else:
            assert out.log_variance is None


def test_masked_text_does_not_matter_and_text_does(converted):
    _, denoise, params, *_ = converted("sigma-like")
    x_t, caption = inputs()
    changed = caption.embeddings.copy()
    changed[1, 4:] += 1  # of the second caption, what the mask hides
    out = denoise(params, x_t, T, caption).eps
    other = denoise(params, x_t, T, caption._replace(embeddings=changed)).eps
    np.testing.assert_allclose(other, out, atol=1e-6)
    free = caption._replace(embeddings=changed, mask=None)
    assert difference(denoise(params, x_t, T, free).eps[1], out[1]) > 0.01
    bare = denoise(params, x_t, T, caption.embeddings).eps  # embeddings alone: no mask
    unmasked = denoise(params, x_t, T, caption._replace(mask=None)).eps
    np.testing.assert_array_equal(bare, unmasked)


def test_one_t_for_the_batch_equals_that_t_for_each(converted):
    _, denoise, params, *_ = converted("sigma-like")
    x_t, caption = inputs()
    one = denoise(params, x_t, jnp.int32(37), caption).eps
    many = denoise(params, x_t, np.full(3, 37), caption).eps
    np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-5)


def test_sizes_are_asked_for_where_the_model_takes_them(converted):
    _, denoise, params, *_ = converted("alpha at 1024-like: sizes, spread positions")
    x_t, caption = inputs()
    with pytest.raises(InputError, match="size_conditions: pass cond as Caption"):
        denoise(params, x_t, T, caption.embeddings)


@pytest.mark.parametrize(
    ("size", "given"), [(128, {}), (64, {}), (128, {"use_additional_conditions": False})]
)
def test_parameters_of_the_published_models(size, given):
    """XL/2 for 1024 (Alpha, with sizes; Sigma, without) and 512 pixels, counted by diffusers."""
    config = dict(sample_size=size, caption_channels=4096, cross_attention_dim=1152, **given)
    with torch.device("meta"):
        model = diffusers.PixArtTransformer2DModel(**config)
    expected = sum(weight.numel() for weight in model.parameters())
    module = PixArt(**diffusers_pixart.module_kwargs(config))
    module.check()
    made = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    assert sum(prod(leaf.shape) for leaf in jax.tree.leaves(made)) == expected
    assert module.interpolation == size // 64
    assert module.size_conditions == (size == 128 and not given)


def test_every_product_is_a_site():
    module = PixArt(**diffusers_pixart.module_kwargs(SMALL))
    made = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    x_t, t, caption = module.example_inputs()
    found, remainder = sites.list_sites(from_linen(module), made, x_t, t[0], caption)
    assert remainder == []
    paths = {site.path: site for site in found}
    width, text, tokens = 24, 2, 16
    assert paths["block_1/cross/kv"].macs == text * width * 2 * width
    assert paths["block_1/cross/qk"].macs == tokens * text * width
    assert paths["block_0/attn/qk"].macs == tokens * tokens * width


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption_channels": None}, "caption_channels=None"),
        ({"cross_attention_dim": 48}, "cross_attention_dim=48: .* its own width, 24"),
        ({"attention_type": "gated"}, "attention_type='gated'"),
        ({"norm_type": "ada_norm_zero"}, "norm_type='ada_norm_zero'"),
    ],
)
def test_configs_of_another_model_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        diffusers_pixart.module_kwargs({**SMALL, **change})


@pytest.mark.parametrize("change", [{"patch": 3}, {"num_heads": 5}, {"width": 26}])
def test_sizes_that_do_not_divide(change):
    kwargs = {**diffusers_pixart.module_kwargs(SMALL), **change}
    with pytest.raises(InputError, match="must be a multiple of patch"):
        PixArt(**kwargs).check()


def test_the_older_class_and_the_saved_table_are_known(converted, tmp_path):
    *_, folder = converted("sigma-like")
    source = shutil.copytree(folder / "source", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "_class_name": "Transformer2DModel", "norm_num_groups": 32})
    )
    file = source / "diffusion_pytorch_model.safetensors"
    from safetensors.numpy import load_file, save_file

    tensors = {**load_file(file), "pos_embed.pos_embed": np.zeros((1, 16, 24), np.float32)}
    save_file(tensors, file)
    line = convert(str(source), tmp_path / "again.safetensors")
    assert "1 left out; left out: pos_embed.pos_embed" in line
    again = load_file(tmp_path / "again.safetensors")
    first = load_file(folder / "out.safetensors")
    assert again.keys() == first.keys()
    assert all(np.array_equal(again[name], first[name]) for name in first)
