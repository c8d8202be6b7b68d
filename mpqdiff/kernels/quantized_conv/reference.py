"""The definition of the convolution, in the plainest arithmetic that states it."""

import jax.numpy as jnp

from mpqdiff.kernels.quantize_activations.reference import token_scale
from mpqdiff.kernels.quantized_conv.patches import surround
from mpqdiff.kernels.quantized_matmul.reference import quantize
from mpqdiff.quantize.pack import unpack


def image_scale(x, bits):
    """Each image's own scale: largest finite magnitude over qmax, x [B,H,W,C] -> [B,1,1,1]."""
    size = x.shape[1] * x.shape[2] * x.shape[3]
    return token_scale(x.reshape(x.shape[0], size), bits)[..., None, None]


def accumulate(xq, wq, *, kernel_size, strides, w_bits=8):
    """xq integers [B,H,W,C], padded, and wq integers [kh*kw*C,N], packed below 8 bits -> int32
    [B,h,w,N]: the sum over taps and channels, position by position."""
    (tall, wide), (down, right) = kernel_size, strides
    kernel = unpack(wq, w_bits, (tall, wide, xq.shape[-1], wq.shape[-1])).astype(jnp.int32)
    rows, columns = (xq.shape[1] - tall) // down + 1, (xq.shape[2] - wide) // right + 1
    total = jnp.zeros((xq.shape[0], rows, columns, wq.shape[-1]), jnp.int32)
    for i in range(tall):
        for j in range(wide):
            met = xq[:, jnp.arange(rows) * down + i][:, :, jnp.arange(columns) * right + j]
            total += jnp.matmul(met.astype(jnp.int32), kernel[i, j])
    return total


def quantized_conv(
    x,
    weight,
    x_scale,
    x_zero_point,
    w_scale,
    w_colsum,
    *,
    kernel_size,
    strides,
    pads,
    x_bits,
    w_bits,
):
    """See the package, without bias. The zero point is subtracted from the integers themselves, so
    that padding is 0."""
    del w_colsum  # a shortcut of the fast form; here it follows from the definition
    zero = jnp.int32(0) if x_zero_point is None else x_zero_point.astype(jnp.int32)
    scale = image_scale(x, x_bits) if x_scale is None else x_scale
    centred = quantize(x, scale, zero, x_bits) - zero
    padded = surround(centred, pads)
    total = accumulate(padded, weight, kernel_size=kernel_size, strides=strides, w_bits=w_bits)
    return total.astype(jnp.float32) * scale * w_scale
