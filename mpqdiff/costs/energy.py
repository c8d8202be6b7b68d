"""Joules of a site per image: modelled, never measured. A scale for comparing plans, no meter.

Constants: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014,
figure 1.1.9 (45 nm, 0.9 V). One MAC of w x a bits is an 8 x 8 bit multiplication scaled by
w a / 64 (the area of an array multiplier) and a 32-bit integer addition; in float, a float32
multiplication and addition. Weights, scales and biases come from DRAM once per denoiser call,
which serves a whole batch. Left out: moving and storing activations, quantising and dequantising,
what lies between the sites, leakage, and what packed weights cost to open.
"""

from collections.abc import Sequence

from mpqdiff.errors import InputError
from mpqdiff.quantize.pack import packed_bytes
from mpqdiff.records import FLOAT_BITS
from mpqdiff.sites import Remainder, Site

LABEL = "modelled"

PICOJOULES = {
    "int8_multiply": 0.2,
    "int32_add": 0.1,
    "float32_multiply": 3.7,
    "float32_add": 0.9,
    "dram_byte": 1950.0 / 8,  # an access of 64 bits takes 1.3 to 2.6 nJ: the middle
}
_FLOAT_MAC = PICOJOULES["float32_multiply"] + PICOJOULES["float32_add"]
_FLOAT_BYTES = 4


def mac_picojoules(w_bits: int, a_bits: int) -> float:
    """One multiplication of the two widths with its addition, in pJ; FLOAT_BITS twice is float32.

    Raises InputError on a width outside 2..8, or on an integer beside a float.
    """
    if w_bits == a_bits == FLOAT_BITS:
        return _FLOAT_MAC
    if not all(2 <= bits <= 8 for bits in (w_bits, a_bits)):
        raise InputError(
            f"widths ({w_bits}, {a_bits}): expected both within 2..8, or {FLOAT_BITS} twice (float)"
        )
    return PICOJOULES["int8_multiply"] * w_bits * a_bits / 64 + PICOJOULES["int32_add"]


def moved_bytes(site: Site, w_bits: int) -> int:
    """Bytes that a denoiser call reads for `site`: packed weights, scales, bias (a product: 0)."""
    if not site.parameters:
        return 0
    if w_bits == FLOAT_BITS:
        return _FLOAT_BYTES * (site.parameters + site.bias)
    outputs = site.shape[-1]
    packed = packed_bytes((site.parameters // outputs, outputs), w_bits)
    return packed + _FLOAT_BYTES * (outputs + site.bias)


def site_joules(site: Site, w_bits: int, a_bits: int, *, batch: int = 1) -> float:
    """Joules of `site` per image and denoiser call that serves `batch` images.

    Both operands of a product have `a_bits`. Raises InputError as `mac_picojoules` does.
    """
    left = w_bits if site.parameters else a_bits
    arithmetic = site.macs * mac_picojoules(left, a_bits)
    return 1e-12 * (arithmetic + moved_bytes(site, w_bits) * PICOJOULES["dram_byte"] / batch)


def float_joules(sites: Sequence[Site], remainder: Sequence[Remainder], *, batch: int = 1) -> float:
    """Joules per image and denoiser call of what no plan quantises: `sites` and other products."""
    loose = sum(entry.macs for entry in remainder) * _FLOAT_MAC * 1e-12
    return loose + sum(site_joules(site, FLOAT_BITS, FLOAT_BITS, batch=batch) for site in sites)
