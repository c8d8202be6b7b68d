"""Observation and rewriting: what is hit, how it is named, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff import intercept, sites
from mpqdiff.denoiser import Prediction, from_linen
from mpqdiff.errors import InputError
from mpqdiff.models.product import Product


class Small(nn.Module):
    """Every kind of site; `shared` is called twice."""

    @nn.compact
    def __call__(self, x_t, t, label):
        batch = x_t.shape[0]
        x = nn.Conv(4, (2, 2), name="conv")(x_t).reshape(batch, -1, 4)
        x = x + nn.Embed(3, 4, name="embed")(label)[:, None]
        shared = nn.Dense(4, name="shared")
        x = shared(nn.relu(shared(x)))
        mixed = Product("bpd,bqd->bpq", name="pairs")(x, x)
        return Prediction(nn.Dense(1, name="last")(mixed @ x + 0.01 * t).reshape(x_t.shape))


PATHS = ["conv", "embed", "shared", "shared#1", "pairs", "last"]
X, T, LABELS = jnp.linspace(-1, 1, 18).reshape(2, 3, 3, 1), jnp.int32(4), jnp.array([0, 2])


@pytest.fixture(scope="module")
def small():
    module = Small()
    return from_linen(module), module.init(jax.random.key(0), X, T, LABELS)["params"]


def output(path, module, kind, args, out):
    return out


def test_every_kind_is_hit_once_per_call_in_order(small):
    denoise, params = small
    seen = []
    observed = intercept.observe(
        denoise, lambda path, m, kind, args, out: seen.append((path, kind))
    )
    prediction, taken = observed(params, X, T, LABELS)
    assert [path for path, _ in seen] == PATHS and taken == {}
    assert dict(seen)["conv"] == "conv" and dict(seen)["embed"] == "embedding"
    assert dict(seen)["shared#1"] == "dense" and dict(seen)["pairs"] == "product"
    np.testing.assert_array_equal(prediction.eps, denoise(params, X, T, LABELS).eps)


def test_operands_and_outputs_are_those_of_the_call(small):
    denoise, params = small

    def difference(path, module, kind, args, out):
        if kind != "dense":
            return None
        leaves = module.variables["params"]
        return jnp.abs(args[0] @ leaves["kernel"] + leaves["bias"] - out).max()

    _, taken = intercept.observe(denoise, difference)(params, X, T, LABELS)
    assert taken.keys() == {"shared", "shared#1", "last"}
    assert max(taken.values()) < 1e-6


def test_an_apply_jitted_before_is_not_reused(small):
    denoise, params = small
    jitted = jax.jit(denoise)
    before = jitted(params, X, T, LABELS).eps
    _, taken = jax.jit(intercept.observe(denoise, output))(params, X, T, LABELS)
    assert list(taken) == sorted(PATHS)  # a jitted function returns dicts in key order
    zero = {"last": lambda module, x: jnp.zeros((*x.shape[:-1], 1))}
    after = jax.jit(intercept.rewrite(denoise, zero))(params, X, T, LABELS).eps
    assert np.asarray(before).any() and not np.asarray(after).any()
    np.testing.assert_array_equal(jitted(params, X, T, LABELS).eps, before)


def test_a_denoise_that_is_itself_jitted_is_refused_never_skipped(small):
    denoise, params = small
    fresh = jax.jit(lambda *call: denoise(*call))
    with pytest.raises(InputError, match=r"'conv' lies inside .* a jitted function"):
        intercept.observe(fresh, output)(params, X, T, LABELS)
    used = jax.jit(lambda *call: denoise(*call))
    used(params, X, T, LABELS)  # now its trace is cached, and interception would see nothing
    with pytest.raises(InputError, match=r"never called .*'shared#1'"):
        intercept.observe(used, output, paths=PATHS)(params, X, T, LABELS)
    with pytest.raises(InputError, match="never called"):
        intercept.rewrite(used, {"last": lambda module, x: x})(params, X, T, LABELS)
    with pytest.raises(InputError, match="not jitted"):
        sites.list_sites(used, params, X, T, LABELS)


def test_hits_must_equal_the_given_paths(small):
    denoise, params = small
    intercept.observe(denoise, output, paths=PATHS)(params, X, T, LABELS)
    with pytest.raises(InputError, match=r"never called \['ghost'\], not in the list \['conv'\]"):
        intercept.observe(denoise, output, paths=[*PATHS[1:], "ghost"])(params, X, T, LABELS)


def test_rewrite_replaces_one_call_of_a_shared_module(small):
    denoise, params = small
    seen = {}

    def operation(module, x):
        seen["x"] = x
        return jnp.full((*x.shape[:-1], module.features), 7.0)

    rewritten = intercept.rewrite(denoise, {"shared#1": operation})
    _, taken = intercept.observe(rewritten, output)(params, X, T, LABELS)
    _, plain = intercept.observe(denoise, output)(params, X, T, LABELS)
    np.testing.assert_array_equal(seen["x"], nn.relu(plain["shared"]))
    np.testing.assert_array_equal(taken["pairs"], np.full((2, 9, 9), 4 * 49.0))


def test_a_rewritten_site_needs_no_parameters(small):
    denoise, params = small
    kernel, bias = params["last"]["kernel"], params["last"]["bias"]
    rest = {name: leaves for name, leaves in params.items() if name != "last"}
    same = intercept.rewrite(denoise, {"last": lambda module, x: x @ kernel + bias})
    np.testing.assert_allclose(
        same(rest, X, T, LABELS).eps, denoise(params, X, T, LABELS).eps, rtol=1e-5, atol=1e-6
    )


def test_a_path_that_is_never_called_is_an_error(small):
    denoise, params = small
    with pytest.raises(InputError, match=r"never called \['shared#2'\]"):
        intercept.rewrite(denoise, {"shared#2": lambda module, x: x})(params, X, T, LABELS)


def test_a_rewritten_site_is_named_in_the_program(small):
    denoise, params = small
    same = intercept.rewrite(
        denoise, {"pairs": lambda module, a, b: jnp.einsum("bpd,bqd->bpq", a, b)}
    )
    text = jax.jit(same).lower(params, X, T, LABELS).compile().as_text()
    assert intercept.scope("pairs") in text


class ByName(nn.Module):
    @nn.compact
    def __call__(self, x_t, t, label):
        x = nn.Dense(3, name="dense")(inputs=x_t)
        return Product("bhwc,bhwd->bcd", name="cov")(rhs=x[..., :1], lhs=x)


def test_operands_given_by_name_arrive_in_order():
    module = ByName()
    params = module.init(jax.random.key(0), X, T, LABELS)["params"]
    shapes = {}
    intercept.observe(
        from_linen(module),
        lambda path, m, k, args, out: shapes.update({path: [a.shape for a in args]}),
    )(params, X, T, LABELS)
    assert shapes == {"dense": [(2, 3, 3, 1)], "cov": [(2, 3, 3, 3), (2, 3, 3, 1)]}
    double = {"dense": lambda m, x: jnp.repeat(2 * x, 3, axis=-1)}
    out = intercept.rewrite(from_linen(module), double)(params, X, T, LABELS).eps
    np.testing.assert_allclose(out[:, 0, 0], 4 * jnp.sum(X**2, axis=(1, 2, 3)), rtol=1e-5)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(x.shape[-1], name="fc")(x), None


TRANSFORMS = {
    "scan": lambda: nn.scan(
        Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    ),
    "remat": lambda: nn.remat(Layer),
    "jit": lambda: nn.jit(Layer),
    "vmap": lambda: nn.vmap(
        Layer, in_axes=(0, None), variable_axes={"params": None}, split_rngs={"params": False}
    ),
}


class Wrapped(nn.Module):
    transform: str

    @nn.compact
    def __call__(self, x_t, t, label):
        x = nn.Dense(4, name="first")(x_t)
        x, _ = TRANSFORMS[self.transform]()(name="layer")(x, None)
        return x


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_sites_inside_a_transform_are_refused_by_name(transform, jit):
    module = Wrapped(transform)
    params = module.init(jax.random.key(0), X, T, LABELS)["params"]
    denoise = from_linen(module)
    denoise(params, X, T, LABELS)  # whatever the transform caches, it has cached now
    observed = intercept.observe(denoise, output)
    with pytest.raises(InputError, match="site 'layer/fc' lies inside"):
        (jax.jit(observed) if jit else observed)(params, X, T, LABELS)
    with pytest.raises(InputError, match="site 'layer/fc' lies inside"):
        sites.list_sites(denoise, params, X[:1], T, LABELS[:1])
