"""The product as XLA runs it fastest: one int8 `dot_general`, everything else left to fuse.

Chosen by measurement on CPU (`benchmarks/matmul.py`). XLA hands an int8 x int8 -> int32 dot to its
own integer kernel and fuses dequantisation, bias and whatever follows (GELU, the next layer's
quantisation) into one loop, so a layer costs the product and one pass each way. Slower in the
forms tried: barriers before the quantisation (on jax 0.10), a uint8 left side, padded or split
operands, a product per sample, a float32 result type. Indifferent: a transposed weight, rows
flattened to two axes, barriers around the product.
"""

import jax.numpy as jnp
from jax import lax

from mpqdiff.kernels.epilogue import finish
from mpqdiff.kernels.quantize_activations.reference import token_scale
from mpqdiff.quantize.numerics import quantize_activation
from mpqdiff.quantize.pack import container_bits, unpack


def accumulate(xq, wq, *, w_bits=8):
    """xq int8 [..., K] and wq int8 [K,N], packed below 8 bits -> int32 [..., N], exact."""
    wq = wq if container_bits(w_bits) == 8 else unpack(wq, w_bits, (xq.shape[-1], wq.shape[-1]))
    contract = (((xq.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(xq, wq, contract, preferred_element_type=jnp.int32)


def quantized_matmul(
    x, weight, x_scale, x_zero_point, w_scale, w_colsum, bias, *, x_bits, w_bits, activation
):
    """See the package. The zero point is paid for with the column sums, after the product."""
    zero = 0 if x_zero_point is None else x_zero_point
    scale = token_scale(x, x_bits) if x_scale is None else x_scale
    total = accumulate(quantize_activation(x, scale, zero, x_bits), weight, w_bits=w_bits)
    if x_zero_point is not None:
        total = total - x_zero_point.astype(jnp.int32) * w_colsum
    # The barrier keeps this product of small arrays out of the loop over y.
    y = total.astype(jnp.float32) * lax.optimization_barrier(scale * w_scale)
    return finish(y, bias, activation)
