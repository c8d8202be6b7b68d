"""The site list: kinds, MACs by hand, closure, pins."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from mpqdiff import models, sites, weights
from mpqdiff.denoiser import from_linen
from mpqdiff.errors import InputError
from mpqdiff.models.product import Product


class Mixed(nn.Module):
    """Sites and, beside them, products that no interception sees."""

    @nn.compact
    def __call__(self, x_t, t, label):
        x = nn.Conv(6, (3, 3), strides=2, feature_group_count=2, name="conv")(x_t)  # 8x8x4 -> 4x4x6
        x = x.reshape(1, 16, 6) + nn.Embed(3, 6, name="embed")(label)[:, None]
        shared = nn.Dense(6, use_bias=False, name="shared")
        x = shared(shared(x))
        scores = Product("bpd,bqd->bpq", name="pairs")(x, x)
        x = Raw(name="raw")(scores @ x)
        x = nn.DenseGeneral(5, name="general")(x)
        x, _ = jax.lax.scan(lambda h, _: (h @ jnp.ones((5, 5)), None), x, None, length=7)
        return x


class Raw(nn.Module):
    """A product of an input and a parameter of its own, and a Dense inside the same module."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (6, 6))
        return nn.Dense(6, name="shared")(jnp.einsum("bpd,de->bpe", x, w))


def listed(module, shape):
    x_t, t, label = sites.example_inputs(shape)
    params = jax.eval_shape(
        lambda key: module.init(key, jnp.zeros((1, *shape)), 0, jnp.zeros((1,), int)),
        jax.random.key(0),
    )["params"]
    return sites.list_sites(from_linen(module), params, x_t, t, label)


def test_macs_shapes_and_ties_by_hand():
    found, _ = listed(Mixed(), (8, 8, 4))
    table = {s.path: (s.kind, s.shape, s.parameters, s.bias, s.macs, s.tie) for s in found}
    assert table == {
        "conv": ("conv", (3, 3, 2, 6), 108, 6, 4 * 4 * 108, "conv"),
        "embed": ("embedding", (3, 6), 18, 0, 0, "embed"),
        "shared": ("dense", (6, 6), 36, 0, 16 * 36, "shared"),
        "shared#1": ("dense", (6, 6), 36, 0, 16 * 36, "shared"),
        "pairs": ("product", (), 0, 0, 16 * 16 * 6, "pairs"),
        "raw/shared": ("dense", (6, 6), 36, 6, 16 * 36, "raw/shared"),
    }


def test_every_other_product_is_listed_with_its_macs():
    _, remainder = listed(Mixed(), (8, 8, 4))
    by_macs = {entry.macs: entry.name for entry in remainder}
    # In the model itself scores @ x and a scan of 7 products; the einsum of `raw`; DenseGeneral.
    assert by_macs.keys() == {16 * 16 * 6 + 7 * 16 * 5 * 5, 16 * 6 * 6, 16 * 6 * 5}
    assert "raw" in by_macs[16 * 6 * 6] and "general" in by_macs[16 * 6 * 5]


class Namesakes(nn.Module):
    """A raw product in a module whose last name is that of a site elsewhere."""

    @nn.compact
    def __call__(self, x_t, t, label):
        return Inner(name="proj")(nn.Dense(2, name="out")(x_t))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Leaf(name="out")(x)


class Leaf(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.ones, (2, 2))


def test_a_raw_product_is_not_hidden_by_a_site_of_the_same_name():
    found, remainder = listed(Namesakes(), (3, 3, 1))
    assert [site.path for site in found] == ["out"]
    assert [entry.macs for entry in remainder] == [9 * 2 * 2]
    assert "proj/out" in remainder[0].name and "from_flax" in remainder[0].reason


class LowRank(nn.Dense):
    """A Dense with an addition of its own (9 + 18 MACs): rewritten as a Dense it would lose it."""

    @nn.compact
    def __call__(self, inputs):
        a = self.param("a", nn.initializers.ones, (inputs.shape[-1], 1))
        b = self.param("b", nn.initializers.ones, (1, self.features))
        return super().__call__(inputs) + inputs @ a @ b


class Adapted(nn.Module):
    @nn.compact
    def __call__(self, x_t, t, label):
        return LowRank(2, name="lora")(x_t)


def test_a_site_that_does_more_than_its_own_product_is_refused():
    with pytest.raises(InputError, match="do not close at site 'lora': 45 traced, 18 expected"):
        listed(Adapted(), (3, 3, 1))


class NoSites(nn.Module):
    @nn.compact
    def __call__(self, x_t, t, label):
        return x_t * self.param("gain", nn.initializers.ones, ())


def test_a_model_without_sites_is_refused():
    with pytest.raises(InputError, match="no Dense, Conv, Product or Embed"):
        listed(NoSites(), (3, 3, 1))


@pytest.fixture(scope="module")
def dit():
    module = models.build(
        "dit", image_size=8, channels=1, patch=4, width=16, depth=2, num_heads=2, num_classes=3
    )
    params = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    found, remainder = sites.list_sites(
        from_linen(module), params, *sites.example_inputs((8, 8, 1))
    )
    assert remainder == []
    return found


def test_dit_macs_equal_the_closed_form(dit):
    tokens, d, depth = 4, 16, 2
    block = tokens * 12 * d * d + 2 * tokens**2 * d + 6 * d * d
    ends = tokens * 16 * d * 2 + 256 * d + d * d + 2 * d * d
    assert sum(site.macs for site in dit) == depth * block + ends


def test_planned_sites_have_weights_and_products_only_where_asked_for(dit):
    assert {site.kind for site in sites.planned(dit)} == {"dense", "conv"}
    assert {site.kind for site in sites.planned(dit, products=True)} == {"dense", "conv", "product"}


def test_pins_match_whole_paths(dit):
    pinned = sites.pin(dit, [("patch_embed|final", 8), (r"block_0/.*", 6)])
    widths = {site.path: site.pin for site in pinned}
    assert widths["patch_embed"] == widths["final"] == 8
    assert widths["final_adaln"] is None and widths["block_1/adaln"] is None
    assert {widths[p] for p in widths if p.startswith("block_0/")} == {6}
    assert all(site.pin is None for site in dit)


def test_pins_that_cannot_hold(dit):
    with pytest.raises(InputError, match=r"pin 'fin' matches no site; sites: .*final"):
        sites.pin(dit, [("fin", 8)])
    with pytest.raises(InputError, match=r"'final' is pinned to \[4, 8\]"):
        sites.pin(dit, [("final.*", 8), ("final", 4)])
    assert sites.pin(dit, [("final", 8), ("final.*", 8)])[-1].pin == 8


def test_ties_join_what_a_pattern_captures_alike(dit):
    tied = sites.tie(dit, [r"(block_\d+)/attn/(?:qkv|proj)"])
    ties = {site.path: site.tie for site in tied}
    assert ties["block_0/attn/qkv"] == ties["block_0/attn/proj"] == "block_0/attn/qkv"
    assert ties["block_1/attn/proj"] == "block_1/attn/qkv"
    assert ties["final"] == "final"
    whole = {site.path: site.tie for site in sites.tie(dit, [r"block_\d+/mlp/.*"])}
    assert len({tie for path, tie in whole.items() if "/mlp/" in path}) == 1
    for pattern in ("final", "nowhere"):
        with pytest.raises(InputError, match=f"tie {pattern!r} matches no two sites together"):
            sites.tie(dit, [pattern])
