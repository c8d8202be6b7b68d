"""The definition of the product, in the plainest arithmetic that states it."""

import jax.numpy as jnp

from mpqdiff.quantize.numerics import qmax


def quantize(x, scale, zero_point, bits):
    """Integers of x, int32: round half to even, then saturate. NaN counts as 0."""
    limit = qmax(bits)
    steps = jnp.round(x.astype(jnp.float32) * (1.0 / jnp.asarray(scale, jnp.float32)))
    steps = jnp.clip(jnp.where(jnp.isnan(steps), 0.0, steps), -4 * limit, 4 * limit)
    return jnp.clip(steps.astype(jnp.int32) + zero_point, -limit - 1, limit)


def accumulate(xq, wq):
    """xq [..., K] and wq [K,N], integers of any width -> int32 [..., N]."""
    return jnp.matmul(xq.astype(jnp.int32), wq.astype(jnp.int32))


def quantized_matmul(x, weight, x_scale, x_zero_point, w_scale, w_colsum, bias, *, x_bits):
    """See the package. The zero point is subtracted from the integers themselves."""
    del w_colsum  # a shortcut of the fast form; here it follows from the definition
    zero = jnp.int32(0) if x_zero_point is None else x_zero_point.astype(jnp.int32)
    total = accumulate(quantize(x, x_scale, zero, x_bits) - zero, weight)
    y = total.astype(jnp.float32) * x_scale * w_scale
    return y if bias is None else y + bias
