"""A product of two activations as a module, so that attention products have a path of their own."""

import flax.linen as nn
import jax.numpy as jnp


class Product(nn.Module):
    """`einsum(equation, lhs, rhs)`: no parameters, yet a site to observe and rewrite."""

    equation: str

    @nn.compact
    def __call__(self, lhs, rhs):
        return jnp.einsum(self.equation, lhs, rhs)
