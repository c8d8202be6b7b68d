"""AQT as a back end: our integers in AQT's tensors, multiplied by AQT's `dot_general`.

The only file that imports AQT. Scales and integers are ours (`numerics`), because AQT's own
calibration maps the largest value to qmax + 0.5: fed the same integers, the accumulators are equal.
AQT refuses biases (its zero points) outside of fake quantisation, so the zero point is subtracted
here, from the int32 accumulator.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from aqt.jax.v2 import utils
from aqt.jax.v2.aqt_dot_general import DotGeneralRaw, dot_general_raw_make
from aqt.jax.v2.aqt_tensor import QTensor

from mpqdiff.kernels.quantize_activations.reference import token_scale
from mpqdiff.kernels.quantized_matmul import check_operands, per_leading_index
from mpqdiff.quantize.numerics import check_bits, quantize_activation


def container_dtype(bits: int):
    """AQT's container for a width: int4 for 4, int8 for every other (2 and 3 included)."""
    check_bits(bits)
    return utils.infer_dtype_from_bits(bits)


def hold(qvalue, bits: int):
    """Integers [K,N] in AQT's container, on the device."""
    return jnp.asarray(np.asarray(qvalue).astype(container_dtype(bits)))


def open_(held, *, bits: int, shape: Sequence[int]):
    """int8 values of `shape` from `hold`'s container.

    int4 is widened before the product: AQT would hand XLA an int8 x int4 dot, which XLA on CPU
    turns into a much slower int32 x int32 one.
    """
    del bits
    return held.astype(jnp.int8).reshape(tuple(shape))


def container_bytes(held: jax.Array) -> int:
    """Bytes that the device really holds for a container.

    jax 0.10 keeps int4 on CPU at a byte each, later versions at half a byte.
    """
    return held.on_device_size_in_bytes()


def accumulate(xq, wq):
    """xq int8 [..., K] and wq int8 [K,N] -> int32 [..., N], by AQT's quantised dot_general."""
    contract = (((xq.ndim - 1,), (0,)), ((), ()))
    # AQT multiplies the tensors' integers; from the plain operands it takes the result's dtype,
    # and int32 is the one in which its dequantisation by no scales loses nothing.
    plain = xq.astype(jnp.int32), wq.astype(jnp.int32)
    return _int32_product()(*plain, _integers(xq), _integers(wq), contract)[0]


def aqt_matmul(x, weight, x_scale, x_zero_point, w_scale, w_colsum, bias, *, x_bits=8):
    """`kernels.quantized_matmul` with AQT's tensors, product and dequantisation.

    Same arguments, result to float rounding, and errors raised.
    """
    check_operands(x, weight, x_zero_point, w_colsum, x_bits)
    scale = token_scale(x, x_bits) if x_scale is None else per_leading_index(x_scale, x.ndim)
    zero = jnp.int32(0) if x_zero_point is None else per_leading_index(x_zero_point, x.ndim)
    total = accumulate(quantize_activation(x, scale, zero, x_bits), weight)
    if x_zero_point is not None:
        total = total - zero.astype(jnp.int32) * w_colsum
    # AQT subtracts its biases when it dequantises.
    offsets = [] if bias is None else [-jnp.asarray(bias, jnp.float32)]
    return _tensor(total, [scale, w_scale], offsets, jnp.float32).dequant()


def _int32_product() -> DotGeneralRaw:
    """AQT's dot_general without calibration of its own; a config is mutable, hence a fresh one."""
    product = dot_general_raw_make()
    product.dg_accumulator_dtype = jnp.int32
    return product


def _integers(qvalue) -> QTensor:
    return _tensor(qvalue, [], [], jnp.int32)


def _tensor(qvalue, scale, bias, dtype) -> QTensor:
    # pyright does not follow the partial application that makes AQT's classes dataclasses.
    fields = {"qvalue": qvalue, "scale": scale, "scale_t": None, "bias": bias}
    return QTensor(**fields, dequant_dtype=dtype)  # pyright: ignore[reportCallIssue]
