"""A traced program run step by step: calls inlined, scans over layers unrolled, products handed on.

Values are arrays (they depend on x_t, t or cond) or expressions (`expression`). A rematerialised
call changes no value and a jitted one neither, so both are run as what they hold. A scan over
parameters runs once per layer, so that each layer's products are products of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core

from mpqdiff import intercept
from mpqdiff.program import expression, signs
from mpqdiff.program.expression import Expression

PRODUCTS = ("dot_general", "conv_general_dilated")

# Unrolled, a loop is traced and compiled once for each of its steps.
MAX_UNROLL = 256

# Why products inside these are left in float (`intercept.LEFT`); "other" for the rest.
CONTAINERS = {"scan": "loop", "while": "while", "cond": "branch"}


class Place(NamedTuple):
    """Where an equation is: the name scopes around its jaxpr, its own, and the iteration of every
    unrolled scan around it."""

    outer: str = ""
    own: str = ""
    layers: tuple[int, ...] = ()

    @property
    def stack(self) -> str:
        return "/".join(filter(None, (self.outer, self.own)))

    @property
    def inside(self) -> "Place":
        return Place(self.stack, "", self.layers)


ROOT = Place()


class Context(NamedTuple):
    """What a run needs: `read(leaf name)`, what was computed, and what to do with a product,
    `product(equation, operands, place, nonnegative) -> array`; None where only values are asked
    for. `nonnegative`: which of the operands are known not to be negative (`signs`)."""

    read: Callable[[str], Any]
    memo: dict
    product: Callable[[Any, list, Place, list[bool]], Any] | None = None

    def value(self, operand):
        """The array of an operand."""
        if isinstance(operand, Expression):
            return expression.evaluate(operand, self.read, self.memo)
        return operand


def run(
    closed,
    operands: Sequence,
    context: Context,
    place: Place = ROOT,
    nonnegative: Sequence[bool] = (),
) -> list:
    """The outputs of a closed jaxpr on `operands`, arrays or expressions as they come, some of them
    known not to be negative."""
    jaxpr = closed.jaxpr
    is_known = signs.nonnegative(jaxpr, nonnegative)
    env = dict(zip(jaxpr.constvars, map(_lifted, closed.consts), strict=True))
    env |= dict(zip(jaxpr.invars, operands, strict=True))

    def look(atom):
        return expression.constant(atom.val) if isinstance(atom, core.Literal) else env[atom]

    for equation in jaxpr.eqns:
        values = [look(atom) for atom in equation.invars]
        here = place._replace(own=str(equation.source_info.name_stack))
        flags = [is_known(atom) for atom in equation.invars]
        outs = _step(equation, values, context, here, flags)
        env.update(zip(equation.outvars, outs, strict=True))
    return [look(atom) for atom in jaxpr.outvars]


def _lifted(value):
    return value if isinstance(value, Tracer) else expression.constant(value)


def _step(equation, values: list, context: Context, place: Place, nonnegative: list[bool]) -> list:
    if all(isinstance(value, Expression) for value in values) and not equation.effects:
        why = intercept.left_scope("parameters") if has_products(equation) else None
        return expression.of_equation(equation, tuple(values), why)
    name = equation.primitive.name
    if name in PRODUCTS and context.product:
        return [context.product(equation, values, place, nonnegative)]
    inner = callee(equation)
    if inner is not None:
        return run(inner, values, context, place.inside, nonnegative)
    if name == "scan" and _over_layers(equation, values):
        return _unrolled(equation, values, context, place)
    if has_products(equation):
        return left(equation, values, context, place, CONTAINERS.get(name, "other"))
    return execute(equation, values, context, place)


def execute(equation, values: list, context: Context, place: Place) -> list:
    """The equation as it is, under its name scopes."""
    arrays = [context.value(value) for value in values]
    if not place.outer:
        return expression.execute(equation, arrays)
    with jax.named_scope(place.outer):
        return expression.execute(equation, arrays)


def left(equation, values: list, context: Context, place: Place, why: str) -> list:
    """The equation as it is, in a name scope that says why its products stay in float."""
    with jax.named_scope(intercept.left_scope(why)):
        return execute(equation, values, context, place)


def callee(equation):
    """The closed jaxpr that a call runs once, or None. Custom derivatives of calls without
    products are kept: a quantised model may still be trained."""
    name, params = equation.primitive.name, equation.params
    if name in ("custom_jvp_call", "custom_vjp_call") and not has_products(equation):
        return None
    for parameter in CALLS.get(name, ()):
        if parameter in params:
            inner = params[parameter]
            return inner if hasattr(inner, "consts") else core.ClosedJaxpr(inner, ())
    return None


# Calls by primitive: where the jaxpr is. "remat2" and "checkpoint" are the same of two versions.
CALLS: Mapping[str, tuple[str, ...]] = {
    "jit": ("jaxpr",),
    "pjit": ("jaxpr",),
    "closed_call": ("call_jaxpr",),
    "core_call": ("call_jaxpr",),
    "remat2": ("jaxpr",),
    "checkpoint": ("jaxpr",),
    "custom_jvp_call": ("call_jaxpr",),
    "custom_vjp_call": ("call_jaxpr", "fun_jaxpr"),
}


def has_products(equation) -> bool:
    """Whether the equation is, or holds anywhere inside it, a product."""
    if equation.primitive.name in PRODUCTS:
        return True
    return any(
        has_products(one)
        for inner in core.jaxprs_in_params(equation.params)
        for one in getattr(inner, "jaxpr", inner).eqns
    )


def _over_layers(equation, values: list) -> bool:
    """Whether a scan multiplies by parameters, and few enough times to be unrolled."""
    weighted = any(isinstance(value, Expression) and value.leaves for value in values)
    return weighted and 0 < equation.params["length"] <= MAX_UNROLL and has_products(equation)


def _sizes(params) -> tuple[int, int]:
    """(constants, carries) of a scan."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()  # jax 0.12
    return len(constants), len(carry)


def _unrolled(equation, values: list, context: Context, place: Place) -> list:
    params = equation.params
    constants, carries = _sizes(params)
    fixed, carry = values[:constants], values[constants : constants + carries]
    stacked = values[constants + carries :]
    steps = range(params["length"])
    rows: dict[int, list] = {}
    for index in reversed(steps) if params["reverse"] else steps:
        layers = (*place.layers, index)
        slices = [_slice(value, index, layers) for value in stacked]
        inside = Place(place.stack, "", layers)
        outs = run(params["jaxpr"], [*fixed, *carry, *slices], context, inside)
        carry, rows[index] = outs[:carries], outs[carries:]
    columns = zip(*(rows[index] for index in steps), strict=True)
    return carry + [jnp.stack([context.value(one) for one in column]) for column in columns]


def _slice(value, index: int, layers: tuple[int, ...]):
    if isinstance(value, Expression):
        return expression.layer(value, index, layers)
    return expression.at(value, index)
