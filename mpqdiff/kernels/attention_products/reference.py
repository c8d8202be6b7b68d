"""The definition of the product, in the plainest arithmetic that states it."""

import jax.numpy as jnp

from mpqdiff.kernels.quantized_matmul.reference import quantize


def accumulate(left, right, zero, *, transposed):
    """Integers left [B,H,M,K], right [B,H,K,N] or, transposed, [B,H,N,K] -> int32 [B,H,M,N]: the
    sums of (left - zero) right; zero is integers, broadcastable to left."""
    equation = "bhmk,bhnk->bhmn" if transposed else "bhmk,bhkn->bhmn"
    return jnp.einsum(equation, left.astype(jnp.int32) - zero, right.astype(jnp.int32))


def product(left, right, left_scale, zero, right_scale, *, transposed, left_bits, right_bits):
    """See the package. The zero point is subtracted from the integers themselves."""
    zero = jnp.int32(0) if zero is None else zero.astype(jnp.int32)
    integers = quantize(left, left_scale, zero, left_bits)
    others = quantize(right, right_scale, 0, right_bits)
    total = accumulate(integers, others, zero, transposed=transposed)
    return total.astype(jnp.float32) * (left_scale * right_scale)
