"""Which values of a traced program can never be negative, whatever it is given.

Followed through a jaxpr from what cannot be (exp, a square, a sigmoid) by the steps that keep it
so. A softmax is found without knowing its name. What is not known to be, may be negative.
"""

from collections.abc import Sequence

import numpy as np
from jax.extend import core

# Never negative, whatever the operands.
SOURCES = {"abs", "exp", "exp2", "logistic", "sqrt", "square"}
# Not negative where no operand is.
KEEP = {
    *("add", "mul", "div", "min", "pow", "integer_pow", "add_any"),
    *("reduce_sum", "reduce_max", "reduce_min", "cumsum", "stop_gradient", "copy"),
    *("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "rev", "slice"),
    *("convert_element_type", "reduce_precision", "concatenate", "optimization_barrier"),
    "dot_general",
}
# The same, of all operands after the first, which only chooses.
CHOOSE = {"select_n"}
# Not negative where any operand is not.
ANY = {"max"}


def nonnegative(jaxpr, given: Sequence[bool] = ()):
    """A predicate of the atoms of `jaxpr`: known not to be negative; `given`: which operands are
    known not to be, none if empty."""
    known = {var for var, flag in zip(jaxpr.invars, given, strict=bool(given)) if flag}

    def is_known(atom) -> bool:
        return _literal(atom.val) if isinstance(atom, core.Literal) else atom in known

    for equation in jaxpr.eqns:
        flags = _outputs(equation, [is_known(atom) for atom in equation.invars])
        known.update(var for var, flag in zip(equation.outvars, flags, strict=True) if flag)
    return is_known


def _outputs(equation, flags: list[bool]) -> list[bool]:
    """Which outputs of an equation are known not to be negative; `flags` of its operands."""
    name = equation.primitive.name
    inner = _held(equation)
    if inner is not None:
        is_known = nonnegative(inner, flags)
        return [is_known(atom) for atom in inner.outvars]
    even = name == "integer_pow" and equation.params["y"] % 2 == 0
    known = (
        name in SOURCES
        or even
        or (name in KEEP and all(flags))
        or (name in CHOOSE and all(flags[1:]))
        or (name in ANY and any(flags))
    )
    return [known] * len(equation.outvars)


def _held(equation):
    """The jaxpr that a call runs once on its operands, or None: of loops and branches."""
    held = [getattr(one, "jaxpr", one) for one in core.jaxprs_in_params(equation.params)]
    if len(held) != 1 or equation.primitive.name == "scan":
        return None
    sizes = len(held[0].invars), len(held[0].outvars)
    return held[0] if sizes == (len(equation.invars), len(equation.outvars)) else None


def _literal(value) -> bool:
    return np.ndim(value) == 0 and bool(np.real(value) >= 0)
