"""diffusers' U-Nets: our output on their random weights is theirs, switches both ways."""

import json
import math

import jax
import numpy as np
import pytest
from flax import traverse_util

from mpqdiff.errors import InputError
from mpqdiff.models.unet import UNet, parameter_shapes
from mpqdiff.weights import diffusers_unet
from mpqdiff.weights.mapping import fill

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PLAIN = dict(
    _class_name="UNet2DModel",
    sample_size=16,
    in_channels=3,
    out_channels=3,
    block_out_channels=(16, 32, 32),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
)
# As google/ddpm-cifar10-32: padded at the end, sines first, shift 1, one head, eps 1e-6.
DDPM = dict(
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    attention_head_dim=None,
    norm_eps=1e-6,
)
ADM = dict(
    resnet_time_scale_shift="scale_shift",
    attn_norm_num_groups=8,
    downsample_type="resnet",
    upsample_type="resnet",
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    num_class_embeds=5,
    out_channels=6,
    attention_head_dim=16,
    layers_per_block=2,
)
CROSSED = dict(
    _class_name="UNet2DConditionModel",
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=12,
    attention_head_dim=2,
)
CONFIGS = {
    "ddpm": {**PLAIN, **DDPM},
    "no attention in the middle": {**PLAIN, "add_attention": False, "time_embedding_dim": 24},
    "adm": {**PLAIN, **ADM},
    "crossed": {**CROSSED, "resnet_time_scale_shift": "scale_shift"},
    "crossed, deep, linear": {
        **CROSSED,
        "transformer_layers_per_block": [2, 1],
        "use_linear_projection": True,
        "attention_head_dim": [2, 4],
        "upcast_attention": True,
    },
}


def reference(config, seed=0):
    """(diffusers' model, its state dict): every parameter random, none zero or one."""
    torch.manual_seed(seed)
    fields = {k: v for k, v in config.items() if not k.startswith("_")}
    model = getattr(diffusers, config["_class_name"])(**fields).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.normal_(centre, fan_in**-0.5)
    return model, {name: value.numpy() for name, value in model.state_dict().items()}


def inputs(config, seed=1):
    rng = np.random.default_rng(seed)
    side = config["sample_size"]
    x_t = rng.standard_normal((2, side, side, config.get("in_channels", 4))).astype(np.float32)
    if config["_class_name"] == "UNet2DConditionModel":
        cond = rng.standard_normal((2, 5, config["cross_attention_dim"])).astype(np.float32)
    else:
        cond = np.array([3, 1], np.int32)
    return x_t, np.array([999, 7], np.int32), cond


def theirs(model, config, x_t, t, cond):
    """[B,H,W,outputs] of diffusers' model."""
    given = {}
    if config["_class_name"] == "UNet2DConditionModel":
        given["encoder_hidden_states"] = torch.from_numpy(cond)
    elif config.get("num_class_embeds"):
        given["class_labels"] = torch.from_numpy(cond).long()
    with torch.no_grad():
        x = torch.from_numpy(x_t).permute(0, 3, 1, 2)
        out = model(x, torch.from_numpy(t).long(), **given).sample
    return out.permute(0, 2, 3, 1).numpy()


def converted(config, state, **options):
    unet = UNet(**diffusers_unet.module_kwargs(config))
    entries = diffusers_unet.entries(config, **options)
    flat, coverage = fill(state, entries, parameter_shapes(unet), ignored=diffusers_unet.IGNORED)
    assert coverage.used == len(state)
    assert coverage.left_out == ()
    return unet, traverse_util.unflatten_dict(flat, sep="/")


def ours(unet, params, x_t, t, cond):
    # The programs run once: what they save by being optimised is less than it takes.
    apply = jax.jit(unet.apply, compiler_options={"xla_backend_optimization_level": 0})
    out = apply({"params": params}, x_t, t, cond)
    return np.concatenate([part for part in out if part is not None], axis=-1)


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_our_output_is_theirs(config):
    model, state = reference(config)
    unet, params = converted(config, state)
    x_t, t, cond = inputs(config)
    expected = theirs(model, config, x_t, t, cond)
    assert expected.std() > 0.1
    assert relative(ours(unet, params, x_t, t, cond), expected) < 1e-4


@pytest.fixture(scope="module")
def ddpm():
    """(UNet, params, inputs, diffusers' output) of the DDPM configuration."""
    config = CONFIGS["ddpm"]
    model, state = reference(config)
    given = inputs(config)
    return *converted(config, state), given, theirs(model, config, *given)


@pytest.mark.parametrize(
    ("field", "wrong"), [("cos_first", True), ("frequency_shift", 0.0), ("down_padding", "both")]
)
def test_each_switch_the_wrong_way_is_seen(ddpm, field, wrong):
    unet, params, given, expected = ddpm
    assert getattr(unet, field) != wrong
    found = ours(unet.clone(**{field: wrong}), params, *given)
    assert relative(found, expected) > 1e-3


