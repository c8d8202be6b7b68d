"""What follows a product, alike in every implementation: bias, then the layer's activation."""

from functools import partial

import jax

from mpqdiff.errors import unknown_name

ACTIVATIONS = {"gelu": partial(jax.nn.gelu, approximate=True), "silu": jax.nn.silu}


def check_activation(activation: str | None) -> None:
    """Raises InputError on an activation that is neither None nor a name in ACTIVATIONS."""
    if activation is not None and activation not in ACTIVATIONS:
        raise unknown_name("activation after a product", activation, ACTIVATIONS)


def finish(y, bias, activation: str | None):
    """activation(y + bias): y float [..., N], bias float broadcastable to it or None."""
    y = y if bias is None else y + bias
    return y if activation is None else ACTIVATIONS[activation](y)
