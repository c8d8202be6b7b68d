"""The blocked product of `quantized_matmul` with bfloat16 values; planes open in the kernel."""

from functools import partial

import jax.numpy as jnp

from mpqdiff.kernels import gpu
from mpqdiff.kernels.quantized_matmul.pallas_gpu import blocked_product
from mpqdiff.quantize.pack import container_bits


def weight_only_matmul(x, weight, w_scale, bias, *, w_bits, activation, interpret=False):
    """See the package. Raises InputError off a GPU unless interpreted, and without Triton."""
    if not interpret:
        gpu.require_gpu("weight_only_matmul")
    # `gpu.planes` gives integers times this power of two, which a scale takes exactly.
    spare = 2.0 ** (8 - container_bits(w_bits))
    operands = {"w_scale": jnp.asarray(w_scale, jnp.float32) / spare, "bias": bias}
    return blocked_product(
        x.astype(jnp.bfloat16),
        weight,
        operands,
        w_bits=w_bits,
        activation=activation,
        interpret=interpret,
    )


interpreted = partial(weight_only_matmul, interpret=True)
