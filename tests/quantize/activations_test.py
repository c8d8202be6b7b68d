"""Activation tables: a row per recorded timestep, looked up by nearest, symmetric or not."""

import jax
import numpy as np
import pytest

from mpqdiff.errors import InputError
from mpqdiff.quantize import activations
from mpqdiff.quantize.numerics import qmax
from mpqdiff.records import Statistics
from mpqdiff.sites import Site


def _site(path, kind="dense"):
    return Site(path, kind, (4, 4), 16, 4, 16, path)


SITES = [_site("plain"), _site("lopsided"), _site("pv", "product")]
BITS = {"plain": 8, "lopsided": 8, "pv": {"lhs": 8, "rhs": 4}}
TIMESTEPS = np.array([900, 500, 100], np.int32)


def _statistics() -> Statistics:
    # [T,L,2]: `plain` grows with t, `lopsided` is one-sided, `pv` one-sided on the left.
    low = np.array([[[-9, 0], [-0.1, 0], [0, -2]],
                    [[-5, 0], [-0.1, 0], [0, -3]],
                    [[-1, 0], [-0.2, 0], [0, -1]]], np.float32)  # fmt: skip
    high = np.array([[[7, 0], [4, 0], [1, 2]],
                     [[5, 0], [3, 0], [1, 1]],
                     [[1, 0], [2, 0], [1, 1]]], np.float32)  # fmt: skip
    return Statistics(TIMESTEPS, None, None, None, None, None, low, high)


def test_step_table_has_a_row_for_each_timestep_and_a_column_for_each_operand():
    table = activations.table(_statistics(), SITES, mode="step_table", a_bits=BITS)
    assert activations.columns(SITES) == {"plain": (0,), "lopsided": (1,), "pv": (2, 3)}
    assert table.scale.shape == table.zero_point.shape == (3, 4)
    np.testing.assert_array_equal(table.timesteps, TIMESTEPS)
    np.testing.assert_allclose(table.scale[:, 0], np.array([9, 5, 1]) / qmax(8), rtol=1e-6)
    np.testing.assert_allclose(table.scale[:, 1], np.array([4.1, 3.1, 2.2]) / 255, rtol=1e-6)
    np.testing.assert_allclose(table.scale[:, 2], 1 / qmax(8), rtol=1e-6)
    np.testing.assert_allclose(table.scale[:, 3], np.array([2, 3, 1]) / qmax(4), rtol=1e-6)
    np.testing.assert_array_equal(table.zero_point[:, [0, 2, 3]], 0)
    expected = np.round(np.array([0.1, 0.1, 0.2]) / np.asarray(table.scale[:, 1])) - 128
    np.testing.assert_array_equal(table.zero_point[:, 1], expected)


def test_lopsided_is_one_answer_for_all_timesteps_and_never_for_products():
    assert activations.lopsided(_statistics(), SITES) == [False, True, False]


def test_static_covers_the_range_of_all_timesteps():
    table = activations.table(_statistics(), SITES, mode="static", a_bits=BITS)
    assert table.scale.shape == (1, 4)
    np.testing.assert_allclose(table.scale[0, [0, 1]], [9 / 127, 4.2 / 255], rtol=1e-6)


def test_online_has_no_rows():
    table = activations.table(_statistics(), SITES, mode="online", a_bits=BITS)
    assert table.scale.shape == table.zero_point.shape == (0, 4)
    assert table.timesteps.shape == (0,)


def test_an_unknown_mode_lists_the_known_ones():
    with pytest.raises(InputError, match="'ema'; known: online, static, step_table"):
        activations.table(_statistics(), SITES, mode="ema", a_bits=BITS)


def test_the_row_is_that_of_the_nearest_timestep():
    table = activations.table(_statistics(), SITES, mode="step_table", a_bits=BITS)
    row = jax.jit(activations.row)
    for t, index in ((999, 0), (710, 0), (690, 1), (500, 1), (0, 2)):
        scale, zero = row(table, t)
        np.testing.assert_array_equal(scale, table.scale[index])
        np.testing.assert_array_equal(zero, table.zero_point[index])
    scale, _ = row(table, np.array([0, 999], np.int32))
    np.testing.assert_array_equal(scale, table.scale[np.array([2, 0])])


def test_groups_are_the_ranges_of_steps_that_the_rows_serve():
    steps = [999, 800, 600, 400, 200, 0]
    assert activations.groups(steps, steps, "step_table") == tuple((t, t) for t in steps)
    assert activations.groups([900, 500, 100], steps, "step_table") == (
        (999, 800), (600, 400), (200, 0)
    )  # fmt: skip
    assert activations.groups([999, 990, 0], steps, "step_table") == ((999, 999), (800, 600),
                                                                      (400, 0))  # fmt: skip
    for mode in ("static", "online"):
        assert activations.groups([900, 500, 100], steps, mode) == ((999, 0),)


def test_groups_agree_with_the_row_that_is_looked_up():
    table = activations.table(_statistics(), SITES, mode="step_table", a_bits=BITS)
    steps = np.arange(999, -1, -37)
    groups = activations.groups(TIMESTEPS, steps, "step_table")
    for t in steps:
        index = next(i for i, (high, low) in enumerate(groups) if high >= t >= low)
        np.testing.assert_array_equal(activations.row(table, t)[0], table.scale[index])
