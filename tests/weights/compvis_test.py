"""Latent-diffusion and guided-diffusion U-Nets, against a reference of our own.

Their code cannot be installed, so the reference below was written from a description of the
layout: a plain `UNetModel` with their parameter names, numbered blocks and conventions. It proves
the converter against that description, not against the original code.
"""

import math

import jax
import numpy as np
import pytest
from flax import traverse_util

from mpqdiff.errors import InputError
from mpqdiff.models.unet import UNet, parameter_shapes
from mpqdiff.models.unet_blocks import SpatialTransformer
from mpqdiff.weights import compvis
from mpqdiff.weights.mapping import fill

torch = pytest.importorskip("torch")
nn, functional = torch.nn, torch.nn.functional

GROUPS = 32
BASE = dict(
    image_size=8,
    in_channels=3,
    out_channels=3,
    model_channels=32,
    num_res_blocks=1,
    attention_resolutions=[2],
    channel_mult=[1, 2],
    num_heads=4,
)
CONFIGS = {
    "latent, additive": BASE,
    "guided, legacy order": {
        **BASE,
        "num_res_blocks": 2,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "num_classes": 5,
        "out_channels": 6,
    },
    "guided, new order": {**BASE, "use_new_attention_order": True, "channel_mult": [0.5, 1]},
    "context": {
        **BASE,
        "use_spatial_transformer": True,
        "context_dim": 12,
        "num_heads": -1,
        "num_head_channels": 16,
        "attention_resolutions": [1, 2],
        "transformer_depth": 2,
    },
}
CONFIGS["guided, new order"].update(model_channels=64)
LABELLED = {**BASE, "use_spatial_transformer": True, "context_dim": 12, "n_classes": 6}


class Res(nn.Module):
    """A residual block; `way` None, "up" or "down"."""

    def __init__(self, inputs, outputs, emb, scale_shift, way=None):
        super().__init__()
        self.way, self.scale_shift = way, scale_shift
        self.in_layers = nn.ModuleList(
            [nn.GroupNorm(GROUPS, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)]
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, outputs * (1 + scale_shift)))
        self.out_layers = nn.ModuleList(
            [
                nn.GroupNorm(GROUPS, outputs),
                nn.SiLU(),
                nn.Dropout(0.0),
                nn.Conv2d(outputs, outputs, 3, padding=1),
            ]
        )
        same = inputs == outputs
        self.skip_connection = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)

    def move(self, x):
        if self.way == "up":
            return functional.interpolate(x, scale_factor=2, mode="nearest")
        return functional.avg_pool2d(x, 2) if self.way == "down" else x

    def forward(self, x, emb, context):
        h = self.in_layers[2](self.move(self.in_layers[1](self.in_layers[0](x))))
        e = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + e)
        return self.skip_connection(self.move(x)) + self.out_layers[3](self.out_layers[1](h))


