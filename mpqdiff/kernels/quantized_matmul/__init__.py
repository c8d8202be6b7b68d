"""The integer product of a quantised layer: float in, float out, int8 x int8 -> int32 between.

y = x_scale * w_scale_n * (sum_k q_k w_kn - zero_point * colsum_n) + bias_n, q = the integers of x
(`quantize.numerics.quantize_activation`), then the layer's activation where one is asked for. The
sum is int32 and exact in every implementation; it meets a float only after it, once.
"""

import jax.numpy as jnp

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.kernels.epilogue import check_activation
from mpqdiff.kernels.quantized_matmul import pallas_gpu, pallas_tpu, reference, xla
from mpqdiff.quantize.numerics import check_bits
from mpqdiff.quantize.pack import packed_shape

IMPLEMENTATIONS = {
    "reference": reference.quantized_matmul,
    "xla": xla.quantized_matmul,
    "pallas_tpu": pallas_tpu.quantized_matmul,
    "pallas_interpret": pallas_tpu.interpreted,
    "pallas_gpu": pallas_gpu.quantized_matmul,
    "pallas_gpu_interpret": pallas_gpu.interpreted,
}
DEFAULT = "xla"

# |q - zero_point| <= 255 and |w| <= 127: up to this contraction no sum can leave int32.
MAX_CONTRACTION = (2**31 - 1) // (255 * 127)


def quantized_matmul(
    x,
    weight,
    x_scale,
    x_zero_point,
    w_scale,
    w_colsum,
    bias,
    *,
    x_bits=8,
    w_bits: int = 8,
    activation: str | None = None,
    implementation: str | None = None,
):
    """x float [..., K] times integers [K,N] -> float32 [..., N].

    weight: int8 [K,N], or below 8 bits as `quantize.pack.pack` packs it at `w_bits`; x_scale:
    float [] or one per leading index ([B], [B,P], or with trailing axes of size 1), or None for
    each token's own (`kernels.quantize_activations`); x_zero_point: integers likewise, or None for
    symmetric activations; w_scale float [N]; w_colsum int32 [N] (`numerics.column_sums`), needed
    only with a zero point; bias float [N] or None; x_bits: width of x's integers, which may be
    traced. activation: None, "gelu" (tanh) or "silu". `implementation`: a name in IMPLEMENTATIONS;
    "pallas_tpu" needs a TPU and "pallas_gpu" a GPU; "pallas_interpret" and "pallas_gpu_interpret"
    run the same kernels anywhere, slowly.
    Raises InputError, when traced, on an unknown name, an implementation this machine cannot run,
    shapes or dtypes that do not match, a zero point without column sums or without a scale, or a
    K above MAX_CONTRACTION.
    """
    name = DEFAULT if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise unknown_name("implementation of quantized_matmul", name, IMPLEMENTATIONS)
    check_operands(x, weight, x_zero_point, w_colsum, x_bits, w_bits)
    check_activation(activation)
    if x_scale is None and x_zero_point is not None:
        raise InputError("x_scale None takes symmetric scales; pass x_zero_point=None with it")
    scale = None if x_scale is None else per_leading_index(x_scale, x.ndim)
    zero = None if x_zero_point is None else per_leading_index(x_zero_point, x.ndim)
    return IMPLEMENTATIONS[name](
        x,
        weight,
        scale,
        zero,
        w_scale,
        w_colsum,
        bias,
        x_bits=x_bits,
        w_bits=w_bits,
        activation=activation,
    )


def check_operands(x, weight, x_zero_point, w_colsum, x_bits, w_bits=8) -> None:
    """Raises InputError on operands that no implementation can multiply exactly."""
    check_bits(x_bits)
    check_weight(x, weight, w_bits)
    if x_zero_point is not None and w_colsum is None:
        raise InputError("a zero point needs w_colsum: pass numerics.column_sums(weight)")
    if x.shape[-1] > MAX_CONTRACTION:
        raise InputError(
            f"a contraction of {x.shape[-1]} can overflow int32; at most {MAX_CONTRACTION} is "
            "exact: split the layer along its inputs and add the parts, or leave it in float"
        )


def check_weight(x, weight, w_bits) -> None:
    """Raises InputError unless `weight` is int8 [K,N], or that packed at `w_bits`."""
    fits = weight.ndim == 2 and weight.dtype == jnp.int8
    if not fits or weight.shape != packed_shape((x.shape[-1], weight.shape[1]), w_bits):
        rows = packed_shape((x.shape[-1], 1), w_bits)[0]
        raise InputError(
            f"weight {weight.dtype}{list(weight.shape)} against x {list(x.shape)} at {w_bits} "
            f"bits: expected int8 [{rows}, N]; unpack and flatten the kernel first, or pass w_bits "
            "of a packed one"
        )


def per_leading_index(value, ndim: int):
    """`value` [], [B], [B,P], ... with trailing axes of size 1 up to `ndim`, to scale x from."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (ndim - value.ndim)) if value.ndim else value
