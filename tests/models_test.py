"""The diffusion transformer: the paper's sizes, its initialisation, and its input conventions."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mpqdiff import models, sites, weights
from mpqdiff.denoiser import from_linen
from mpqdiff.errors import InputError
from mpqdiff.models import DIT_SIZES
from mpqdiff.models.dit import sincos_2d, timestep_sinusoid

TINY = dict(image_size=8, channels=1, patch=4, width=16, depth=2, num_heads=2, num_classes=3)
# Parameters with the fixed position table, as facebookresearch/DiT counts them (32 x 32 latents).
PARAMETERS = {
    ("S", 2): 32_963_360,
    ("S", 4): 32_945_024,
    ("S", 8): 33_148_160,
    ("B", 2): 130_512_416,
    ("L", 4): 458_053_760,
    ("XL", 2): 675_129_632,
}
# (size, patch, latent): 10^9 MACs per image; the paper's "Gflops".
GMACS = {("S", 2, 32): 6.06, ("B", 4, 32): 5.57, ("S", 2, 64): 31.4, ("XL", 2, 32): 118.62}


def published(size, patch, latent=32):
    return models.build(
        "dit",
        image_size=latent,
        channels=4,
        patch=patch,
        num_classes=1000,
        learn_variance=True,
        **DIT_SIZES[size],
    )


def shapes(module):
    return jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))


def randomised(module, seed=0):
    """Parameters without the zero initialisation, so that every path carries signal."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.2, jnp.float32), shapes(module)
    )


def inputs(batch=3, seed=1):
    x_t = np.random.default_rng(seed).normal(size=(batch, 8, 8, 1))
    return jnp.asarray(x_t, jnp.float32), jnp.arange(batch, dtype=jnp.int32) % 3


@pytest.fixture(scope="module")
def tiny():
    module = models.build("dit", **TINY)
    return from_linen(module), randomised(module)


@pytest.mark.parametrize(("size", "patch"), PARAMETERS)
def test_parameter_counts_of_the_paper(size, patch):
    count = sum(prod(leaf.shape) for leaf in jax.tree.leaves(shapes(published(size, patch))))
    table = (32 // patch) ** 2 * DIT_SIZES[size]["width"]
    assert count + table == PARAMETERS[size, patch]


@pytest.mark.parametrize(("size", "patch", "latent"), GMACS)
def test_macs_of_the_paper_and_nothing_left_out(size, patch, latent):
    module = published(size, patch, latent)
    found, remainder = sites.list_sites(
        from_linen(module), shapes(module), *sites.example_inputs((latent, latent, 4))
    )
    total = sum(site.macs for site in found) / 1e9
    assert remainder == []
    assert total == pytest.approx(GMACS[size, patch, latent], abs=0.05 if latent == 64 else 0.005)


def test_at_initialisation_the_output_is_zero_and_the_blocks_do_nothing():
    module = models.build("dit", **TINY)
    params = weights.initialise(module, jax.random.key(0))
    x_t, labels = inputs()
    assert not np.asarray(from_linen(module)(params, x_t, jnp.int32(5), labels).eps).any()
    # adaLN-Zero: also with a final layer that is not zero, the blocks leave x as it is.
    params["final"]["kernel"] = jnp.ones_like(params["final"]["kernel"]).at[0].set(2.0)
    shallow = {name: leaves for name, leaves in params.items() if name != "block_1"}
    short = models.build("dit", **{**TINY, "depth": 1})
    deep = from_linen(module)(params, x_t, jnp.int32(5), labels).eps
    one = from_linen(short)(shallow, x_t, jnp.int32(5), labels).eps
    assert np.asarray(deep).any()
    np.testing.assert_array_equal(deep, one)


def test_scalar_t_equals_the_same_t_for_every_sample(tiny):
    denoise, params = tiny
    x_t, labels = inputs()
    one = denoise(params, x_t, jnp.int32(37), labels).eps
    many = denoise(params, x_t, jnp.full((3,), 37, jnp.int32), labels).eps
    np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-6)
    other = denoise(params, x_t, jnp.array([37, 37, 500]), labels).eps
    np.testing.assert_allclose(other[:2], one[:2], rtol=1e-5, atol=1e-6)
    assert not np.allclose(other[2], one[2], atol=1e-3)


