"""The convolution as XLA runs it fastest on a CPU, by shape; chosen by measurement
(`benchmarks/convolution.py`).

From 0.12 on XLA gives an int8 NHWC convolution to its own integer kernel, if input or output has
more than 16 channels and the output is no larger than the input: hence the padding here, of the
integers, and a channel or two more where there are few. Before, that kernel is slower than products
of rows of taps. Slower in the forms tried: float patches, int8 patches and one product, a product
per tap, the convolution's own padding, pairs of columns as channels, other layouts of the kernel
(which XLA runs in int32).
"""

from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
from jax import lax

from mpqdiff.kernels.quantized_conv.patches import patches, surround, taps
from mpqdiff.kernels.quantized_conv.reference import image_scale
from mpqdiff.kernels.quantized_matmul.xla import accumulate as dot
from mpqdiff.quantize.numerics import quantize_activation
from mpqdiff.quantize.pack import unpack

HAS_FAST_CONVOLUTION = jax.__version_info__ >= (0, 12)
FEW_INPUTS = 32  # kh*kw*C up to which rank-one products, all in one loop, are faster
WIDTH = 20  # channels to have where there are no more than 16


def accumulate(xq, wq, *, kernel_size, strides, w_bits=8):
    """Padded xq int8 [B,H,W,C] and wq int8 [kh*kw*C,N], packed below 8 bits -> int32 [B,h,w,N]."""
    channels, outputs = xq.shape[-1], wq.shape[-1]
    count = kernel_size[0] * kernel_size[1]
    wq = unpack(wq, w_bits, (count * channels, outputs))
    if all(step >= size for step, size in zip(strides, kernel_size, strict=True)):
        return dot(patches(xq, kernel_size, strides), wq)
    if count * channels <= FEW_INPUTS:
        sums = _rank_one
    elif count * outputs <= channels and tuple(strides) == (1, 1):
        sums = _each_tap_everywhere
    else:
        sums = _convolution if HAS_FAST_CONVOLUTION else _rows_of_taps
    return sums(xq, wq, tuple(kernel_size), tuple(strides))


def _rank_one(xq, wq, kernel_size, strides):
    """Products of one channel at one tap: XLA fuses all of them and their sum."""
    channels = xq.shape[-1]
    parts = [tap[..., c : c + 1] for tap in taps(xq, kernel_size, strides) for c in range(channels)]
    return reduce(add, [dot(part, wq[i : i + 1]) for i, part in enumerate(parts)])


def _each_tap_everywhere(xq, wq, kernel_size, strides):
    """One product with all taps at every position, then their sum, shifted: for few outputs."""
    channels, outputs = xq.shape[-1], wq.shape[-1]
    kernel = wq.reshape(-1, channels, outputs).swapaxes(0, 1).reshape(channels, -1)
    product = dot(xq, kernel)
    shifted = enumerate(taps(product, kernel_size, strides))
    return reduce(add, [tap[..., i * outputs : (i + 1) * outputs] for i, tap in shifted])


def _rows_of_taps(xq, wq, kernel_size, strides):
    """The taps of one kernel row side by side, gathered once; a product for each kernel row."""
    (tall, wide), (down, right) = kernel_size, strides
    row = lax.optimization_barrier(patches(xq, (1, wide), (1, right)))
    depth = wide * xq.shape[-1]
    met = enumerate(taps(row, (tall, 1), (down, 1)))
    return reduce(add, [dot(tap, wq[i * depth : (i + 1) * depth]) for i, tap in met])


def _convolution(xq, wq, kernel_size, strides):
    channels, outputs = xq.shape[-1], wq.shape[-1]
    kernel = wq.reshape(*kernel_size, channels, outputs)
    if max(channels, outputs) <= 16:
        more = (0, WIDTH - channels)
        xq = jnp.pad(xq, ((0, 0), (0, 0), (0, 0), more))
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), more, (0, 0)))
    return lax.conv_general_dilated(
        xq,
        kernel,
        strides,
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.int32,
    )


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
    accumulate=accumulate,
):
    """See the package, without bias. The zero point is paid for with the column sums, after the
    product; `accumulate` makes the int32 sums of padded integers."""
    scale = image_scale(x, x_bits) if x_scale is None else x_scale
    zero = jnp.int8(0) if x_zero_point is None else x_zero_point
    xq = _padded_integers(x, scale, zero, pads, x_bits)
    total = accumulate(xq, weight, kernel_size=kernel_size, strides=strides, w_bits=w_bits)
    if x_zero_point is not None:
        total = total - zero.astype(jnp.int32) * w_colsum
    # The barrier keeps this product of small arrays out of the loop over y.
    return total.astype(jnp.float32) * lax.optimization_barrier(scale * w_scale)


def _padded_integers(x, scale, zero, pads, bits):
    """Integers of x with `pads` of real zero around them, int8 [B,H',W',C]."""
    if not any(map(any, pads)):
        return quantize_activation(x, scale, zero, bits)
    if zero.ndim:  # each image is padded with its own integer
        return quantize_activation(surround(x, pads), scale, zero, bits)
    # Held apart, so that x is rounded in a plain loop, and what is padded is a fourth of its bytes.
    integers = lax.optimization_barrier(quantize_activation(x, scale, zero, bits))
    return surround(integers, pads, zero)
