"""What is known never to be negative, what must not be taken for it, and what a product does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpqdiff
from mpqdiff.program import signs


def exchanged(x):
    """x, by way of a loop that starts with exp(x) in its place."""
    return jax.lax.scan(lambda pair, _: (pair[::-1], None), (x, jnp.exp(x)), length=2)[0][0]


# By name: a function of any x [4,4], and whether it is known not to be negative.
FUNCTIONS = {
    "softmax": (nn.softmax, True),
    "masked softmax": (lambda x: nn.softmax(x, where=jnp.tri(4, dtype=bool)), True),
    "by hand": (lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True), True),
    "moved": (lambda x: nn.sigmoid(x).T.reshape(2, 8).astype(jnp.bfloat16)[:, 1:], True),
    "jitted": (jax.jit(lambda x: jax.jit(nn.relu)(x) + 1), True),
    "rematerialised": (jax.checkpoint(lambda x: nn.softmax(x)[None]), True),
    "even power": (lambda x: x**2, True),
    "weighted": (lambda x: 0.5 * jnp.abs(x) @ nn.softplus(x) ** 2, True),
    "choice": (lambda x: jnp.where(x > 0, jnp.exp(x), 0.0), True),
    "dropped": (lambda x: jnp.where(x > 0, nn.softmax(x), 0.0) / 0.9, True),
    "value": (lambda x: x, False),
    "less": (lambda x: nn.softmax(x) - 0.25, False),
    "negative factor": (lambda x: -2 * jnp.exp(x), False),
    "odd power": (lambda x: x**3, False),
    "silu": (nn.silu, False),
    "gelu": (nn.gelu, False),
    "lesser": (lambda x: jnp.minimum(jnp.exp(x), x), False),
    "other choice": (lambda x: jnp.where(x > 0, x, -jnp.exp(x)), False),
    "log": (lambda x: nn.log_softmax(x), False),
    "loop": (exchanged, False),
    "branch": (lambda x: jax.lax.cond(x[0, 0] > 0, jnp.abs, lambda y: y, x), False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_known_not_to_be_negative_is_not(name):
    function, known = FUNCTIONS[name]
    x = 3 * np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    jaxpr = jax.make_jaxpr(function)(x).jaxpr
    assert signs.nonnegative(jaxpr)(jaxpr.outvars[0]) == known
    lowest = min(np.min(np.asarray(function(s * x), np.float32)) for s in (1, -1))
    assert (lowest >= 0) == known


def test_operands_are_what_they_are_said_to_be():
    x = np.ones((4, 4), np.float32)
    jaxpr = jax.make_jaxpr(lambda x, y: (x * y, x.T @ x, y + 1))(x, x).jaxpr
    for given, expected in (
        ([True, True], [True, True, True]),
        ([True, False], [False, True, False]),
        ([False, True], [False, False, True]),
        ([], [False, False, False]),
    ):
        is_known = signs.nonnegative(jaxpr, given)
        assert [is_known(out) for out in jaxpr.outvars] == expected


class Mixed(nn.Module):
    """Attention whose last product is a jitted function, given its operands in either order."""

    order: str

    @nn.compact
    def __call__(self, x_t, t, cond):
        x = nn.Dense(x_t.shape[-1])(x_t).reshape(x_t.shape[0], -1, x_t.shape[-1])
        p = nn.softmax(x @ x.swapaxes(1, 2))
        mix = jax.jit(lambda p, v: jax.lax.dot_general(*self.ordered(p, v)))
        y = mix(p, x)
        return (y if self.order == "pv" else y.swapaxes(1, 2)).reshape(x_t.shape)

    def ordered(self, p, v):
        if self.order == "pv":
            return p, v, (((2,), (1,)), ((0,), (0,)))
        return v, p, (((1,), (2,)), ((0,), (0,)))


@pytest.mark.parametrize("order", ["pv", "vp"])
def test_a_product_takes_the_softmax_first_across_a_call(order):
    x, t = np.random.default_rng(0).standard_normal((3, 2, 4, 5)).astype(np.float32), np.int32(1)
    module = Mixed(order)
    variables = module.init(jax.random.key(0), x, t, None)
    denoise, params = mpqdiff.from_flax(module, variables, x, t, None)
    shapes = {}

    def look(path, module, kind, args, out):
        shapes[path] = [arg.shape for arg in args]

    eps, _ = mpqdiff.observe(denoise, look)(params, x, t, None)
    np.testing.assert_allclose(eps.eps, module.apply(variables, x, t, None), rtol=1e-5, atol=1e-6)
    assert shapes["product~1"] == [(3, 8, 8), (3, 8, 5)]
