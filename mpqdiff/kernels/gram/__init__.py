"""The Gram of centred features, which the orthogonality score reads, and the raw row sums.

With m the mean over samples of x [N,F]: gram = (x - m)(x - m)', row_sums_i = sum_j <x_i, x_j> =
N <x_i, m>. Centring features rather than the Gram keeps float32 exact when the mean is large.
"""

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.kernels.gram import pallas_gpu, pallas_tpu, reference, xla

IMPLEMENTATIONS = {
    "reference": reference.gram,
    "xla": xla.gram,
    "pallas_tpu": pallas_tpu.gram,
    "pallas_interpret": pallas_tpu.interpreted,
    "pallas_gpu": pallas_gpu.gram,
    "pallas_gpu_interpret": pallas_gpu.interpreted,
}
DEFAULT = "xla"


def gram(x, *, implementation: str | None = None):
    """x float [N, ...] -> (symmetric float32 [N,N], row sums of the raw Gram float32 [N]).

    `implementation`: a name in IMPLEMENTATIONS. Raises InputError, when traced, on an unknown
    implementation, one this machine cannot run, or an x without samples or features.
    """
    name = DEFAULT if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise unknown_name("implementation of gram", name, IMPLEMENTATIONS)
    if x.ndim < 2 or not x.size:
        raise InputError(f"x {list(x.shape)}: expected samples and features, [N, ...], none empty")
    total, row_sums = IMPLEMENTATIONS[name](x.reshape(x.shape[0], -1))
    return (total + total.T) / 2, row_sums
