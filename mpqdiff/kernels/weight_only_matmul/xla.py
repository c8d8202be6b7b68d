"""One bfloat16 product with float32 sums; XLA may keep the opened weights in memory."""

import jax.numpy as jnp
from jax import lax

from mpqdiff.kernels.epilogue import finish
from mpqdiff.quantize.pack import unpack


def weight_only_matmul(x, weight, w_scale, bias, *, w_bits, activation):
    """See the package."""
    integers = unpack(weight, w_bits, (x.shape[-1], weight.shape[-1])).astype(jnp.bfloat16)
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    total = lax.dot_general(
        x.astype(jnp.bfloat16), integers, contract, preferred_element_type=jnp.float32
    )
    return finish(total * w_scale, bias, activation)
