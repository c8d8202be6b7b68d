"""The names of sites that were found in a program: by their parameter, or by their name scope."""

import re

from mpqdiff.program.expression import Expression
from mpqdiff.program.walk import Place

# Where `params` hold the leaves that are read as they are. Apart from the kernels: a bias beside a
# kernel would be taken for a part of its site.
REST = "~rest"


def weight_name(weight: Expression, shapes, taken: set[str]) -> str:
    """The path of the largest parameter in `weight`, less a last "kernel", and the layer.

    "~1", "~2", ... on further ways in which a parameter is multiplied.
    """
    leaf = max(sorted(weight.leaves), key=lambda name: shapes[name].size)
    return _free(re.sub(r"/kernel$", "", leaf) + _layer(weight.layers), taken)


def product_name(place: Place, taken: set[str]) -> str:
    """The modules around a product of two activations, and the layer."""
    stack = re.sub(r"\w+\(([^()]*)\)", r"\1", place.stack)  # "vmap(block)" is the block
    parts = stack.split("/")[1:]  # the first is the model
    # jnp.einsum names its scope by its equation.
    kept = [part for part in parts if part and "->" not in part]
    return _free("/".join(kept or ["product"]) + _layer(place.layers), taken)


def _layer(layers: tuple[int, ...]) -> str:
    # Not "@": XLA cuts the names of its operations there, and with them the proof of execution.
    return f":{'.'.join(map(str, layers))}" if layers else ""


def _free(name: str, taken: set[str]) -> str:
    """`name`, or with a number where it is taken or could not be in one tree with what is."""
    count, candidate = 0, name
    while any(_clash(candidate, other) for other in taken):
        count += 1
        candidate = f"{name}~{count}"
    return candidate


def _clash(one: str, other: str) -> bool:
    """Whether two names are equal, or the kernel of one would lie where the other's modules do."""
    return (
        one == other
        or f"{one}/".startswith(f"{other}/kernel/")
        or (f"{other}/".startswith(f"{one}/kernel/"))
    )
