"""Values of a traced program that depend on parameters and constants alone, not yet computed.

The weight of a product may reach it through slices, transposes, scalings or a scan over stacked
layers. As an expression it is known by its key, whatever batch the program was traced for: found
once, computed once, and afterwards replaced by what was computed.
"""

import hashlib
import re
from collections.abc import Callable, MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import eval_jaxpr
from jax.extend import core


@dataclass(eq=False)
class Node:
    """One step: `compute(*inputs) -> outputs`, or the parameter `leaf`.

    `describe()` tells equal steps from different ones; `own_layers` are the iterations of the scans
    in which a node took its slice of a stacked parameter.
    """

    describe: Callable[[], str]
    inputs: "tuple[Expression, ...]" = ()
    compute: Callable[..., tuple] | None = None
    leaf: str | None = None
    own_layers: tuple[int, ...] = ()

    @cached_property
    def key(self) -> str:
        """Equal for steps that compute the same from the same parameters, in any trace."""
        parts = [self.describe(), *(f"{one.node.key}.{one.index}" for one in self.inputs)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    @cached_property
    def leaves(self) -> frozenset[str]:
        """The parameters it depends on."""
        own = frozenset() if self.leaf is None else frozenset({self.leaf})
        return own.union(*(one.node.leaves for one in self.inputs))

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layer of a stacked parameter that it belongs to, or () where none is stacked."""
        return max((self.own_layers, *(one.node.layers for one in self.inputs)), key=len)


class Expression(NamedTuple):
    """One output of a node, of `shape` and `dtype`."""

    node: Node
    index: int
    shape: tuple[int, ...]
    dtype: Any

    @property
    def key(self) -> str:
        return f"{self.node.key}.{self.index}"

    @property
    def leaves(self) -> frozenset[str]:
        return self.node.leaves

    @property
    def layers(self) -> tuple[int, ...]:
        return self.node.layers


def leaf(name: str, like) -> Expression:
    """The parameter `name`, of the shape and type of `like`."""
    return Expression(Node(lambda: f"parameter {name}", leaf=name), 0, like.shape, like.dtype)


def constant(value) -> Expression:
    """A value that the program holds."""

    def describe() -> str:
        plain = value
        if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.extended):
            plain = jax.random.key_data(value)
        array = np.asarray(plain)
        return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"

    node = Node(describe, compute=lambda: (value,))
    return Expression(node, 0, np.shape(value), jax.dtypes.result_type(value))


def of_equation(
    equation, inputs: tuple[Expression, ...], scope: str | None = None
) -> list[Expression]:
    """The outputs of a step of the program whose operands are all expressions, under `scope`."""

    def compute(*values) -> tuple:
        with jax.named_scope(scope) if scope else nullcontext():
            return tuple(execute(equation, values))

    def describe() -> str:
        # Addresses of functions differ between traces of one program.
        params = sorted(equation.params.items())
        return re.sub(r"0x[0-9a-f]+", "", f"{equation.primitive.name} {params}")

    node = Node(describe, inputs, compute)
    found = [
        Expression(node, index, out.aval.shape, out.aval.dtype)
        for index, out in enumerate(equation.outvars)
    ]
    return [_folded(one) for one in found]


def _folded(expression: Expression) -> Expression:
    """A number that depends on no parameter is computed at once: layer counters, mostly."""
    extended = jnp.issubdtype(expression.dtype, jax.dtypes.extended)
    if expression.leaves or expression.shape or extended:
        return expression
    with jax.ensure_compile_time_eval():
        return constant(evaluate(expression, lambda name: None, {}))


def layer(stacked: Expression, index: int, layers: tuple[int, ...]) -> Expression:
    """`stacked[index]`, what iteration `layers` of nested scans sees of a stacked parameter."""
    node = Node(
        lambda: f"layer {index}",
        (stacked,),
        lambda value: (at(value, index),),
        own_layers=layers if stacked.leaves else (),
    )
    return Expression(node, 0, stacked.shape[1:], stacked.dtype)


def at(value, index: int):
    """value[index], without a copy where it lies on the host."""
    if isinstance(value, np.ndarray):
        return value[index]
    return lax.index_in_dim(value, index, keepdims=False)


def arranged(whole: Expression, order: tuple[int, ...], shape: tuple[int, ...]) -> Expression:
    """`whole` with its axes in `order`, reshaped to `shape`; itself where that changes nothing."""
    if tuple(order) == tuple(range(len(order))) and tuple(shape) == tuple(whole.shape):
        return whole
    node = Node(
        lambda: f"arranged {order} {shape}",
        (whole,),
        lambda value: (value.transpose(order).reshape(shape),),
    )
    return Expression(node, 0, tuple(shape), whole.dtype)


def evaluate(expression: Expression, read: Callable[[str], Any], memo: MutableMapping):
    """The value, with `read(leaf name)`; `memo` keeps what several expressions share."""
    node = expression.node
    if node not in memo:
        if node.compute is None:
            memo[node] = (read(node.leaf or ""),)
        else:
            memo[node] = node.compute(*(evaluate(one, read, memo) for one in node.inputs))
    return memo[node][expression.index]


@cache
def _empty():
    return jax.make_jaxpr(lambda: ())().jaxpr


def execute(equation, values) -> list:
    """The outputs of one equation of a jaxpr, as jax itself runs it."""
    variables, given = [], []
    for atom, value in zip(equation.invars, values, strict=True):
        if not isinstance(atom, core.Literal) and atom not in variables:
            variables.append(atom)
            given.append(value)
    jaxpr = _empty().replace(
        invars=variables, outvars=equation.outvars, eqns=[equation], effects=equation.effects
    )
    return eval_jaxpr(jaxpr, (), *given)
