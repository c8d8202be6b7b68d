"""Problems for the solver tests."""

import numpy as np
import pytest

from mpqdiff.records import Problem


def build(value, cost, budget, *, bits=None, legal=None, tie=None, parameters=None, fixed=0.0):
    """A one-row problem; value and cost [L,K]. bits default to 2, 3, ..."""
    value = np.asarray(value, np.float64)
    sites, choices = value.shape
    bits = np.arange(2, 2 + choices) if bits is None else np.asarray(bits)
    return Problem(
        value=value,
        resources=np.asarray(cost, np.float64)[None],
        fixed=np.array([float(fixed)]),
        budgets=np.array([float(budget)]),
        w_bits=bits.astype(np.int32),
        a_bits=np.full(choices, 8, np.int32),
        legal=np.ones((sites, choices), bool) if legal is None else np.asarray(legal),
        tie=np.arange(sites, dtype=np.int32) if tie is None else np.asarray(tie, np.int32),
        parameters=np.ones(sites, int) if parameters is None else np.asarray(parameters),
    )


@pytest.fixture(scope="session")
def make_problem():
    """`build`, as a fixture: test folders are not importable."""
    return build


@pytest.fixture(scope="session")
def linear_problem():
    """`(theta, n, budget, bits) -> Problem` with value linear in bits and cost n * bits."""

    def linear(theta, n, budget, bits=(2, 3, 4, 5, 6, 7, 8), **kwargs):
        bits, n = np.asarray(bits), np.asarray(n, np.float64)
        value = np.asarray(theta, np.float64)[:, None] * (bits.max() - bits)
        cost = n[:, None] * bits
        return build(value, cost, budget, bits=bits, parameters=n.astype(int), **kwargs)

    return linear
