"""The definition of the product, in the plainest arithmetic that states it."""

import jax.numpy as jnp

from mpqdiff.kernels.epilogue import finish
from mpqdiff.kernels.quantize_activations.reference import token_scale
from mpqdiff.quantize.numerics import qmax
from mpqdiff.quantize.pack import container_bits, unpack


def quantize(x, scale, zero_point, bits):
    """Integers of x, int32: round half to even, then saturate. NaN counts as 0."""
    limit = qmax(bits)
    steps = jnp.round(x.astype(jnp.float32) * (1.0 / jnp.asarray(scale, jnp.float32)))
    steps = jnp.clip(jnp.where(jnp.isnan(steps), 0.0, steps), -4 * limit, 4 * limit)
    return jnp.clip(steps.astype(jnp.int32) + zero_point, -limit - 1, limit)


def accumulate(xq, wq, *, w_bits=8):
    """xq integers [..., K] and wq integers [K,N], packed below 8 bits -> int32 [..., N]."""
    wq = wq if container_bits(w_bits) == 8 else unpack(wq, w_bits, (xq.shape[-1], wq.shape[-1]))
    return jnp.matmul(xq.astype(jnp.int32), wq.astype(jnp.int32))


def quantized_matmul(
    x, weight, x_scale, x_zero_point, w_scale, w_colsum, bias, *, x_bits, w_bits, activation
):
    """See the package. The zero point is subtracted from the integers themselves."""
    del w_colsum  # a shortcut of the fast form; here it follows from the definition
    zero = jnp.int32(0) if x_zero_point is None else x_zero_point.astype(jnp.int32)
    scale = token_scale(x, x_bits) if x_scale is None else x_scale
    total = accumulate(quantize(x, scale, zero, x_bits) - zero, weight, w_bits=w_bits)
    return finish(total.astype(jnp.float32) * scale * w_scale, bias, activation)
