"""The damage scores and the random control."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.records import Statistics
from mpqdiff.sensitivity import SCORES, output_error, random, weight_error


def grid(weight, bits):
    """Round to a fixed grid of 2^-bits."""
    return jnp.round(weight * 2.0**bits) / 2.0**bits


def statistics(error):
    empty = jnp.zeros((2, 3, 2))
    return Statistics(
        timesteps=jnp.arange(2),
        gram=empty,
        row_sums=empty,
        pooled_gram=empty,
        pooled_row_sums=empty,
        time_only=jnp.zeros(3, bool),
        input_min=empty,
        input_max=empty,
        output_error=error,
    )


def test_weight_error_is_the_summed_squared_error():
    weights = [np.array([[0.3, 0.6]]), np.array([0.26, -0.1, 0.0])]
    scores = weight_error.score(weights, [1, 2], grid)
    expected = [
        [0.2**2 + 0.1**2, 0.05**2 + 0.1**2],
        [0.24**2 + 0.1**2, 0.01**2 + 0.1**2],
    ]
    assert scores.kind == "damage"
    assert scores.value.shape == (1, 2, 2)
    np.testing.assert_allclose(scores.value[0], expected, rtol=1e-5)


def test_weight_error_never_rises_with_bits():
    by_bits = {2: 0.5, 3: 2.0, 4: 0.25}
    scores = weight_error.score([np.zeros(1)], [2, 3, 4], lambda w, b: w + by_bits[b])
    np.testing.assert_allclose(scores.value[0, 0], [0.25, 0.25, 0.0625])


def test_weight_error_refuses_bad_input():
    with pytest.raises(InputError, match="site 1 are not finite"):
        weight_error.score([np.zeros(2), np.array([np.nan])], [4], grid)
    with pytest.raises(InputError, match="ascending"):
        weight_error.score([np.zeros(2)], [8, 4], grid)
    with pytest.raises(InputError, match=r"shape \(1,\), expected \(2,\)"):
        weight_error.score([np.zeros(2)], [4], lambda w, b: w[:1])


def test_output_error_never_rises_with_bits():
    error = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 3, 4)), jnp.float32)
    value = np.asarray(output_error.score(statistics(error)).value)
    np.testing.assert_array_equal(value, np.minimum.accumulate(np.asarray(error), axis=-1))


@pytest.mark.parametrize("bad", [None, np.nan, -1.0])
def test_output_error_refuses_bad_input(bad):
    error = None if bad is None else jnp.full((2, 3, 4), bad)
    with pytest.raises(InputError, match="output_error"):
        output_error.score(statistics(error))


def test_random_differs_by_site_and_key_but_not_by_timestep():
    one, again = (random.score(jax.random.key(1), 5, 40).value for _ in range(2))
    other = random.score(jax.random.key(2), 5, 40).value
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(one, np.broadcast_to(one[0], (5, 40)))
    assert len(np.unique(one)) == 40
    assert not np.array_equal(one, other)
    assert one.min() >= 0
    assert one.max() < 1


def test_registry_names_its_scores():
    assert set(SCORES) == {"orthogonality", "output_error", "weight_error", "random"}
    assert SCORES["random"](jax.random.key(0), 2, 3).name == "random"
