"""The U-Net: golden counts, closure of its sites, its conventions, and integers in its place."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mpqdiff import record, weights
from mpqdiff import sites as site_list
from mpqdiff.denoiser import from_linen
from mpqdiff.errors import InputError
from mpqdiff.models.embeddings import sinusoid
from mpqdiff.models.unet import UNet, check, parameter_shapes
from mpqdiff.models.unet_blocks import SkipConcat, double, halve
from mpqdiff.plan import Plan
from mpqdiff.quantize import activations, apply
from mpqdiff.records import Statistics

CIFAR10 = dict(
    image_size=32,
    channels=3,
    widths=(128, 256, 256, 256),
    attention_levels=(1,),
    down_padding="end",
    cos_first=False,
    frequency_shift=1,
    norm_eps=1e-6,
)
TINY = dict(image_size=8, channels=2, widths=(8, 16), blocks_per_level=1, groups=4)
VARIANTS = {
    "ddpm": dict(attention_levels=(1,), down_padding="end", cos_first=False, frequency_shift=1),
    "adm": dict(
        attention_levels=(1,),
        num_heads=2,
        scale_shift=True,
        resample_in_blocks=True,
        learn_variance=True,
        condition="label",
        num_classes=3,
    ),
    "context": dict(attention_levels=(0, 1), condition="context", context_width=6, num_heads=2),
    "labels as context": dict(
        attention_levels=(0,),
        condition="label_context",
        context_width=6,
        num_classes=3,
        transformer_depth=(2, 1),
    ),
}


def built(name, **changes):
    unet = UNet(**{**TINY, **VARIANTS[name], **changes})
    check(unet)
    return unet


def randomised(unet, seed=0):
    """Parameters without the zero initialisation, so that every path carries signal."""
    rng = np.random.default_rng(seed)
    flat = {
        path: np.asarray(
            path.endswith("scale") + rng.standard_normal(shape) * math.prod(shape[:-1]) ** -0.5,
            np.float32,
        )
        for path, shape in parameter_shapes(unet).items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def inputs(unet, batch=4, seed=1):
    rng = np.random.default_rng(seed)
    x_t = rng.standard_normal((batch, 8, 8, unet.channels)).astype(np.float32)
    if unet.condition == "context":
        return x_t, rng.standard_normal((batch, 5, unet.context_width)).astype(np.float32)
    return x_t, np.arange(batch, dtype=np.int32) % 3


def compiled(function):
    # The programs run once: what they save by being optimised is less than it takes.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def outputs(unet, params, x_t, t, cond):
    return compiled(from_linen(unet))(params, x_t, t, cond)


def eps(unet, params, x_t, t, cond):
    return np.asarray(outputs(unet, params, x_t, t, cond).eps)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def listed(unet, cond):
    flat = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, shape in parameter_shapes(unet).items()
    }
    x_t, t, _ = site_list.example_inputs((unet.image_size,) * 2 + (unet.channels,))
    params = traverse_util.unflatten_dict(flat, sep="/")
    return site_list.list_sites(from_linen(unet), params, x_t, t, cond)


def test_the_cifar_10_network_of_ddpm():
    unet = UNet(**CIFAR10)
    check(unet)
    assert sum(math.prod(shape) for shape in parameter_shapes(unet).values()) == 35_746_307
    found, remainder = listed(unet, unet.example_inputs()[2])
    assert remainder == []
    macs = {"product": 0, "weights": 0}
    for site in found:
        macs["product" if site.kind == "product" else "weights"] += site.macs
    assert macs["weights"] / 1e9 == pytest.approx(6.054, abs=0.0005)
    # Six attentions at 16 x 16 x 256 (and one at 4 x 4): 0.084 G for each of the two products.
    assert macs["product"] == 2 * 256 * (5 * 256**2 + 16**2)
    assert macs["product"] / 2e9 == pytest.approx(0.084, abs=0.0005)


@pytest.mark.parametrize("name", VARIANTS)
def test_sites_close_and_skips_have_paths(name):
    unet = built(name)
    found, remainder = listed(unet, jax.eval_shape(lambda: inputs(unet, 1)[1]))
    assert remainder == []
    kinds = {site.path: site.kind for site in found}
    assert kinds["down_1_res_0/shortcut"] == "conv"
    resample = "down_0_resample" + ("/conv1" if unet.resample_in_blocks else "")
    assert kinds[resample] == "conv"
    products = {path for path, kind in kinds.items() if kind == "product"}
    crossed = unet.context_width is not None
    self_attention = "mid_attn/block_0/attn1" if crossed else "mid_attn/attn"
    assert {f"{self_attention}/qk", f"{self_attention}/pv"} <= products
    # Attention to one token has no products, and attention to a context has.
    assert ("mid_attn/block_0/attn2/qk" in products) == (unet.condition == "context")
    seen = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, SkipConcat) and context.method_name == "__call__":
            seen.append(("/".join(context.module.path), *(arg.shape[-1] for arg in args)))
        return call(*args, **kwargs)

    (x_t, cond), params = inputs(unet, 1), randomised(unet)
    with nn.intercept_methods(watch):
        jax.eval_shape(from_linen(unet), params, x_t, 0, cond)
    assert seen == [
        ("up_1_skip_0", 16, 16),
        ("up_1_skip_1", 16, 8),
        ("up_0_skip_0", 16, 8),
        ("up_0_skip_1", 8, 8),
    ]


@pytest.mark.parametrize("name", ["ddpm", "context"])
def test_a_weights_file_rebuilds_it(tmp_path, name):
    kwargs = {**TINY, **VARIANTS[name]}
    params = randomised(UNet(**kwargs))
    weights.save(
        tmp_path / "u.safetensors",
        params,
        model={"name": "unet", "kwargs": kwargs},
        dtype=np.float32,
    )
    module, loaded, _ = weights.load(str(tmp_path / "u.safetensors"))
    assert parameter_shapes(module) == parameter_shapes(UNet(**kwargs))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_at_initialisation_the_output_is_zero():
    unet = built("adm")
    x_t, cond = inputs(unet)
    params = compiled(unet.init)(jax.random.key(0), x_t, jnp.zeros(4, int), cond)["params"]
    out = outputs(unet, params, x_t, 5, cond)
    assert not np.asarray(out.eps).any()
    assert not np.asarray(out.log_variance).any()


@pytest.mark.parametrize("name", ["adm", "labels as context"])
def test_timesteps_and_conditions_reach_the_output_by_sample(name):
    unet = built(name)
    params = randomised(unet)
    x_t, cond = inputs(unet)
    assert cond.tolist() == [0, 1, 2, 0]
    one = eps(unet, params, x_t, jnp.int32(37), cond)
    assert one.shape == x_t.shape
    mixed = eps(unet, params, x_t, jnp.array([37, 500, 37, 37]), cond)
    np.testing.assert_allclose(mixed[[0, 2, 3]], one[[0, 2, 3]], rtol=1e-3, atol=1e-4)
    assert relative(mixed[1], one[1]) > 1e-2
    null = eps(unet, params, x_t, jnp.int32(37), np.array([3, 1, 2, 0], np.int32))
    np.testing.assert_allclose(null[1:], one[1:], rtol=1e-3, atol=1e-4)
    assert relative(null[0], one[0]) > 1e-2


def test_learned_variance_is_the_second_half_of_the_channels():
    unet = built("adm")
    params = randomised(unet)
    x_t, cond = inputs(unet)
    out = outputs(unet, params, x_t, 5, cond)
    assert out.log_variance.shape == x_t.shape
    params["conv_out"] = {
        "kernel": params["conv_out"]["kernel"][..., :2],
        "bias": params["conv_out"]["bias"][:2],
    }
    alone = outputs(built("adm", learn_variance=False), params, x_t, 5, cond)
    assert alone.log_variance is None
    np.testing.assert_allclose(alone.eps, out.eps, rtol=1e-4, atol=1e-5)


def test_half_precision_stays_half_precision():
    unet = built("adm")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), randomised(unet))
    x_t, cond = inputs(unet)
    out = jax.eval_shape(from_linen(unet), half, x_t.astype(jnp.bfloat16), 5, cond)
    assert out.eps.dtype == jnp.bfloat16


def test_sinusoids_by_hand():
    t = np.array([0, 10, 999])
    ddpm = np.asarray(sinusoid(t, 8, cos_first=False, frequency_shift=1))
    adm = np.asarray(sinusoid(t, 8))
    for i in range(4):
        last_is_1e_4 = t * 10000.0 ** (-i / 3)
        np.testing.assert_allclose(ddpm[:, i], np.sin(last_is_1e_4), atol=1e-4)
        np.testing.assert_allclose(ddpm[:, 4 + i], np.cos(last_is_1e_4), atol=1e-4)
        slower = t * 10000.0 ** (-i / 4)
        np.testing.assert_allclose(adm[:, i], np.cos(slower), atol=1e-4)
        np.testing.assert_allclose(adm[:, 4 + i], np.sin(slower), atol=1e-4)


def test_resampling_by_hand():
    x = np.arange(16.0).reshape(1, 4, 4, 1)
    assert halve(x)[0, :, :, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert double(jnp.asarray(x[:, :2, :2]))[0, :, :, 0].tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [4, 4, 5, 5],
        [4, 4, 5, 5],
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"condition": "text"},
            "unet condition 'text'; known: context, label, label_context, none",
        ),
        ({"down_padding": "same"}, "unet down_padding 'same'; known: both, end"),
        ({"attention_scale": "key"}, "unet attention_scale 'key'"),
        ({"num_heads": (1, 2, 4)}, r"num_heads=\(1, 2, 4\)"),
        ({"transformer_depth": 0}, "transformer_depth=0: every count must be positive"),
        ({"widths": ()}, "widths"),
        ({"blocks_per_level": 0}, "blocks_per_level=0"),
        ({"image_size": 7}, "image_size=7 must be a multiple of 2"),
        ({"groups": 3}, "multiples of groups=3"),
        ({"attention_levels": (2,)}, r"attention_levels=\(2,\) must lie in 0..1"),
        ({"num_heads": 3}, "16 of level 1"),
        ({"time_width": 5}, "time_width=5 must be even"),
        ({"time_width": 2, "frequency_shift": 1}, "time_width=2"),
        ({"condition": "context"}, "context_width=None"),
        ({"context_width": 4}, "context_width=4"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_fields_that_do_not_fit_together(changes, message):
    check(UNet(**TINY))
    with pytest.raises(InputError, match=message):
        check(UNet(**{**TINY, **changes}))


def test_in_integers_it_is_close_to_float():
    """Convolutions (3 x 3, strided, 1 x 1), dense layers and products by the packed path."""
    unet = built("context", widths=(8, 8), attention_levels=(1,), down_padding="end")
    params, denoise = randomised(unet), from_linen(unet)
    x_t, cond = inputs(unet)
    every, _ = site_list.list_sites(denoise, params, x_t[:1], jnp.int32(0), cond[:1])
    sites = site_list.planned(every, products=True)
    assert {site.kind for site in sites} == {"conv", "dense", "product"}
    t = np.int32(500)
    row = compiled(record.one_timestep(denoise, sites, grams=False))(
        params, x_t, np.full(4, t), cond
    )
    stats = Statistics(
        np.array([t]),
        *[None] * 5,
        np.asarray(row["input_min"])[None],
        np.asarray(row["input_max"])[None],
    )
    expected = eps(unet, params, x_t, t, cond)

    def error(widths):
        bits = {site.path: widths[i % len(widths)] for i, site in enumerate(sites)}
        pair = {"lhs": 8, "rhs": 8}
        plan = Plan(
            model={"hash": "tiny"},
            w_bits={s.path: None if s.kind == "product" else bits[s.path] for s in sites},
            a_bits={s.path: pair if s.kind == "product" else 8 for s in sites},
            mode="static",
            groups=((500, 500),),
            timesteps=(500,),
            system="test",
        )
        steps = activations.table(stats, sites, mode="static", a_bits=plan.a_bits)
        flags = activations.lopsided(stats, sites)
        tensors = apply.quantize(params, sites, plan, steps, flags)
        assert len(tensors) == sum(site.kind != "product" for site in sites)
        model = apply.build(denoise, params, sites, plan, tensors, steps)
        found = compiled(model.denoise)(model.params, x_t, t, cond).eps
        return relative(np.asarray(found), expected)

    eight, mixed = error((8,)), error((8, 4))
    assert 0 < eight < 0.06  # about 50 sites one after the other, each off by under 1 %
    assert 2 * eight < mixed < 1
