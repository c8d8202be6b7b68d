"""The integer denoiser: near float at 8 bits, in every mode, back end and kind of site."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff import intercept
from mpqdiff.costs.bytes import device_bytes
from mpqdiff.errors import InputError
from mpqdiff.kernels.quantized_conv import pads
from mpqdiff.kernels.quantized_conv.patches import patches, surround
from mpqdiff.quantize import apply, operate
from mpqdiff.quantize.activations import Table
from mpqdiff.quantize.numerics import activation_scale, quantize_activation


def _eps(model, tiny, t):
    x_t, labels = tiny.inputs
    return np.asarray(jax.jit(model.denoise)(model.params, x_t, t, labels).eps)


def _relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("mode", ["step_table", "static", "online"])
@pytest.mark.parametrize("products", [False, True])
def test_eight_bits_are_close_to_float(tiny, mode, products):
    model = tiny.build(tiny.plan(mode=mode, products=products), products=products)
    found = _eps(model, tiny, np.int32(500))
    expected = np.asarray(tiny.float_eps(np.int32(500)))
    error = _relative(found, expected)
    assert 0 < error < 0.02
    assert found.shape == expected.shape


def test_products_in_integers_are_in_the_program(tiny):
    plan = tiny.plan(products=True)
    model = tiny.build(plan, products=True)
    x_t, labels = tiny.inputs
    program = str(jax.make_jaxpr(model.denoise)(model.params, x_t, np.int32(30), labels))
    weights_alone = tiny.build(tiny.plan())
    without = str(jax.make_jaxpr(weights_alone.denoise)(weights_alone.params, x_t, 30, labels))
    wanted = "preferred_element_type=int32"
    assert program.count(wanted) == without.count(wanted) + 2  # qk and pv


def test_a_batch_of_timesteps_equals_the_scalar(tiny):
    model = tiny.build(tiny.plan((4, 8), products=True), products=True)
    one = _eps(model, tiny, np.int32(500))
    each = _eps(model, tiny, np.full(4, 500, np.int32))
    np.testing.assert_allclose(each, one, rtol=1e-5, atol=1e-6)
    mixed = _eps(model, tiny, np.array([500, 900, 500, 30], np.int32))
    np.testing.assert_allclose(mixed[[0, 2]], one[[0, 2]], rtol=1e-5, atol=1e-6)
    assert _relative(mixed[3], one[3]) > 1e-3


@pytest.mark.parametrize("products", [False, True])
def test_back_ends_agree_on_the_whole_denoiser(tiny, products):
    plan = tiny.plan((2, 4, 8), products=products)
    ours = _eps(tiny.build(plan, products=products), tiny, np.int32(30))
    theirs = _eps(tiny.build(plan, products=products, backend="aqt"), tiny, np.int32(30))
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("backend", "products"), [("pallas_interpret", False), ("pallas_gpu_interpret", True)]
)
@pytest.mark.parametrize("mode", ["step_table", "online"])
def test_a_kernel_of_packed_weights_agrees_on_the_whole_denoiser(tiny, mode, backend, products):
    plan = tiny.plan((2, 4, 8), mode=mode, products=products)
    expected = tiny.build(plan, products=products)
    ours = _eps(expected, tiny, np.int32(30))
    model = tiny.build(plan, products=products, backend=backend)
    np.testing.assert_allclose(_eps(model, tiny, np.int32(30)), ours, rtol=1e-4, atol=1e-4)
    assert model.bytes == expected.bytes


def test_the_gpu_kernels_multiply_the_attention_products_too(tiny):
    x_t, labels = tiny.inputs
    calls = []
    for products in (False, True):
        plan = tiny.plan((2, 4, 8), products=products)
        model = tiny.build(plan, products=products, backend="pallas_gpu_interpret")
        program = jax.make_jaxpr(model.denoise)(model.params, x_t, np.int32(30), labels)
        calls.append(str(program).count("pallas_call"))
    assert calls[1] == calls[0] + 2  # qk and pv


def test_each_module_may_have_a_back_end_of_its_own(tiny):
    plan = tiny.plan((2, 4, 8))
    ours = tiny.build(plan)
    names = ("kernels", "pallas_interpret", "pallas_gpu_interpret")
    named = {path: names[i % 3] for i, path in enumerate(ours.params["sites"])}
    mixed = tiny.build(plan, backend=named)
    np.testing.assert_allclose(
        _eps(mixed, tiny, np.int32(30)), _eps(ours, tiny, np.int32(30)), rtol=1e-4, atol=1e-4
    )
    x_t, labels = tiny.inputs
    program = str(jax.make_jaxpr(mixed.denoise)(mixed.params, x_t, np.int32(30), labels))
    assert program.count("pallas_call") > 1
    with pytest.raises(InputError, match="unknown back end 'tpu'"):
        tiny.build(plan, backend=dict.fromkeys(named, "tpu"))


@pytest.mark.parametrize(("backend", "needed"), [("pallas_tpu", "TPU"), ("pallas_gpu", "GPU")])
def test_a_back_end_that_cannot_run_here_says_so_before_any_work(tiny, backend, needed):
    with pytest.raises(InputError, match=rf"quantize.backend: .*needs an? .*{needed}"):
        tiny.build(tiny.plan(), backend=backend)


def test_bytes_are_what_the_planner_counts(tiny):
    for mode in ("step_table", "static", "online"):
        plan = tiny.plan((2, 3, 4, 8), mode=mode)
        sites = tiny.sites()
        table, flags, _ = tiny.tensors(plan, sites)
        assert any(flags)
        assert not all(flags)
        fixed = apply.fixed_cost(tiny.params, sites, rows=len(table.timesteps))["bytes"]
        expected = fixed + sum(
            device_bytes(site, plan.w_bits[site.path] or 0, flag)
            for site, flag in zip(sites, flags, strict=True)
        )
        assert tiny.build(plan).bytes == expected


def test_a_site_with_null_widths_stays_in_float(tiny):
    plan = tiny.plan((2,))
    every = replace(
        plan,
        w_bits=dict.fromkeys(plan.w_bits),
        a_bits={
            p: {"lhs": None, "rhs": None} if "/qk" in p or "/pv" in p else None for p in plan.a_bits
        },
    )
    model = tiny.build(every)
    assert model.params["sites"] == {}
    np.testing.assert_allclose(
        _eps(model, tiny, np.int32(500)), tiny.float_eps(np.int32(500)), rtol=1e-5, atol=1e-5
    )
    path = "block_0/mlp/fc1"
    partly = replace(plan, w_bits=plan.w_bits | {path: None}, a_bits=plan.a_bits | {path: None})
    model = tiny.build(partly)
    assert path not in model.params["sites"]
    np.testing.assert_array_equal(
        model.params["float"]["block_0"]["mlp"]["fc1"]["kernel"],
        tiny.params["block_0"]["mlp"]["fc1"]["kernel"],
    )
    assert np.isfinite(_eps(model, tiny, np.int32(500))).all()


def test_an_unknown_back_end_lists_the_known_ones(tiny):
    with pytest.raises(InputError, match=r"'cuda'; known: aqt, kernels, pallas"):
        tiny.build(tiny.plan(), backend="cuda")


class _Convolution(nn.Module):
    """One convolution, with whatever arguments it is given."""

    arguments: dict

    @nn.compact
    def __call__(self, x):
        return nn.Conv(5, **self.arguments, name="conv")(x)


def _patch_product(module, x):
    """x through the convolution's patches and its flattened kernel."""
    kernel = module.variables["params"]["kernel"]
    geometry = operate.geometry(module)
    padded = surround(x, pads(x.shape[1:3], **geometry))
    rows = patches(padded, geometry["kernel_size"], geometry["strides"])
    return rows @ kernel.reshape(-1, kernel.shape[-1])


