"""Integers of activations with a scale of their own for every token (symmetric).

scale = max_k |x_k| / qmax(bits) over the finite entries (1 where that is 0), q = round(x / scale)
saturated to [-qmax - 1, qmax]: infinities saturate, NaN becomes 0 (`quantize.numerics`).
"""

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.kernels.quantize_activations import pallas_gpu, pallas_tpu, reference, xla
from mpqdiff.quantize.numerics import check_bits

IMPLEMENTATIONS = {
    "reference": reference.quantize_activations,
    "xla": xla.quantize_activations,
    "pallas_tpu": pallas_tpu.quantize_activations,
    "pallas_interpret": pallas_tpu.interpreted,
    "pallas_gpu": pallas_gpu.quantize_activations,
    "pallas_gpu_interpret": pallas_gpu.interpreted,
}
DEFAULT = "xla"


def quantize_activations(x, *, bits=8, implementation: str | None = None):
    """x float [..., K] -> (integers int8 [..., K], scale float32 [..., 1]).

    bits: an int, or an int array [] that may be traced. `implementation`: a name in
    IMPLEMENTATIONS. Raises InputError, when traced, on an unknown implementation, one this
    machine cannot run, a width outside 2..8 and an x without axes.
    """
    name = DEFAULT if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise unknown_name("implementation of quantize_activations", name, IMPLEMENTATIONS)
    check_bits(bits)
    if not x.ndim:
        raise InputError("activations have shape [..., K]; got a scalar")
    return IMPLEMENTATIONS[name](x, bits=bits)
