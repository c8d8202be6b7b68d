"""The integer product of a quantised layer: float in, float out, int8 x int8 -> int32 between.

y = x_scale * w_scale_n * (sum_k q_k w_kn - zero_point * colsum_n) + bias_n, q = the integers of x
(`quantize.numerics.quantize_activation`). The sum is int32 and exact; it meets a float only in the
last line, once.
"""

import jax.numpy as jnp

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.kernels.quantized_matmul import reference, xla
from mpqdiff.quantize.numerics import check_bits

IMPLEMENTATIONS = {
    "reference": reference.quantized_matmul,
    "xla": xla.quantized_matmul,
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
    implementation: str | None = None,
):
    """x float [..., K] times weight int8 [K,N] -> float32 [..., N].

    x_scale: float [] or one per leading index ([B], [B,P], or with trailing axes of size 1);
    x_zero_point: integers likewise, or None for symmetric activations; w_scale float [N];
    w_colsum int32 [N] (`numerics.column_sums`), needed only with a zero point; bias float [N] or
    None; x_bits: width of the activation. `implementation`: a name in IMPLEMENTATIONS.
    Raises InputError, when traced, on an unknown implementation, shapes or dtypes that do not
    match, a zero point without column sums, or a K above MAX_CONTRACTION.
    """
    name = DEFAULT if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise unknown_name("implementation of quantized_matmul", name, IMPLEMENTATIONS)
    check_operands(x, weight, x_zero_point, w_colsum, x_bits)
    scale = per_leading_index(x_scale, x.ndim)
    zero = None if x_zero_point is None else per_leading_index(x_zero_point, x.ndim)
    return IMPLEMENTATIONS[name](x, weight, scale, zero, w_scale, w_colsum, bias, x_bits=x_bits)


def check_operands(x, weight, x_zero_point, w_colsum, x_bits) -> None:
    """Raises InputError on operands that no implementation can multiply exactly."""
    check_bits(x_bits)
    if weight.dtype != jnp.int8 or weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
        raise InputError(
            f"weight {weight.dtype}{list(weight.shape)} against x {list(x.shape)}: expected int8 "
            f"[{x.shape[-1]}, N]; unpack and flatten the kernel first"
        )
    if x_zero_point is not None and w_colsum is None:
        raise InputError("a zero point needs w_colsum: pass numerics.column_sums(weight)")
    if weight.shape[0] > MAX_CONTRACTION:
        raise InputError(
            f"a contraction of {weight.shape[0]} can overflow int32; at most {MAX_CONTRACTION} is "
            "exact: split the layer along its inputs and add the parts, or leave it in float"
        )


def per_leading_index(value, ndim: int):
    """`value` [], [B], [B,P], ... with trailing axes of size 1 up to `ndim`, to scale x from."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (ndim - value.ndim)) if value.ndim else value
