"""Activation tables: a row per recorded timestep, looked up by nearest, symmetric or not."""

from dataclasses import replace

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
    np.testing.assert_allclose(table.scale[:, 2], 1 / 255, rtol=1e-6)
    np.testing.assert_allclose(table.scale[:, 3], np.array([2, 3, 1]) / qmax(4), rtol=1e-6)
    np.testing.assert_array_equal(table.zero_point[:, [0, 3]], 0)
    np.testing.assert_array_equal(table.zero_point[:, 2], -128)
    expected = np.round(np.array([0.1, 0.1, 0.2]) / np.asarray(table.scale[:, 1])) - 128
    np.testing.assert_array_equal(table.zero_point[:, 1], expected)


def test_lopsided_is_one_answer_for_all_timesteps_and_never_for_products():
    assert activations.lopsided(_statistics(), SITES) == [False, True, False]
    assert activations.lopsided_left(_statistics(), SITES) == [False, False, True]
    signed = _statistics()
    signed.input_min[1, 2, 0] = -0.5  # at one timestep
    assert activations.lopsided_left(signed, SITES) == [False, False, False]
    table = activations.table(signed, SITES, mode="step_table", a_bits=BITS)
    np.testing.assert_array_equal(table.zero_point[:, 2:], 0)


def test_static_covers_the_range_of_all_timesteps():
    table = activations.table(_statistics(), SITES, mode="static", a_bits=BITS)
    assert table.scale.shape == (1, 4)
    np.testing.assert_allclose(table.scale[0, [0, 1]], [9 / 127, 4.2 / 255], rtol=1e-6)


def test_online_has_no_rows():
    table = activations.table(_statistics(), SITES, mode="online", a_bits=BITS)
    assert table.scale.shape == table.zero_point.shape == (0, 4)
    assert table.timesteps.shape == (0,)


def test_an_unknown_mode_lists_the_known_ones():
    with pytest.raises(InputError, match="'tdq'; known: ema, online, static, step_table"):
        activations.table(_statistics(), SITES, mode="tdq", a_bits=BITS)


def _falling(count=12):
    """Statistics of `count` timesteps, 999 down to 10, whose ranges fall and rise by site."""
    stats = _statistics()
    steps = np.rint(np.linspace(999, 10, count)).astype(np.int32)
    wave = 1 + np.cos(np.arange(count))[:, None, None] + np.zeros((1, *stats.input_max.shape[1:]))
    return replace(stats, timesteps=steps, input_max=5 * wave, input_min=-2 * wave)


def test_ema_never_falls_faster_than_its_share_from_one_row_to_the_next():
    stats = _falling()
    _, low, high = activations.ranges(stats, "ema", beta=0.8)
    want = [stats.input_max[0]]
    for row in stats.input_max[1:]:
        want.append(np.maximum(row, 0.8 * want[-1]))
    np.testing.assert_allclose(high, np.stack(want))
    np.testing.assert_allclose(low, -0.4 * np.stack(want))
    assert (high > stats.input_max).any()
    for mode, beta in (("ema", 0.0), ("step_table", 0.9)):
        np.testing.assert_array_equal(
            activations.ranges(stats, mode, beta=beta)[2], stats.input_max
        )


@pytest.mark.parametrize("most", [1, 2, 5, 7, 12, 30])
@pytest.mark.parametrize("mode", ["step_table", "ema"])
def test_a_row_of_a_group_covers_every_timestep_that_looks_it_up(most, mode):
    stats = _falling()
    table = activations.table(stats, SITES, mode=mode, a_bits=BITS, groups=most)
    whole = activations.table(stats, SITES, mode=mode, a_bits=BITS)
    assert len(table.timesteps) == min(most, 12)
    for t, step in zip(stats.timesteps, stats.input_max, strict=True):
        scale, _ = activations.row(table, t)
        alone, _ = activations.row(whole, t)
        assert mode == "ema" or np.all(scale >= 0.999 * alone)
        assert 127 * scale[0] >= 0.999 * step[0, 0]
    steps = np.arange(999, -1, -37)
    found = activations.groups(activations.rows(stats.timesteps, mode, most), steps, mode)
    assert len(found) == min(most, 12)
    assert (found[0][0], found[-1][1]) == (999, steps[-1])


@pytest.mark.parametrize(("groups", "beta", "named"), [(-1, 0.9, "groups"), (0, 1.0, "beta")])
def test_readings_out_of_range_are_refused(groups, beta, named):
    with pytest.raises(InputError, match=f"quantize.{named}="):
        activations.table(_statistics(), SITES, mode="ema", a_bits=BITS, groups=groups, beta=beta)


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
