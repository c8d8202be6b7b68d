"""Schedules against their formulas, evaluated term by term."""

import math

import numpy as np
import pytest

from mpqdiff.diffusion.schedule import SCHEDULES, alphas_cumprod
from mpqdiff.errors import InputError


def running_product(betas):
    product, out = 1.0, []
    for beta in betas:
        product *= 1.0 - beta
        out.append(product)
    return np.array(out)


def between(start, stop, count):
    return [start + (stop - start) * i / (count - 1) for i in range(count)]


def cosine_betas(count):
    def signal(i):
        return math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1.0 - signal(i + 1) / signal(i), 0.999) for i in range(count)]


PLAIN = {
    "linear": lambda count: between(0.1 / count, 20.0 / count, count),
    "scaled_linear": lambda count: [b**2 for b in between(0.00085**0.5, 0.012**0.5, count)],
    "cosine": cosine_betas,
}


@pytest.mark.parametrize("count", [50, 1000])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedule_is_the_running_product_of_its_betas(name, count):
    table = alphas_cumprod(name, count)
    assert table.dtype == np.float32 and table.shape == (count,)
    np.testing.assert_allclose(table, running_product(PLAIN[name](count)), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 10, 1000])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_signal_falls_and_stays_inside_zero_and_one(name, count):
    table = alphas_cumprod(name, count)
    assert (np.diff(table) < 0).all() and table[-1] > 0 and table[0] < 1


def test_the_ddpm_default_ends():
    table = alphas_cumprod("linear", 1000)
    np.testing.assert_allclose(table[0], 0.9999, rtol=1e-6)
    np.testing.assert_allclose(table[-1], 4.0358e-5, rtol=1e-4)


def test_unknown_name_and_empty_schedule():
    with pytest.raises(InputError, match=r"'sigmoid'; known: cosine, linear, scaled_linear"):
        alphas_cumprod("sigmoid", 10)
    with pytest.raises(InputError, match="num_timesteps=0"):
        alphas_cumprod("linear", 0)
