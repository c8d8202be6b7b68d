"""Bytes of a site on the device and in the file, and of what no choice changes.

On the device: packed weights (widths 2, 4, 8; others in the next one up), a float32 scale per
output channel, the float32 bias, and, where the activation is asymmetric, an int32 column sum per
output channel for the zero-point correction. In the file every width is bit-packed, and column
sums are not stored: they follow from the weights. All of it is held once, by the first call of a
module: a further call takes nothing.
"""

from mpqdiff.quantize.pack import packed_bytes
from mpqdiff.records import FLOAT_BITS
from mpqdiff.sites import Site

FLOAT = 4  # bytes of a float32 or an int32


def _out(site: Site) -> int:
    return site.shape[-1]


def device_bytes(site: Site, bits: int, asymmetric: bool) -> int:
    """Bytes passed to the compiled program for `site` at `bits`; 0 for a product and for a repeated
    call.

    FLOAT_BITS is a site kept in float: its float32 kernel and bias. `asymmetric` is the same for
    all calls of a module (`activations.lopsided`).
    """
    if site.repeated:
        return 0
    if bits == FLOAT_BITS or not site.parameters:
        return FLOAT * (site.parameters + site.bias)
    rows = site.parameters // _out(site)
    packed = packed_bytes((rows, _out(site)), bits)
    return packed + FLOAT * (_out(site) * (2 if asymmetric else 1) + site.bias)


def file_bytes(site: Site, bits: int, asymmetric: bool) -> int:
    """Bytes of `site` in the saved file, bit-packed; 0 for a product and for a repeated call."""
    if bits == FLOAT_BITS or not site.parameters or site.repeated:
        return device_bytes(site, bits, asymmetric)
    return -(-site.parameters * bits // 8) + FLOAT * (_out(site) + site.bias)


def fixed_bytes(float_leaf_bytes: int, rows: int, columns: int) -> dict[str, float]:
    """What every choice shares: float leaves and the activation table of `rows` x `columns`.

    A table entry is a float32 scale and an int8 zero point; each row names its int32 timestep.
    """
    table = rows * columns * (FLOAT + 1) + rows * FLOAT
    return {name: float(float_leaf_bytes + table) for name in ("bytes", "file_bytes")}
