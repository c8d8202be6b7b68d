"""Centred Grams and raw row sums against float64, with means far above the spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqdiff.errors import InputError
from mpqdiff.kernels.gram import gram, pallas_tpu

RUNNABLE = ("reference", "xla", "pallas_interpret", "pallas_gpu_interpret")
RUN = jax.jit(gram, static_argnames="implementation")


def _float64(x):
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    centred = x - x.mean(axis=0)
    return centred @ centred.T, (x @ x.T).sum(axis=1)


@pytest.mark.parametrize("implementation", RUNNABLE)
class TestEveryImplementation:
    @settings(max_examples=8, deadline=None)
    @given(
        size=st.sampled_from([(1, 7), (6, 1), (20, 128), (5, 129), (3, 4099)]),
        mean=st.sampled_from([0.0, 100.0]),
        seed=st.integers(0, 99),
    )
    def test_equals_float64(self, implementation, size, mean, seed):
        samples, features = size
        x = np.random.default_rng(seed).standard_normal(size) + mean
        x = x.astype(np.float32)
        total, row_sums = RUN(x, implementation=implementation)
        assert total.shape == (samples, samples) and row_sums.shape == (samples,)
        expected, sums = _float64(x)
        np.testing.assert_array_equal(total, total.T)
        np.testing.assert_allclose(total, expected, atol=2e-5 * features, rtol=1e-5)
        np.testing.assert_allclose(row_sums, sums, atol=1e-4 * features * samples, rtol=1e-5)


def test_unusable_requests_are_refused():
    x = jnp.ones((3, 4))
    with pytest.raises(InputError, match="reference, xla"):
        gram(x, implementation="fastest")
    with pytest.raises(InputError, match="needs a TPU"):
        gram(x, implementation="pallas_tpu")
    with pytest.raises(InputError, match="samples and features"):
        gram(jnp.ones((3, 0)))
    with pytest.raises(InputError, match="at most 1536"):
        gram(jnp.ones((pallas_tpu.MAX_SAMPLES + 1, 2)), implementation="pallas_interpret")