def test_where_the_attention_scale_is_multiplied_in_is_rounding(ddpm):
    unet, params, given, expected = ddpm
    found = ours(unet.clone(attention_scale="scores"), params, *given)
    assert relative(found, expected) < 1e-4


def test_eps_of_the_norms_is_the_config_s():
    """1e-5 and 1e-6 differ by less than the tolerance unless activations are small."""
    config = {**CONFIGS["ddpm"], "norm_eps": 1e-6}
    model, _ = reference(config)
    for value in (model.conv_in.weight, model.conv_in.bias):
        value.data.mul_(1e-3)
    unet, params = converted(config, {k: v.numpy() for k, v in model.state_dict().items()})
    given = inputs(config)
    expected = theirs(model, config, *given)
    assert relative(ours(unet, params, *given), expected) < 1e-4
    assert relative(ours(unet.clone(norm_eps=1e-5), params, *given), expected) > 1e-3


def test_parameter_counts_of_published_networks():
    church = {
        **PLAIN,
        **DDPM,
        "sample_size": 256,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
    }
    stable_diffusion_1 = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "cross_attention_dim": 768,
    }
    for config, count in ((church, 113_673_219), (stable_diffusion_1, 859_520_964)):
        shapes = parameter_shapes(UNet(**diffusers_unet.module_kwargs(config)))
        assert sum(math.prod(shape) for shape in shapes.values()) == count


def test_old_attention_names():
    config = CONFIGS["ddpm"]
    _, state = reference(config)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in state.items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}", f"attentions.0.{before}")
            name = name.replace(f"attentions.1.{new}", f"attentions.1.{before}")
        renamed[name] = value
    assert renamed.keys() != state.keys()
    _, expected = converted(config, state)
    _, found = converted(config, renamed, old_names=True)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(InputError, match=r"keys missing from the source: .*to_k.bias"):
        converted(config, renamed)


def test_a_config_file_as_diffusers_writes_it(tmp_path):
    for name in ("ddpm", "adm", "crossed"):
        model, _ = reference(CONFIGS[name])
        model.save_config(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        found = diffusers_unet.module_kwargs(written)
        assert found == diffusers_unet.module_kwargs(CONFIGS[name])
        # Arguments survive the JSON of a weights file.
        again = UNet(**json.loads(json.dumps(found)))
        assert parameter_shapes(again) == parameter_shapes(UNet(**found))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet3DModel"}, "'UNet3DModel'; known: UNet2DConditionModel, UNet2DModel"),
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported; expected silu, swish"),
        ({"center_input_sample": True}, "center_input_sample=True"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"mid_block_type": None}, "mid_block_type=None is not supported"),
        ({"mid_block_scale_factor": 0.7}, "mid_block_scale_factor=0.7"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"some_new_field": 3}, "some_new_field=3"),
        ({"up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")}, "expected the same"),
        ({"down_block_types": ("DownBlock2D",) * 2}, "2 down blocks, 3 widths"),
        ({"down_block_types": ("AttnSkipDownBlock2D",) * 3}, "'AttnSkipDownBlock2D'"),
        ({"upsample_type": "resnet"}, "downsample_type, upsample_type"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None"),
        ({"out_channels": 5}, "in_channels=3, out_channels=5"),
        ({"sample_size": None}, "sample_size=None"),
        ({"layers_per_block": [1, 2, 1]}, "layers_per_block"),
        ({"norm_num_groups": 12}, "multiples of groups=12"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_built_is_refused_by_field(changes, message):
    with pytest.raises(InputError, match=message):
        diffusers_unet.module_kwargs({**PLAIN, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
        ({"encoder_hid_dim": 64}, "encoder_hid_dim=64"),
        ({"only_cross_attention": True}, "only_cross_attention=True"),
        ({"cross_attention_dim": [12, 16]}, "one value for all levels"),
        ({"num_class_embeds": 4}, "num_class_embeds=4"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "'AttnDownBlock2D'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_built_with_a_context(changes, message):
    with pytest.raises(InputError, match=message):
        diffusers_unet.module_kwargs({**CROSSED, **changes})


def test_a_wrong_architecture_names_keys():
    _, state = reference(CONFIGS["ddpm"])
    config = {**CONFIGS["ddpm"], "layers_per_block": 2}
    with pytest.raises(InputError, match=r"missing from the source: down_blocks\.0\.resnets\.1"):
        converted(config, state)
    with pytest.raises(InputError, match="unexpected source keys: extra"):
        converted(CONFIGS["ddpm"], {**state, "extra": np.zeros(1)})
    wide = {**CONFIGS["ddpm"], "block_out_channels": (24, 32, 32)}
    with pytest.raises(InputError, match=r"shapes that differ: .*\(3, 3, 3, 16\), expected"):
        converted(wide, state)
