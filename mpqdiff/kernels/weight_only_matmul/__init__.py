"""The product of a layer whose weights alone are integers: bfloat16 activations, float32 sums.

y = w_scale_n * sum_k bf16(x_k) w_kn + bias_n, then the layer's activation where one is asked for.
Integers up to 8 bits are exact in bfloat16, so the scale is all that rounding can touch.
"""

from mpqdiff.errors import unknown_name
from mpqdiff.kernels.epilogue import check_activation
from mpqdiff.kernels.quantized_matmul import check_weight
from mpqdiff.kernels.weight_only_matmul import pallas_gpu, pallas_tpu, reference, xla

IMPLEMENTATIONS = {
    "reference": reference.weight_only_matmul,
    "xla": xla.weight_only_matmul,
    "pallas_tpu": pallas_tpu.weight_only_matmul,
    "pallas_interpret": pallas_tpu.interpreted,
    "pallas_gpu": pallas_gpu.weight_only_matmul,
    "pallas_gpu_interpret": pallas_gpu.interpreted,
}
DEFAULT = "xla"


def weight_only_matmul(
    x,
    weight,
    w_scale,
    bias,
    *,
    w_bits: int = 8,
    activation: str | None = None,
    implementation: str | None = None,
):
    """x float [..., K] times integers [K,N] -> float32 [..., N].

    weight: int8 [K,N], or below 8 bits as `quantize.pack.pack` packs it at `w_bits`; w_scale float
    [N]; bias float [N] or None; activation: None, "gelu" (tanh) or "silu"; `implementation`: a
    name in IMPLEMENTATIONS. Raises InputError, when traced, on an unknown name, an
    implementation this machine cannot run, and a weight of another shape or type.
    """
    name = DEFAULT if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise unknown_name("implementation of weight_only_matmul", name, IMPLEMENTATIONS)
    check_weight(x, weight, w_bits)
    check_activation(activation)
    return IMPLEMENTATIONS[name](x, weight, w_scale, bias, w_bits=w_bits, activation=activation)