def _through(arguments, x, operation):
    """(the convolution itself, `operation` in its place) of x [B,H,W,C], and the kernel."""
    model = _Convolution(arguments)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]

    def denoise(params, x, t, cond):
        return model.apply({"params": params}, x)

    rewritten = intercept.rewrite(denoise, {"conv": operation})
    return denoise(params, x, 0, None), rewritten(params, x, 0, None), params


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": (3, 3)},
        {"kernel_size": (3, 3), "strides": 2},
        {"kernel_size": (2, 3), "strides": (2, 1), "padding": "VALID"},
        {"kernel_size": (4, 4), "strides": (3, 2), "padding": "SAME"},
        {"kernel_size": (3, 3), "padding": "SAME_LOWER", "strides": 2},
        {"kernel_size": (3, 3), "padding": 2},
        {"kernel_size": (3, 2), "padding": ((0, 2), (1, 0)), "strides": 2},
        {"kernel_size": (3, 3), "padding": (1, (2, 0))},
    ],
    ids=str,
)
def test_patches_times_kernel_are_the_convolution(arguments):
    x = np.random.default_rng(0).standard_normal((2, 9, 7, 3)).astype(np.float32)
    expected, found, _ = _through({**arguments, "use_bias": False}, x, _patch_product)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (0, 1))])