class Attn(nn.Module):
    """Self-attention with joint qkv, [heads, 3, head] (legacy) or [3, heads, head] rows."""

    def __init__(self, width, heads, new_order):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x, emb, context):
        b, c, h, w = x.shape
        flat = x.reshape(b, c, h * w)
        head = c // self.heads
        qkv = self.qkv(self.norm(flat))
        if self.new_order:
            q, k, v = (a.reshape(b * self.heads, head, -1) for a in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(b * self.heads, 3 * head, -1).split(head, dim=1)
        scale = 1 / math.sqrt(math.sqrt(head))
        weights = torch.softmax((q * scale).transpose(1, 2) @ (k * scale), dim=-1)
        mixed = (v @ weights.transpose(1, 2)).reshape(b, c, -1)
        return (flat + self.proj_out(mixed)).reshape(x.shape)


class Cross(nn.Module):
    """Attention of x [B,P,D] to context [B,Q,C]; no bias but on the output."""

    def __init__(self, width, source, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(source, width, bias=False)
        self.to_v = nn.Linear(source, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x, source):
        b, p, width = x.shape
        q, k, v = (
            a.reshape(b, -1, self.heads, width // self.heads).transpose(1, 2)
            for a in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        weights = torch.softmax(q @ k.transpose(2, 3) * (width // self.heads) ** -0.5, dim=-1)
        return self.to_out((weights @ v).transpose(1, 2).reshape(b, p, width))


class Gated(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * functional.gelu(gate)


class Feed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(Gated(width), nn.Dropout(0.0), nn.Linear(4 * width, width))


class Layer(nn.Module):
    def __init__(self, width, source, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Cross(width, width, heads), Cross(width, source, heads)
        self.ff = Feed(width)

    def forward(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class Spatial(nn.Module):
    """The spatial transformer, its projections 1 x 1 convolutions."""

    def __init__(self, width, source, heads, depth):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([Layer(width, source, heads) for _ in range(depth)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x, emb, context):
        h = self.proj_in(self.norm(x))
        tokens = h.flatten(2).transpose(1, 2)
        for layer in self.transformer_blocks:
            tokens = layer(tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(h.shape))


class Down(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x, emb, context):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, emb, context):
        return self.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))


class Stem(nn.Conv2d):
    def forward(self, x, emb, context):
        return super().forward(x)


def sequence(blocks, x, emb, context):
    for block in blocks:
        x = block(x, emb, context)
    return x


class Reference(nn.Module):
    """`UNetModel` of a config, blocks numbered as they are appended."""

    def __init__(self, c):
        super().__init__()
        self.model = model = c["model_channels"]
        emb, scale_shift = 4 * model, c.get("use_scale_shift_norm", False)
        self.time_embed = nn.Sequential(nn.Linear(model, emb), nn.SiLU(), nn.Linear(emb, emb))
        if c.get("num_classes"):
            self.label_emb = nn.Embedding(c["num_classes"], emb)

        def attend(width):
            per_head = c.get("num_head_channels", -1)
            heads = c["num_heads"] if per_head == -1 else width // per_head
            if c.get("use_spatial_transformer"):
                return Spatial(width, c["context_dim"], heads, c.get("transformer_depth", 1))
            return Attn(width, heads, c.get("use_new_attention_order", False))

        def resample(width, way):
            if c.get("resblock_updown"):
                return Res(width, width, emb, scale_shift, way)
            return {"down": Down, "up": Up}[way](width)

        mult = c["channel_mult"]
        width = int(mult[0] * model)
        rows, factor, kept = [[Stem(c["in_channels"], width, 3, padding=1)]], 1, [width]
        for level, m in enumerate(mult):
            for _ in range(c["num_res_blocks"]):
                rows.append([Res(width, int(m * model), emb, scale_shift)])
                width = int(m * model)
                if factor in c["attention_resolutions"]:
                    rows[-1].append(attend(width))
                kept.append(width)
            if level < len(mult) - 1:
                rows.append([resample(width, "down")])
                kept.append(width)
                factor *= 2
        self.input_blocks = nn.ModuleList([nn.ModuleList(row) for row in rows])
        self.middle_block = nn.ModuleList(
            [
                Res(width, width, emb, scale_shift),
                attend(width),
                Res(width, width, emb, scale_shift),
            ]
        )
        rows = []
        for level, m in reversed(list(enumerate(mult))):
            for index in range(c["num_res_blocks"] + 1):
                rows.append([Res(width + kept.pop(), int(m * model), emb, scale_shift)])
                width = int(m * model)
                if factor in c["attention_resolutions"]:
                    rows[-1].append(attend(width))
                if level and index == c["num_res_blocks"]:
                    rows[-1].append(resample(width, "up"))
                    factor //= 2
        self.output_blocks = nn.ModuleList([nn.ModuleList(row) for row in rows])
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Conv2d(width, c["out_channels"], 3, padding=1),
        )

    def forward(self, x, t, label=None, context=None):
        half = self.model // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
        angles = t[:, None].float() * frequencies
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        if hasattr(self, "label_emb"):
            emb = emb + self.label_emb(label)
        kept = []
        for row in self.input_blocks:
            x = sequence(row, x, emb, context)
            kept.append(x)
        x = sequence(self.middle_block, x, emb, context)
        for row in self.output_blocks:
            x = sequence(row, torch.cat([x, kept.pop()], dim=1), emb, context)
        return self.out(x)


def reference(config):
    """(the reference, its state dict): every parameter random, none zero or one."""
    torch.manual_seed(0)
    model = Reference(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            norm = parameter.ndim == 1 and bool((parameter == 1).all())
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.normal_(1.0 if norm else 0.0, fan_in**-0.5)
    return model, {name: value.numpy() for name, value in model.state_dict().items()}


def inputs(config):
    """(x_t, t, label, context)"""
    rng = np.random.default_rng(1)
    side = config["image_size"]
    x_t = rng.standard_normal((2, side, side, config["in_channels"])).astype(np.float32)
    context = rng.standard_normal((2, 5, config.get("context_dim") or 1)).astype(np.float32)
    return x_t, np.array([999, 7], np.int32), np.array([4, 1], np.int32), context


def theirs(model, x_t, t, label, context):
    with torch.no_grad():
        x = torch.from_numpy(x_t).permute(0, 3, 1, 2)
        out = model(x, torch.from_numpy(t), torch.from_numpy(label), torch.from_numpy(context))
    return out.permute(0, 2, 3, 1).numpy()


def converted(config, state, **options):
    unet = UNet(**compvis.module_kwargs(config))
    flat, coverage = fill(
        state,
        compvis.entries(config, **options),
        parameter_shapes(unet),
        ignored=compvis.ignored(config, **options),
    )
    return unet, traverse_util.unflatten_dict(flat, sep="/"), coverage


def ours(unet, params, x_t, t, cond):
    # The programs run once: what they save by being optimised is less than it takes.
    apply = jax.jit(unet.apply, compiler_options={"xla_backend_optimization_level": 0})
    out = apply({"params": params}, x_t, t, cond)
    return np.concatenate([part for part in out if part is not None], axis=-1)


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_our_output_is_the_reference_s(config):
    model, state = reference(config)
    unet, params, coverage = converted(config, state)
    assert coverage == (len(state), ())
    x_t, t, label, context = inputs(config)
    expected = theirs(model, x_t, t, label, context)
    assert expected.std() > 0.1
    cond = context if unet.condition == "context" else label
    assert relative(ours(unet, params, x_t, t, cond), expected) < 1e-4


def test_the_transformer_s_norms_have_their_own_eps():
    """Seen where activations are small only: 1e-6 in the group norm, 1e-5 in the layer norms."""
    config = CONFIGS["context"]
    model, _ = reference(config)
    theirs_alone = model.middle_block[1]
    for value in theirs_alone.proj_in.parameters():
        value.data.mul_(3e-3)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    _, params, _ = converted(config, state)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 4, 4, 64)).astype(np.float32) * 2e-3
    context = rng.standard_normal((2, 5, 12)).astype(np.float32)
    with torch.no_grad():
        given = torch.from_numpy(x).permute(0, 3, 1, 2), None, torch.from_numpy(context)
        expected = theirs_alone(*given).permute(0, 2, 3, 1).numpy()
    block = SpatialTransformer(num_heads=4, scale="query", groups=32, depth=2, one_token=False)
    found = jax.jit(block.apply)({"params": params["mid_attn"]}, x, context)
    assert relative(np.asarray(found), expected) < 1e-4


def test_the_other_qkv_order_loads_and_is_wrong():
    """Shapes do not tell the two orders apart, so the config has to."""
    config = CONFIGS["guided, new order"]
    model, state = reference(config)
    unet, params, _ = converted({**config, "use_new_attention_order": False}, state)
    given = inputs(config)
    assert relative(ours(unet, params, *given[:3]), theirs(model, *given)) > 1e-2


def test_qkv_orders_by_hand():
    rows = np.arange(3 * 4)  # two heads of width 2
    by_head = [compvis.third(rows, index=i, heads=2, by_head=True, bias=True) for i in range(3)]
    assert [part.tolist() for part in by_head] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    whole = [compvis.third(rows, index=i, heads=2, by_head=False, bias=True) for i in range(3)]
    assert [part.tolist() for part in whole] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    kernel = compvis.third(rows[:, None, None] * 10, index=1, heads=2, by_head=True, bias=False)
    assert kernel.tolist() == [[20, 30, 80, 90]]


def checkpoint(config):
    """(model, table, state dict) of a latent-diffusion checkpoint; its average differs."""
    model, state = reference(config)
    rng = np.random.default_rng(3)
    table = rng.standard_normal((config["n_classes"], config["context_dim"])).astype(np.float32)
    stored = {compvis.LATENT_PREFIX + name: value for name, value in state.items()}
    for name, value in state.items():
        stored["model_ema." + f"diffusion_model.{name}".replace(".", "")] = value * 0.5
    beside = ["betas", "scale_factor", "first_stage_model.encoder.conv_in.weight", "logvar"]
    beside += ["model_ema.decay", "model_ema.num_updates", "sqrt_alphas_cumprod"]
    stored |= {name: np.ones(2, np.float32) for name in beside}
    stored["cond_stage_model.embedding.weight"] = table
    return model, table, stored


def test_a_latent_checkpoint_with_labels_as_context():
    model, table, stored = checkpoint(LABELLED)
    unet, params, coverage = converted(LABELLED, stored, prefix=compvis.LATENT_PREFIX)
    assert (unet.condition, unet.num_classes, unet.null_class) == ("label_context", 5, True)
    x_t, t, label, _ = inputs(LABELLED)
    expected = theirs(model, x_t, t, label, table[label][:, None])
    assert relative(ours(unet, params, x_t, t, label), expected) < 1e-4
    left_out = [name for name in coverage.left_out if name.startswith(compvis.LATENT_PREFIX)]
    dead = [name for name in left_out if ".attn2.to_" in name or ".norm2." in name]
    blocks = sum(path.endswith("attn2/v/kernel") for path in parameter_shapes(unet))
    assert len(dead) == len(left_out) == 4 * blocks
    assert sum(name.startswith("model_ema.") for name in coverage.left_out) > 100
    # The averaged weights are those without dots in their names.
    _, averaged, rest = converted(LABELLED, stored, averaged=True)
    kernel = averaged["down_1_attn_0"]["block_0"]["attn2"]["v"]["kernel"]
    np.testing.assert_array_equal(
        kernel, 0.5 * params["down_1_attn_0"]["block_0"]["attn2"]["v"]["kernel"]
    )
    np.testing.assert_array_equal(averaged["label_embed"]["embedding"], table)
    assert any(name.startswith("model_ema.") and "attn2to_k" in name for name in rest.left_out)


def test_dead_weights_are_not_left_out_where_they_are_alive():
    config = CONFIGS["context"]
    _, state = reference(config)
    assert not compvis.ignored(config)
    del state["middle_block.1.transformer_blocks.0.attn2.to_q.weight"]
    with pytest.raises(InputError, match=r"missing from the source: .*attn2\.to_q\.weight"):
        converted(config, state)
    _, state = reference(CONFIGS["latent, additive"])
    with pytest.raises(InputError, match="unexpected source keys: betas"):
        converted(CONFIGS["latent, additive"], {**state, "betas": np.ones(3)})


# Published configurations and their numbers of parameters.
LATENT = dict(in_channels=3, out_channels=3, image_size=64, num_res_blocks=2)
GUIDED = dict(
    num_res_blocks=2,
    attention_resolutions="32,16,8",
    num_head_channels=64,
    learn_sigma=True,
    resblock_updown=True,
)
PUBLISHED = {
    "LSUN-Churches, LDM-8": (
        dict(
            LATENT,
            in_channels=4,
            out_channels=4,
            image_size=32,
            model_channels=192,
            channel_mult=[1, 2, 2, 4, 4],
            attention_resolutions=[1, 2, 4, 8],
            num_heads=8,
            use_scale_shift_norm=True,
            resblock_updown=True,
        ),
        294_966_916,
    ),
    "LSUN-Bedrooms, LDM-4": (
        dict(
            LATENT,
            model_channels=224,
            channel_mult=[1, 2, 3, 4],
            attention_resolutions=[8, 4, 2],
            num_head_channels=32,
        ),
        274_056_163,
    ),
    "ImageNet, LDM-4": (
        dict(
            LATENT,
            model_channels=192,
            channel_mult=[1, 2, 3, 5],
            attention_resolutions=[8, 4, 2],
            num_heads=1,
            use_spatial_transformer=True,
            context_dim=512,
        ),
        400_920_579,
    ),
    "ADM 64": (
        compvis.guided_config(
            dict(
                GUIDED,
                image_size=64,
                num_channels=192,
                num_res_blocks=3,
                class_cond=True,
                use_new_attention_order=True,
            )
        ),
        295_904_454,
    ),
    "ADM 128": (
        compvis.guided_config(
            dict(
                GUIDED,
                image_size=128,
                num_channels=256,
                num_heads=4,
                num_head_channels=-1,
                class_cond=True,
            )
        ),
        421_529_606,
    ),
    "ADM 256, LSUN": (
        compvis.guided_config(dict(GUIDED, image_size=256, num_channels=256)),
        552_814_086,
    ),
    "ADM 512": (
        compvis.guided_config(dict(GUIDED, image_size=512, num_channels=256, class_cond=True)),
        558_997_638,
    ),
}


@pytest.mark.parametrize(("config", "count"), PUBLISHED.values(), ids=PUBLISHED)
def test_parameter_counts_of_published_networks(config, count):
    shapes = parameter_shapes(UNet(**compvis.module_kwargs(config)))
    assert sum(math.prod(shape) for shape in shapes.values()) == count


def test_guided_flags():
    """The published 64 and 512 models: attention at sides, multipliers by size, heads by width."""
    small = compvis.guided_config(
        dict(
            image_size=64,
            num_channels=192,
            num_res_blocks=3,
            attention_resolutions="32,16,8",
            num_head_channels=64,
            learn_sigma=True,
            class_cond=True,
            resblock_updown=True,
            use_new_attention_order=True,
        )
    )
    kwargs = compvis.module_kwargs(small)
    assert kwargs["widths"] == (192, 384, 576, 768)
    assert kwargs["num_heads"] == (3, 6, 9, 12)
    assert kwargs["attention_levels"] == (1, 2, 3)
    assert (kwargs["channels"], kwargs["learn_variance"]) == (3, True)
    assert (kwargs["condition"], kwargs["num_classes"], kwargs["null_class"]) == (
        "label",
        1000,
        False,
    )
    assert kwargs["scale_shift"] and kwargs["resample_in_blocks"]
    large = dict(image_size=512, num_channels=256, num_res_blocks=2, num_head_channels=64)
    wide = compvis.module_kwargs(
        compvis.guided_config({**large, "attention_resolutions": "32,16,8"})
    )
    assert wide["widths"] == (128, 256, 256, 512, 512, 1024, 1024)
    assert (wide["time_width"], wide["attention_levels"]) == (256, (4, 5, 6))
    custom = compvis.guided_config({**large, "channel_mult": "0.5,1"})
    assert compvis.module_kwargs(custom)["widths"] == (128, 256)
    with pytest.raises(InputError, match="image_size=96"):
        compvis.guided_config({**large, "image_size": 96})
    with pytest.raises(InputError, match="predict_xstart"):
        compvis.guided_config({**large, "predict_xstart": True})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": 3}, "dims=3 is not supported; expected 2"),
        ({"conv_resample": False}, "conv_resample=False"),
        ({"n_embed": 8192}, "n_embed=8192"),
        ({"num_heads_upsample": 2}, "num_heads_upsample=2 is not supported; expected 4"),
        ({"num_heads": -1}, "num_heads or num_head_channels"),
        ({"new_trick": 1}, "unknown arguments new_trick"),
        ({"out_channels": 5}, "out_channels=5"),
        ({"use_spatial_transformer": True}, "needs a context_dim"),
        (
            {"use_spatial_transformer": True, "context_dim": 8, "num_classes": 3},
            "together with a context",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_built_is_refused_by_name(changes, message):
    with pytest.raises(InputError, match=message):
        compvis.module_kwargs({**BASE, **changes})
    with pytest.raises(InputError, match="UNetModel: model_channels missing"):
        compvis.module_kwargs({k: v for k, v in BASE.items() if k != "model_channels"})
