"""Patches of a padded image, for products that take rows."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax


def surround(x, pads: Sequence[tuple[int, int]], value=0):
    """x [B,H,W,C] with `pads` of `value` before and after on both axes of the image."""
    return lax.pad(x, jnp.asarray(value, x.dtype), ((0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)))


def taps(x, kernel_size: Sequence[int], strides: Sequence[int]) -> list:
    """What each tap of a kernel meets: kh*kw arrays [B,h,w,C] of x [B,H,W,C], which is padded."""
    (tall, wide), (down, right) = kernel_size, strides
    last_row, last_column = x.shape[1] - tall + 1, x.shape[2] - wide + 1
    return [
        x[:, i : i + last_row : down, j : j + last_column : right]
        for i in range(tall)
        for j in range(wide)
    ]


def patches(x, kernel_size: Sequence[int], strides: Sequence[int]):
    """x [B,H,W,C], which is padded, as rows in the order of a flattened kernel: [B,h,w,kh*kw*C]."""
    return jnp.concatenate(taps(x, kernel_size, strides), axis=-1)


def by_patches(product: Callable) -> Callable:
    """The int32 sums of a convolution by `product(patches, weight, w_bits=)`."""

    def accumulate(xq, wq, *, kernel_size, strides, w_bits=8):
        return product(patches(xq, kernel_size, strides), wq, w_bits=w_bits)

    return accumulate