def test_an_asymmetric_convolution_pads_with_real_zero(padding):
    """Against float products of the very integers: padding with q = 0 would miss by z * scale."""
    rng = np.random.default_rng(1)
    x = rng.uniform(-0.1, 3.0, (2, 6, 5, 2)).astype(np.float32)
    arguments = {"kernel_size": (3, 3), "strides": 2, "padding": padding}
    expected, _, params = _through(arguments, x, _patch_product)
    scale, zero = activation_scale(np.float32(-0.1), np.float32(3.0), 8, asymmetric=True)
    assert int(zero) != 0
    tensors = apply.site_tensors(
        params["conv"]["kernel"], params["conv"]["bias"], 8, asymmetric=True, clip="mse"
    )
    site = _site("conv", "conv")
    steps = Table(jnp.zeros(1, jnp.int32), scale[None, None], zero[None, None])

    def denoise(params, x, t, cond):
        return _Convolution(arguments).apply({"params": params}, x)

    integer = apply.integer_denoise(
        denoise,
        [site],
        {"conv": (lambda qvalue: qvalue, operate.quantized_matmul)},
        a_bits={"conv": 8},
    )
    given = {"float": {}, "sites": {"conv": tensors}, "steps": steps}
    found = integer(given, x, np.int32(0), None)
    rounded = (quantize_activation(x, scale, zero, 8).astype(jnp.float32) - zero) * scale
    kernel = (tensors["qvalue"] * tensors["scale"]).reshape(3, 3, 2, 5)
    exact = denoise({"conv": {"kernel": kernel, "bias": tensors["bias"]}}, rounded, 0, None)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)
    assert _relative(found, expected) < 0.02


def _site(path, kind):
    from mpqdiff.sites import Site

    return Site(path, kind, (3, 3, 2, 5), 90, 5, 90, path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": (3, 3), "feature_group_count": 3},
        {"kernel_size": (3, 3), "kernel_dilation": 2},
        {"kernel_size": (3, 3), "padding": "CIRCULAR"},
    ],
    ids=str,
)
def test_other_convolutions_are_refused_by_name(arguments):
    x = np.zeros((1, 6, 6, 3), np.float32)
    if "feature_group_count" in arguments:
        x = np.zeros((1, 6, 6, 5), np.float32)
        arguments = {**arguments, "feature_group_count": 5}
    with pytest.raises(InputError, match=r"conv conv: only ungrouped.*leave this one in float"):
        _through(arguments, x, _patch_product)


def test_a_model_that_folds_axes_into_the_batch_needs_a_scalar_t():
    x = np.zeros((6, 3), np.float32)
    with pytest.raises(InputError, match=r"'a/b': 2 timesteps for 6 rows.*shape \[\]"):
        operate._against(np.ones(2), x, "a/b")
    assert operate._against(np.ones(6), x, "a/b").shape == (6, 1)
