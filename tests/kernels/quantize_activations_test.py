"""Integers and scales of every implementation equal the definition, and what a token must get."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.kernels.quantize_activations import pallas_tpu, quantize_activations
from mpqdiff.quantize.numerics import quantize_activation

FAST = ("xla", "pallas_interpret", "pallas_gpu_interpret")
RUN = jax.jit(quantize_activations, static_argnames=("bits", "implementation"))


@pytest.mark.parametrize("implementation", FAST)
class TestEveryImplementation:
    @settings(max_examples=12, deadline=None)
    @given(
        size=st.sampled_from([(0, 5), (1, 1), (32, 128), (33, 17), (70, 140)]),
        seed=st.integers(0, 99),
    )
    def test_integers_and_scales_equal_the_definition(self, implementation, size, seed):
        rng, bits = np.random.default_rng(seed), 4 + size[0] % 5
        x = (rng.standard_normal(size) * np.exp(rng.normal(0, 3))).astype(np.float32)
        x[rng.random(x.shape) < 0.02] = np.nan
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pallas_tpu, "_rows", lambda rows, *_: min(rows, 32))
            found = RUN(x, bits=bits, implementation=implementation)
        wanted = RUN(x, bits=bits, implementation="reference")
        assert [part.dtype for part in found] == [jnp.int8, jnp.float32]
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)

    def test_bfloat16_tokens_of_any_rank(self, implementation):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 17)), jnp.bfloat16)
        qvalue, scale = quantize_activations(x, implementation=implementation)
        assert qvalue.shape == x.shape and scale.shape == (2, 3, 1)
        np.testing.assert_array_equal(qvalue, quantize_activation(x, scale, 0, 8))


def test_the_largest_entry_takes_the_largest_integer_and_the_rest_their_share():
    x = np.array([[-2.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    qvalue, scale = quantize_activations(x, bits=8, implementation="reference")
    np.testing.assert_array_equal(qvalue, [[-127, 64, 32, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(scale[:, 0], [2 / 127, 1.0], rtol=1e-6)


def test_what_is_not_finite_neither_sets_the_scale_nor_spoils_the_token():
    x = np.array([[np.inf, -np.inf, np.nan, 4.0]], np.float32)
    qvalue, scale = quantize_activations(x, implementation="reference")
    np.testing.assert_array_equal(qvalue, [[127, -128, 0, 127]])
    np.testing.assert_allclose(scale, [[4 / 127]], rtol=1e-6)


def test_unusable_requests_are_refused():
    x = jnp.ones((2, 3))
    with pytest.raises(InputError, match="reference, xla"):
        quantize_activations(x, implementation="fastest")
    with pytest.raises(InputError, match="needs a TPU"):
        quantize_activations(x, implementation="pallas_tpu")
    with pytest.raises(InputError, match="2 to 8 bits"):
        quantize_activations(x, bits=9)
    with pytest.raises(InputError, match="got a scalar"):
        quantize_activations(jnp.float32(1))
