"""Weight-only products against float64 of the same bfloat16 tokens and integer weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.kernels.weight_only_matmul import weight_only_matmul
from mpqdiff.quantize.pack import pack

RUNNABLE = ("reference", "xla", "pallas_interpret", "pallas_gpu_interpret")
RUN = jax.jit(weight_only_matmul, static_argnames=("w_bits", "activation", "implementation"))


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize("bits", [2, 4, 8])
class TestEveryImplementation:
    @settings(max_examples=8, deadline=None)
    @given(
        size=st.sampled_from([(0, 5, 3), (1, 1, 1), (33, 99, 40)]),
        seed=st.integers(0, 99),
    )
    def test_equals_float64(self, implementation, bits, size, seed):
        rows, inputs, outputs = size
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((rows, inputs)).astype(np.float32)
        limit = 1 << (bits - 1)
        integers = rng.integers(-limit, limit, (inputs, outputs)).astype(np.int8)
        scale = rng.random(outputs).astype(np.float32) + 0.5
        bias = rng.standard_normal(outputs).astype(np.float32) if seed % 2 else None
        packed = jnp.asarray(pack(integers, bits))
        y = RUN(x, packed, scale, bias, w_bits=bits, implementation=implementation)
        assert y.dtype == jnp.float32 and y.shape == (rows, outputs)
        rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
        expected = (rounded @ integers) * scale + (0.0 if bias is None else bias)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * limit)

    def test_the_activation_follows_the_bias(self, implementation, bits):
        packed = jnp.asarray(pack(np.eye(4, dtype=np.int8), bits))
        x, bias = jnp.linspace(-2, 2, 8).reshape(2, 4), jnp.full(4, 0.25)
        y = weight_only_matmul(
            x,
            packed,
            jnp.ones(4),
            bias,
            w_bits=bits,
            activation="gelu",
            implementation=implementation,
        )
        rounded = x.astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_allclose(y, jax.nn.gelu(rounded + 0.25, approximate=True), atol=1e-5)


def test_unusable_requests_are_refused():
    x, weight = jnp.ones((2, 8)), jnp.ones((8, 4), jnp.int8)
    with pytest.raises(InputError, match="reference, xla"):
        weight_only_matmul(x, weight, jnp.ones(4), None, implementation="fastest")
    with pytest.raises(InputError, match="needs a TPU"):
        weight_only_matmul(x, weight, jnp.ones(4), None, implementation="pallas_tpu")
    with pytest.raises(InputError, match="at 2 bits"):
        weight_only_matmul(x, weight, jnp.ones(4), None, w_bits=2)
    with pytest.raises(InputError, match="gelu, silu"):
        weight_only_matmul(x, weight, jnp.ones(4), None, activation="tanh")
