"""The back ends of integer products: how each holds weights, opens them, and multiplies."""

from functools import partial

import numpy as np

from mpqdiff.errors import unknown_name
from mpqdiff.kernels.gpu import require_gpu
from mpqdiff.kernels.quantized_matmul import quantized_matmul
from mpqdiff.kernels.tpu import require_tpu
from mpqdiff.quantize.pack import pack, unpack


def _kernels_backend():
    def open_(packed, *, bits, shape):
        return unpack(packed, bits, shape)

    return pack, open_, quantized_matmul


def check_backend(backend: str) -> None:
    """Raises InputError on a back end that is unknown, or that cannot run on this machine."""
    if backend not in BACKENDS:
        raise unknown_name("back end", backend, BACKENDS)
    if backend == "pallas_tpu":
        require_tpu("quantize.backend")
    if backend == "pallas_gpu":
        require_gpu("quantize.backend")


def _packed_backend(implementation: str):
    """Packed weights go to the kernel `implementation` as they are, with their width."""

    def matmul(x, held, scale, *rest, x_bits):
        packed, bits = held
        return quantized_matmul(
            x, packed, scale, *rest, x_bits=x_bits, w_bits=bits, implementation=implementation
        )

    return pack, lambda packed, *, bits, shape: (packed, bits), matmul


def _aqt_backend():
    from mpqdiff.quantize import aqt  # the one import site; AQT is slow to import

    return aqt.hold, aqt.open_, aqt.aqt_matmul


def _transposed_backend(implementation: str):
    """The same with packed weights held transposed, as the GPU kernel reads them: XLA drops the
    two transposes."""
    _, open_, matmul = _packed_backend(implementation)

    def hold(qvalue, bits):
        return np.ascontiguousarray(pack(qvalue, bits).T)

    return hold, lambda held, *, bits, shape: open_(held.T, bits=bits, shape=shape), matmul


MEASURED = "measured"  # of a recipe: each site's own, the quickest (`seconds.backends`)

# How a back end holds integer weights, opens them inside the program, and multiplies. "kernels" is
# XLA's integer product, which runs everywhere; the others are named by their implementation.
BACKENDS = {
    "kernels": _kernels_backend,
    "pallas_tpu": partial(_packed_backend, "pallas_tpu"),
    "pallas_gpu": partial(_transposed_backend, "pallas_gpu"),
    "pallas_interpret": partial(_packed_backend, "pallas_interpret"),
    "pallas_gpu_interpret": partial(_transposed_backend, "pallas_gpu_interpret"),
    "aqt": _aqt_backend,
}
