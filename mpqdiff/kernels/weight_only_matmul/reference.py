"""The definition: x rounded to bfloat16, all else in float32."""

import jax.numpy as jnp
from jax.lax import Precision

from mpqdiff.kernels.epilogue import finish
from mpqdiff.quantize.pack import unpack


def weight_only_matmul(x, weight, w_scale, bias, *, w_bits, activation):
    """See the package."""
    integers = unpack(weight, w_bits, (x.shape[-1], weight.shape[-1])).astype(jnp.float32)
    rounded = x.astype(jnp.bfloat16).astype(jnp.float32)
    return finish(
        jnp.matmul(rounded, integers, precision=Precision.HIGHEST) * w_scale, bias, activation
    )
