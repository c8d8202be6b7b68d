"""BitOPs of an image: sum over steps and products of MACs x weight bits x activation bits.

Assumptions: a float operand counts 32 bits; attention products and whatever closure left in
float are counted as 32 x 32; zero-point terms of weights are precomputed column sums and cost
nothing per product, and the column sum that a product of activations takes as it runs is not
counted; no padding is added by the integer products.
"""

from collections.abc import Sequence

from mpqdiff.records import FLOAT_BITS
from mpqdiff.sites import Remainder, Site


def site_bitops(site: Site, w_bits: int, a_bits: int) -> float:
    """BitOPs of `site` per image and step; both operands of a product have `a_bits`."""
    return float(site.macs * a_bits * (w_bits if site.parameters else a_bits))


def bitops(
    sites: Sequence[Site],
    remainder: Sequence[Remainder],
    w_bits: dict[str, int | None],
    a_bits: dict,
    steps: int,
) -> float:
    """BitOPs per image over `steps` steps; widths by site path, None for float."""
    total = sum(entry.macs * FLOAT_BITS**2 for entry in remainder)
    for site in sites:
        a = a_bits.get(site.path)
        if isinstance(a, dict):
            left, right = a["lhs"] or FLOAT_BITS, a["rhs"] or FLOAT_BITS
        else:
            left, right = w_bits.get(site.path) or FLOAT_BITS, a or FLOAT_BITS
        total += site.macs * left * right
    return float(total * steps)
