"""Aggregation over timesteps: golden values, its laws, and that nothing underflows."""

import numpy as np
import pytest

from mpqdiff import aggregate as module
from mpqdiff.aggregate import (
    AGGREGATIONS,
    aggregate,
    lift,
    suffix_mean,
    timestep_weights,
)
from mpqdiff.errors import InputError
from mpqdiff.records import Scores

GAMMA = np.array([0.67764814, 0.81326329, 0.15762506])  # sums over the two other sites
THETA = np.array([0.50780989, 0.44340873, 0.85416999])


def scores(value, kind="redundancy"):
    return Scores(value=np.asarray(value), kind=kind, name="test")


def run(value, kind="redundancy", **kwargs):
    value = np.asarray(value)
    times = {"timesteps": np.arange(len(value))[::-1] * 10, "num_timesteps": 1000}
    return aggregate(scores(value, kind), **(times | kwargs))


@pytest.mark.parametrize("method", ["exp_mean", "mean_exp"])
def test_one_timestep_is_ompq(method):
    np.testing.assert_allclose(
        np.exp(AGGREGATIONS[method](GAMMA[None], np.ones(1), 1.0)), THETA, atol=1e-8
    )
    # The sum over L - 1 = 2 sites with beta 1 is the mean with beta 2; only ratios are kept.
    theta = run(GAMMA[None] / 2, method=method, beta=2.0)
    np.testing.assert_allclose(theta, THETA / THETA.max(), atol=1e-8)


def test_suffix_means():
    np.testing.assert_allclose(suffix_mean(THETA), [0.6017962, 0.64878936, 0.85416999], atol=1e-7)
    theta = run(GAMMA[None] / 2, beta=2.0, suffix=True)
    np.testing.assert_allclose(theta, suffix_mean(THETA) / THETA.max(), atol=1e-7)


def test_exp_mean_is_at_least_mean_exp():
    rng = np.random.default_rng(0)
    gamma, w = rng.uniform(size=(20, 9)), np.full(20, 1 / 20)
    higher, lower = (AGGREGATIONS[m](gamma, w, 10.0) for m in ("exp_mean", "mean_exp"))
    assert (higher > lower).all()
    constant = np.broadcast_to(gamma[:1], gamma.shape)
    np.testing.assert_allclose(
        AGGREGATIONS["exp_mean"](constant, w, 10.0), AGGREGATIONS["mean_exp"](constant, w, 10.0)
    )


@pytest.mark.parametrize("lam", [-3.0, 0.0, 5.0])
def test_weights_lie_on_the_simplex(lam):
    t = np.array([900, 500, 100, 0])
    w = timestep_weights(t, 1000, lam)
    np.testing.assert_allclose(w.sum(), 1.0)
    np.testing.assert_allclose(w[1:] / w[:-1], np.exp(-lam * np.diff(t) / 1000))


def test_exp_mean_is_the_weighted_sum_by_definition():
    rng = np.random.default_rng(1)
    gamma, t = rng.uniform(size=(4, 5)), np.array([900, 600, 300, 0])
    got = run(gamma, timesteps=t, lam=2.0, beta=7.0)
    w = np.exp(-2.0 * t / 1000)
    expected = (w[:, None] / w.sum() * np.exp(-7.0 * gamma)).sum(0)
    np.testing.assert_allclose(got, expected / expected.max())


@pytest.mark.parametrize("method", AGGREGATIONS)
def test_redundant_sites_matter_less(method):
    theta = run([[0.1, 0.5, 0.9]] * 3, method=method)
    assert theta[0] == 1.0
    assert theta[0] > theta[1] > theta[2] > 0


def test_mean_of_a_wholly_redundant_site_is_zero():
    np.testing.assert_array_equal(run([[1.0, 0.5]], method="mean"), [0.0, 1.0])
    np.testing.assert_array_equal(run([[1.0, 1.0]], method="mean"), [0.0, 0.0])


def test_nothing_underflows_where_the_plain_form_does():
    gamma = np.array([[0.90, 0.91, 0.92]])
    assert (np.exp(-1000.0 * gamma) == 0).all()
    np.testing.assert_allclose(run(gamma, beta=1000.0), np.exp([0.0, -10.0, -20.0]))


def test_a_beta_beyond_float64_is_refused():
    with pytest.raises(InputError, match="lower beta"):
        run([[0.0, 1.0]], beta=1000.0)


def test_damage_is_the_weighted_mean():
    rng = np.random.default_rng(2)
    damage = rng.uniform(size=(3, 4, 2))
    t = np.array([800, 400, 0])
    w = timestep_weights(t, 1000, 1.5)
    got = run(damage, "damage", timesteps=t, lam=1.5)
    np.testing.assert_allclose(got, np.einsum("t,tlk->lk", w, damage))
    np.testing.assert_allclose(run(damage[:1], "damage", timesteps=t), damage[0])


def test_lift_is_linear_and_zero_at_the_widest():
    choices = [(2, 8), (4, 8), (8, 8)]
    np.testing.assert_allclose(lift([2.0, 0.5], choices), [[12, 8, 0], [3, 2, 0]])
    assert lift([1.0], choices).dtype == np.float64


def test_lift_adds_activation_bits_and_float_lacks_nothing():
    choices = [(4, 4), (4, 8), (8, 4), (8, 8), (32, 32)]
    np.testing.assert_allclose(lift([2.0], choices), [[16, 8, 8, 0, 0]])


def test_bad_input():
    with pytest.raises(InputError, match="known: exp_mean, mean, mean_exp"):
        run([[0.1, 0.2]], method="median")
    with pytest.raises(InputError, match="not finite"):
        run([[np.nan, 0.2]])
    with pytest.raises(InputError, match="timesteps"):
        run([[0.1, 0.2]] * 2, timesteps=[1, 2, 3])
    with pytest.raises(InputError, match=r"expected 0\.\.999"):
        run([[0.1, 0.2]] * 2, timesteps=[1000, 0])
    with pytest.raises(InputError, match="beta > 0"):
        run([[0.1, 0.2]], beta=0.0)
    assert -np.log(np.finfo(float).tiny) > module.LARGEST_SPREAD
