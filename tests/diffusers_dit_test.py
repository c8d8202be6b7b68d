"""diffusers' DiT converted: our output is theirs, with the two known differences as switches."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from mpqdiff import weights  # noqa: E402
from mpqdiff.denoiser import from_linen  # noqa: E402
from mpqdiff.errors import InputError  # noqa: E402
from mpqdiff.models.dit import DiT  # noqa: E402
from mpqdiff.weights import diffusers_dit  # noqa: E402
from mpqdiff.weights.convert import convert  # noqa: E402

SMALL = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=5,
)
CONFIGS = {
    "small": {},
    "eps only, patches of 4": dict(in_channels=3, out_channels=3, patch_size=4, num_layers=1),
    "a norm epsilon that shows": dict(norm_eps=0.1, num_layers=3),
    "one pixel a token": dict(num_attention_heads=3, attention_head_dim=8, patch_size=1),
}
T = np.array([0, 17, 500, 999])


def random_model(**changes):
    """A model with every parameter drawn (no zero gates), the copied embedders equal."""
    model = diffusers.DiTTransformer2DModel(**{**SMALL, **changes}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            spread = 0.3 if weight.ndim == 1 else weight[0].numel() ** -0.5
            weight.normal_(generator=generator).mul_(spread)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


def inputs(model):
    rng = np.random.default_rng(1)
    size, channels = model.config.sample_size, model.config.in_channels
    labels = np.array([0, 2, 5, 1])  # 5 is the null class
    return rng.normal(size=(4, size, size, channels)).astype(np.float32), labels


def theirs(model, t=T):
    """Output [B,H,W,C'] of the torch model."""
    x_t, labels = inputs(model)
    with torch.no_grad():
        out = model(
            torch.tensor(x_t).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(labels)
        ).sample
    return out.permute(0, 2, 3, 1).numpy()


def ours(path, model, t=T):
    module, params, _ = weights.load(str(path))
    x_t, labels = inputs(model)
    out = from_linen(module)(params, jnp.asarray(x_t), jnp.asarray(t), jnp.asarray(labels))
    parts = [out.eps] if out.log_variance is None else [out.eps, out.log_variance]
    return np.concatenate(parts, axis=-1)


def difference(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.fixture
def converted(tmp_path):
    def make(model, kind=""):
        model.save_pretrained(tmp_path / "source")
        line = convert(str(tmp_path / "source"), tmp_path / "out.safetensors", kind=kind)
        return tmp_path / "out.safetensors", line

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_output_is_that_of_diffusers(converted, name):
    model = random_model(**CONFIGS[name])
    path, line = converted(model)
    expected = theirs(model)
    got = ours(path, model)
    half = model.config.in_channels
    assert difference(got[..., :half], expected[..., :half]) < 1e-4
    if model.config.out_channels == 2 * half:
        assert difference(got[..., half:], expected[..., half:]) < 1e-4
    assert got.shape == expected.shape
    assert f"{len(model.state_dict())} source tensors used, 0 left out" in line
    assert "diffusers_dit_as_trained" in line  # the other reading is named


def test_computed_as_trained_it_is_another_function_and_that_of_mended_diffusers(converted):
    model = random_model(norm_eps=0.1)
    path, line = converted(model, kind="diffusers_dit_as_trained")
    got = ours(path, model)
    apart = [difference(g, e) for g, e in zip(got, theirs(model), strict=True)]
    assert apart[2] > 0.01 and apart[3] > 0.01
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    assert difference(got, theirs(model)) < 1e-4
    assert "Note" not in line


@pytest.mark.parametrize("part", ["timestep_freq_shift", "mlp_norm_epsilon"])
def test_each_switch_alone_changes_the_output(converted, part):
    model = random_model(norm_eps=0.1)
    path, _ = converted(model)
    module, params, _ = weights.load(str(path))
    x_t, labels = inputs(model)
    call = (params, jnp.asarray(x_t), jnp.int32(500), jnp.asarray(labels))
    plain = DiT(**{**fields(module), part: diffusers_dit.PLAIN[part]})
    assert difference(from_linen(plain)(*call).eps, from_linen(module)(*call).eps) > 0.003


def fields(module):
    return {name: getattr(module, name) for name in DiT.__dataclass_fields__
            if name not in ("parent", "name")}  # fmt: skip


def test_the_older_class_name_is_known(converted, tmp_path):
    path, _ = converted(random_model())
    before = path.read_bytes()
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    assert "diffusers_dit," in convert(str(tmp_path / "source"), path)
    assert path.read_bytes() == before


def test_blocks_with_embedders_of_their_own_are_refused(converted):
    model = random_model()
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[3, 2] += 0.1
    with pytest.raises(
        InputError, match=r"blocks\.1\.norm1\.emb\.class.* differs from .*blocks\.0"
    ):
        converted(model)


def test_tensors_of_the_published_model():
    """DiT-XL/2 in this layout: 538 tensors, of which 28 blocks repeat the embedders."""
    entries = diffusers_dit.entries(
        {"norm_type": "ada_norm_zero", "num_layers": 28, "out_channels": 8}
    )
    assert len({key for entry in entries for key in entry.sources}) == 538
    kwargs = diffusers_dit.module_kwargs({"out_channels": 8})
    assert (kwargs["width"], kwargs["num_heads"], kwargs["learn_variance"]) == (1152, 16, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "layer_norm"}, r"norm_type='layer_norm' \(supported: 'ada_norm_zero'\)"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ({"out_channels": 5}, "5 output channels for 4 input channels"),
        ({"num_layers": "2"}, "num_layers='2', expected int"),
        ({"sample_size": [8, 8]}, "sample_size"),
    ],
)
def test_configs_of_another_model_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        diffusers_dit.module_kwargs({**SMALL, **change})
