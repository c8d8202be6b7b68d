"""The energy model: the constants' arithmetic by hand, and that fewer bits never cost more."""

import itertools

import pytest

from mpqdiff.costs.energy import (
    PICOJOULES,
    float_joules,
    mac_picojoules,
    moved_bytes,
    site_joules,
)
from mpqdiff.errors import InputError
from mpqdiff.records import FLOAT_BITS
from mpqdiff.sites import Remainder, Site

DENSE = Site("a", "dense", (7, 5), 35, 5, 490, "a")
PRODUCT = Site("qk", "product", (), 0, 0, 300, "qk")


def test_a_mac_by_hand():
    assert mac_picojoules(8, 8) == pytest.approx(0.2 + 0.1)
    assert mac_picojoules(4, 8) == pytest.approx(0.1 + 0.1)
    assert mac_picojoules(2, 4) == pytest.approx(0.2 / 8 + 0.1)
    assert mac_picojoules(FLOAT_BITS, FLOAT_BITS) == pytest.approx(3.7 + 0.9)


def test_a_site_by_hand():
    byte = PICOJOULES["dram_byte"]
    assert 1.3e3 / 8 < byte < 2.6e3 / 8
    # 4 bits: ceil(7 / 2) rows of 5 bytes, 5 scales, 5 biases; shared by the 10 images of a call.
    assert moved_bytes(DENSE, 4) == 20 + 20 + 20
    assert site_joules(DENSE, 4, 8, batch=10) == pytest.approx(1e-12 * (490 * 0.2 + 60 * byte / 10))
    assert moved_bytes(DENSE, FLOAT_BITS) == 4 * (35 + 5)
    assert site_joules(DENSE, FLOAT_BITS, FLOAT_BITS) == pytest.approx(
        1e-12 * (490 * 4.6 + 160 * byte)
    )


def test_a_product_has_no_weights_and_two_activations():
    assert moved_bytes(PRODUCT, 8) == moved_bytes(PRODUCT, FLOAT_BITS) == 0
    # w_bits says nothing about it
    assert site_joules(PRODUCT, 2, 4) == site_joules(PRODUCT, 8, 4)
    assert site_joules(PRODUCT, 8, 4) == pytest.approx(300e-12 * (0.2 * 16 / 64 + 0.1))


@pytest.mark.parametrize("site", [DENSE, PRODUCT])
def test_energy_never_falls_with_bits_and_float_costs_most(site):
    for fixed in range(2, 9):
        rising_a = [site_joules(site, fixed, a) for a in range(2, 9)]
        assert all(low < high for low, high in itertools.pairwise(rising_a))
        rising_w = [site_joules(site, w, fixed) for w in range(2, 9)]
        assert all(low <= high for low, high in itertools.pairwise(rising_w))
    if site.parameters:
        assert rising_w[0] < rising_w[-1]
    assert site_joules(site, 8, 8) < site_joules(site, FLOAT_BITS, FLOAT_BITS)


def test_a_batch_shares_the_weights_and_not_the_arithmetic():
    one, many = site_joules(DENSE, 8, 8), site_joules(DENSE, 8, 8, batch=1000)
    arithmetic = 490e-12 * 0.3
    assert one - arithmetic == pytest.approx(1000 * (many - arithmetic))


def test_what_stays_in_float():
    found = float_joules([DENSE, PRODUCT], [Remainder("elsewhere", 11)], batch=4)
    parts = [site_joules(site, FLOAT_BITS, FLOAT_BITS, batch=4) for site in (DENSE, PRODUCT)]
    assert found == pytest.approx(sum(parts) + 11e-12 * 4.6)
    assert float_joules([], []) == 0


@pytest.mark.parametrize("pair", [(1, 8), (9, 8), (8, FLOAT_BITS), (FLOAT_BITS, 8), (16, 16)])
def test_widths_without_a_model_are_refused(pair):
    with pytest.raises(InputError, match=r"expected both within 2\.\.8, or 32 twice"):
        mac_picojoules(*pair)
