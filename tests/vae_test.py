"""AutoencoderKL and VQModel: latents and images are diffusers', from the same weights."""

import os
from math import prod
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from mpqdiff import latents, recipe, weights  # noqa: E402
from mpqdiff.config import base  # noqa: E402
from mpqdiff.errors import InputError  # noqa: E402
from mpqdiff.models.vae import AutoencoderKL, VQModel  # noqa: E402
from mpqdiff.weights import diffusers_vae  # noqa: E402
from mpqdiff.weights.convert import CONVERTERS, convert, filled  # noqa: E402
from mpqdiff.weights.source import Source, State  # noqa: E402


def blocks(*widths):
    return dict(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
    )


CONFIGS = {
    "two levels": dict(**blocks(8, 16), layers_per_block=1, norm_num_groups=4),
    "three levels, equal and falling widths": dict(
        **blocks(8, 8, 12), layers_per_block=2, norm_num_groups=2, latent_channels=3
    ),
    "one level": dict(**blocks(8), norm_num_groups=8),
}
BARE = dict(
    **blocks(8, 16),
    norm_num_groups=4,
    latent_channels=6,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
    scaling_factor=1.5,
    shift_factor=-0.3,
)
VQ = dict(**blocks(8, 12), norm_num_groups=4, num_vq_embeddings=16, scaling_factor=0.7)