def test_the_null_class_is_a_row_of_its_own(tiny):
    denoise, params = tiny
    assert params["label_embed"]["embedding"].shape == (TINY["num_classes"] + 1, 16)
    x_t = jnp.repeat(inputs(1)[0], 4, axis=0)
    eps = np.asarray(denoise(params, x_t, jnp.int32(5), jnp.arange(4)).eps)
    for a in range(4):
        for b in range(a):
            assert not np.allclose(eps[a], eps[b], atol=1e-4), (a, b)


def test_learned_variance_splits_the_channels():
    module = models.build("dit", **TINY, learn_variance=True)
    params = randomised(module)
    x_t, labels = inputs()
    out = from_linen(module)(params, x_t, jnp.int32(5), labels)
    assert out.eps.shape == out.log_variance.shape == x_t.shape
    # The last layer's outputs run over (row, column, channel), channel fastest: odd ones are
    # the variance, so zeroing them leaves eps alone.
    kernel, bias = params["final"]["kernel"], params["final"]["bias"]
    params["final"] = {"kernel": kernel.at[:, 1::2].set(0), "bias": bias.at[1::2].set(0)}
    zeroed = from_linen(module)(params, x_t, jnp.int32(5), labels)
    assert not np.asarray(zeroed.log_variance).any()
    np.testing.assert_array_equal(zeroed.eps, out.eps)


def test_pixels_leave_in_the_place_where_they_came_in():
    """With identity-like ends, the image comes back: patches are not transposed on the way."""
    module = models.build("dit", **{**TINY, "depth": 1})
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes(module))
    kernel = np.zeros((4, 4, 1, 16), np.float32)
    for i in range(16):
        kernel[i // 4, i % 4, 0, i] = 1e4  # so large that the position table does not matter
    params["patch_embed"]["kernel"] = jnp.asarray(kernel)
    params["final"]["kernel"] = jnp.eye(16)
    x_t, labels = inputs()
    eps = np.asarray(from_linen(module)(params, x_t, jnp.int32(0), labels).eps)
    patches = np.asarray(x_t).reshape(3, 2, 4, 2, 4, 1)
    mean, std = (f(patches, axis=(2, 4), keepdims=True) for f in (np.mean, np.std))
    np.testing.assert_allclose(eps, ((patches - mean) / std).reshape(eps.shape), atol=2e-3)


def test_bfloat16_inputs_and_weights_stay_in_bfloat16(tiny):
    denoise, params = tiny
    x_t, labels = inputs()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    program = jax.make_jaxpr(denoise)(half, x_t.astype(jnp.bfloat16), jnp.int32(5), labels)
    products = [e for e in equations(program.jaxpr) if e.primitive.name in PRODUCTS]
    assert len(products) > 10
    assert {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype("bfloat16")}
    assert program.out_avals[0].dtype == jnp.bfloat16


PRODUCTS = ("dot_general", "conv_general_dilated")


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_position_table_codes_columns_first_then_rows():
    table = sincos_2d(3, 8)  # row-major tokens; frequencies 1 and 1/100
    row, column = 2, 1
    angles = [np.sin, np.cos]
    expected = [f(place / w) for place in (column, row) for f in angles for w in (1.0, 100.0)]
    np.testing.assert_allclose(table[row * 3 + column], expected, rtol=1e-6)


def test_timestep_sinusoid_has_cosines_first():
    got = timestep_sinusoid(jnp.array([0, 3]), 4)
    np.testing.assert_allclose(got[0], [1, 1, 0, 0])
    np.testing.assert_allclose(
        got[1], [np.cos(3), np.cos(0.03), np.sin(3), np.sin(0.03)], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 3}, "multiple of patch=3"),
        ({"num_heads": 3}, "width=16 of 4 \\* num_heads"),
        ({"patch": 0}, "must be positive"),
        ({"depth": -1}, "must be positive"),
        ({"colour": 1}, "colour"),
    ],
)
def test_unusable_sizes(change, message):
    with pytest.raises(InputError, match=message):
        models.build("dit", **{**TINY, **change})


def test_unknown_model_and_missing_argument():
    with pytest.raises(InputError, match="unknown model 'gan'; known: autoencoder_kl, dit"):
        models.build("gan")
    with pytest.raises(InputError, match="image_size"):
        models.build("dit", patch=4)


def test_parameter_paths_are_the_ones_that_plans_name():
    flat = traverse_util.flatten_dict(shapes(models.build("dit", **TINY)), sep="/")
    sample = {"patch_embed/kernel", "t_embed/fc1/kernel", "block_1/attn/qkv/kernel", "final/bias"}
    assert sample < flat.keys()
