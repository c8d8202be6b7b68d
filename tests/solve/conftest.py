"""Problems for the solver tests."""

import jax
import numpy as np
import pytest

from mpqdiff.records import Problem
from mpqdiff.solve import arguments, solve
from mpqdiff.solve.evolution import Schedule


def build(
    value,
    cost,
    budget,
    *,
    bits=None,
    a_bits=None,
    legal=None,
    tie=None,
    parameters=None,
    fixed=0.0,
    names=(),
):
    """A problem; value [L,K], cost [L,K] with one budget or [R,L,K] with R. bits default to
    2, 3, ..., a_bits to 8."""
    value, cost = np.asarray(value, np.float64), np.asarray(cost, np.float64)
    cost = cost[None] if cost.ndim == 2 else cost
    sites, choices = value.shape
    bits = np.arange(2, 2 + choices) if bits is None else np.asarray(bits)
    a_bits = np.full(choices, 8) if a_bits is None else np.asarray(a_bits)
    return Problem(
        value=value,
        resources=cost,
        fixed=np.array(np.broadcast_to(fixed, len(cost)), np.float64),
        budgets=np.array(np.broadcast_to(budget, len(cost)), np.float64),
        w_bits=bits.astype(np.int32),
        a_bits=a_bits.astype(np.int32),
        legal=np.ones((sites, choices), bool) if legal is None else np.asarray(legal),
        tie=np.arange(sites, dtype=np.int32) if tie is None else np.asarray(tie, np.int32),
        parameters=np.ones(sites, int) if parameters is None else np.asarray(parameters),
        names=names,
    )


@pytest.fixture(scope="session")
def make_problem():
    """`build`, as a fixture: test folders are not importable."""
    return build


@pytest.fixture(scope="session")
def run():
    """`(problem, name, seed=0, **kwargs) -> Allocation`: `solve`, with a key where it needs one,
    and little evolution where its schedule is not given."""

    def run(problem, name, seed=0, **kwargs):
        usual = {"key": jax.random.key(seed), "schedule": Schedule(generations=4)}
        return solve(problem, name, **{k: usual[k] for k in usual if k in arguments(name)} | kwargs)

    return run


@pytest.fixture(scope="session")
def linear_problem():
    """`(theta, n, budget, bits) -> Problem` with value linear in bits and cost n * bits."""

    def linear(theta, n, budget, bits=(2, 3, 4, 5, 6, 7, 8), **kwargs):
        bits, n = np.asarray(bits), np.asarray(n, np.float64)
        value = np.asarray(theta, np.float64)[:, None] * (bits.max() - bits)
        cost = n[:, None] * bits
        return build(value, cost, budget, bits=bits, parameters=n.astype(int), **kwargs)

    return linear