def random_model(make: Any = diffusers.AutoencoderKL, **config):
    model = make(**config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            spread = 0.3 if weight.ndim == 1 else weight[0].numel() ** -0.5
            weight.normal_(generator=generator).mul_(spread)
    return model


def torch_images(array):
    return torch.tensor(np.asarray(array)).permute(0, 3, 1, 2)


def numpy_images(tensor):
    return tensor.permute(0, 2, 3, 1).numpy()


def difference(got, expected):
    return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


def images(model):
    """[2, 12, 8, C]: not square."""
    rng = np.random.default_rng(1)
    return rng.normal(size=(2, 12, 8, model.config.in_channels)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def little_effort():
    """Compiling is most of the work here, and nothing is timed."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def run(module, params, method, *args):
    def apply(params, *args):
        return module.apply({"params": params}, *args, method=method)

    return jax.jit(apply)(params, *args)


def check_agreement(module, params, model):
    x = images(model)
    with torch.no_grad():
        posterior = model.encode(torch_images(x)).latent_dist
        expected = model.decode(posterior.mean).sample
    got = run(module, params, "encode", x)
    mean = numpy_images(posterior.mean)
    assert difference(got.mean, mean) < 1e-4
    assert difference(got.log_variance, numpy_images(posterior.logvar)) < 1e-4
    assert difference(run(module, params, "decode", mean), numpy_images(expected)) < 1e-4
    assert expected.shape == torch_images(x).shape


@pytest.mark.parametrize("name", CONFIGS)
def test_moments_and_images_are_those_of_diffusers(tmp_path, name):
    model = random_model(**CONFIGS[name])
    model.save_pretrained(tmp_path / "source")
    line = convert(str(tmp_path / "source"), tmp_path / "out.safetensors")
    assert f"{len(model.state_dict())} source tensors used, 0 left out" in line
    module, params, _ = weights.load(str(tmp_path / "out.safetensors"))
    check_agreement(module, params, model)


def test_without_the_parts_that_later_models_leave_out():
    """No 1x1 convolutions, no attention: as the autoencoders of newer models."""
    model = random_model(**BARE)
    module = AutoencoderKL(**diffusers_vae.module_kwargs(model.config))
    module.check()
    made = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    from flax import traverse_util

    from mpqdiff.weights.mapping import fill

    state = {key: value.numpy() for key, value in model.state_dict().items()}
    shapes = {k: v.shape for k, v in traverse_util.flatten_dict(made, sep="/").items()}
    flat, _ = fill(state, diffusers_vae.entries(model.config), shapes)
    params = traverse_util.unflatten_dict(flat, sep="/")
    # What a diffusion model sees: encode, sample, shift, scale, and back.
    x, rng = images(model), np.random.default_rng(2)
    noise = rng.normal(size=(2, 6, 4, 6)).astype(np.float32)
    with torch.no_grad():
        posterior = model.encode(torch_images(x)).latent_dist
        z = (posterior.mean + posterior.std * torch_images(noise) + 0.3) * 1.5
        expected = model.decode(z / 1.5 - 0.3).sample
    scaled = run(module, params, "to_latents", x, noise)
    assert difference(scaled, numpy_images(z)) < 1e-4
    assert difference(run(module, params, "to_images", scaled), numpy_images(expected)) < 1e-4


def test_extreme_log_variances_are_clipped_as_in_diffusers(tmp_path):
    model = random_model(**CONFIGS["two levels"])
    with torch.no_grad():
        model.quant_conv.bias[4:] = torch.tensor([100.0, -100.0, 0.0, 19.0])
    model.save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "out.safetensors")
    module, params, _ = weights.load(str(tmp_path / "out.safetensors"))
    with torch.no_grad():
        expected = numpy_images(model.encode(torch_images(images(model))).latent_dist.logvar)
    log_variance = np.asarray(run(module, params, "encode", images(model)).log_variance)
    assert (log_variance[..., 0] == 20).all() and (log_variance[..., 1] == -30).all()
    assert difference(log_variance, expected) < 1e-4


def test_older_names_of_the_attention_are_known():
    model = random_model(**CONFIGS["two levels"])
    new = {key: value.numpy() for key, value in model.state_dict().items()}
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def aged(key):
        return next((key.replace(n, o) for n, o in names.items() if n in key), key)

    results = []
    for state in (new, {aged(key): value for key, value in new.items()}):
        lazy = State({key: lambda value=value: value for key, value in state.items()})
        config = {"_class_name": "AutoencoderKL", **model.config}  # as in a saved folder
        source = Source("unused", config, lazy)  # type: ignore[arg-type]
        results.append(dict(filled(source, CONVERTERS["diffusers_vae"]).tensors))
    assert any("query" in aged(key) for key in new)
    assert results[0].keys() == results[1].keys()
    assert all(np.array_equal(results[0][name], results[1][name]) for name in results[0])


def test_parameters_of_the_published_model():
    """The autoencoder of Stable Diffusion and DiT, f = 8."""
    config = dict(**blocks(128, 256, 512, 512), layers_per_block=2)
    module = AutoencoderKL(**diffusers_vae.module_kwargs(config))
    made = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    assert sum(prod(leaf.shape) for leaf in jax.tree.leaves(made)) == 83_653_863
    assert module.scaling_factor == 0.18215 and module.shift_factor == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types="),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types="),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"out_channels": 1}, "in_channels=3 and out_channels=1"),
        ({"latents_mean": [0.0] * 4}, "latents_mean="),
        ({"use_quant_conv": "yes"}, "use_quant_conv='yes', expected bool"),
    ],
)
def test_configs_of_another_model_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        diffusers_vae.module_kwargs({**CONFIGS["two levels"], **change})


def test_widths_that_the_groups_do_not_divide():
    with pytest.raises(InputError, match=r"widths=\(8, 12\) must be .* groups=8"):
        AutoencoderKL(widths=(8, 12), groups=8).check()


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    """(diffusers' model, path of its converted weights), two levels, 16 codes."""
    folder = tmp_path_factory.mktemp("vq")
    model = random_model(diffusers.VQModel, **VQ)
    with torch.no_grad():  # codes among the latents, or one of them would be nearest to all
        z = model.encode(torch_images(images(model))).latents
        spread, mean = z.std((0, 2, 3)), z.mean((0, 2, 3))
        model.quantize.embedding.weight.mul_(2 * spread).add_(mean)
    model.save_pretrained(folder / "source")
    line = convert(str(folder / "source"), folder / "out.safetensors")
    assert f"{len(model.state_dict())} source tensors used, 0 left out" in line
    return model, str(folder / "out.safetensors")


def test_latents_and_images_of_a_vq_model_are_those_of_diffusers(vq):
    model, path = vq
    module, params, _ = weights.load(path)
    x = images(model)
    with torch.no_grad():
        z = model.encode(torch_images(x)).latents
        codes = model.quantize(z)[2][2]
        expected = numpy_images(model.decode(z).sample)
    assert len(codes.unique()) > 4 and expected.shape == x.shape
    scaled = 0.7 * numpy_images(z)
    assert difference(run(module, params, "to_latents", x), scaled) < 1e-4
    assert difference(run(module, params, "to_images", scaled), expected) < 1e-4
    assert difference(run(module, params, "__call__", x), expected) < 1e-4


def test_of_equally_near_codes_the_first_is_taken():
    z = np.array([0.0, 1.5, 1.4]).reshape(1, 1, 3, 1)
    for codes, expected in (([-1, 1, 2, 1], [-1, 1, 1]), ([2, 1, -1, 1], [1, 2, 1])):
        params = {"codebook": np.array(codes, np.float32)[:, None]}
        module = VQModel(latent_channels=1, num_codes=4)
        assert np.ravel(run(module, params, "quantise", z)).tolist() == expected


def test_a_vq_model_decodes_the_samples_of_a_denoiser(vq):
    model, path = vq
    config = base()
    config.autoencoder.weights = config.weights = path
    found = latents.load(config, SimpleNamespace(channels=3))
    assert found is not None and found.image_shape((6, 4, 3)) == (12, 8, 3)
    z = np.random.default_rng(3).normal(size=(3, 6, 4, 3)).astype(np.float32)
    with torch.no_grad():
        expected = numpy_images(model.decode(torch_images(z / 0.7)).sample)
    assert difference(found.decode(z, batch=2), expected) < 1e-4
    with pytest.raises(InputError, match=r"vq_model with 3 latent channels; .* vq_model with 4"):
        latents.load(config, SimpleNamespace(channels=4))
    with pytest.raises(InputError, match="is an autoencoder: name it"):
        recipe.load_model(config)


def test_parameters_of_the_published_vq_model():
    """The first stage of LDM-4, f = 4."""
    config = dict(**blocks(128, 256, 512), layers_per_block=2, num_vq_embeddings=8192)
    module = VQModel(**diffusers_vae.vq_kwargs({**config, "scaling_factor": 1.0}))
    assert module == VQModel(widths=[128, 256, 512])
    made = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    assert sum(prod(leaf.shape) for leaf in jax.tree.leaves(made)) == 55_322_782  # diffusers' too


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vq_embed_dim": 5}, "vq_embed_dim=5, supported: latent_channels=3"),
        ({"norm_type": "spatial"}, "norm_type='spatial'"),
        ({"lookup_from_codebook": True}, "lookup_from_codebook=True"),
        ({"scaling_factor": "1"}, "scaling_factor='1', expected float"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types="),
    ],
)
def test_vq_configs_of_another_model_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        diffusers_vae.vq_kwargs({**VQ, **change})


def test_a_vq_config_without_its_scaling_factor():
    with pytest.raises(InputError, match="no scaling_factor"):
        diffusers_vae.vq_kwargs({k: v for k, v in VQ.items() if k != "scaling_factor"})
