"""A product of a traced program as the linen module that a site is: Dense, Conv or Product.

Any contraction of activations with one parameter is a matrix product once the axes that are summed
lie last and the others first (DenseGeneral, Einsum, raw einsums); any contraction of two
activations is an einsum. What has no such form is named with the reason (`intercept.LEFT`).
"""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from mpqdiff.kernels.quantized_matmul import MAX_CONTRACTION
from mpqdiff.models.product import Product
from mpqdiff.program import expression
from mpqdiff.program.expression import Expression
from mpqdiff.program.walk import Place


@dataclass(frozen=True)
class Form:
    """The product is `leave(module(*enter(operands, batch)), batch)`, module = build(name, batch).

    `key` is the same in every trace. `weight` is the kernel as `build` wants it, None for a
    product of two activations. `batch` is the axis of the first operand that counts images, or
    None: it is moved to the front, where sites have it.
    """

    kind: str
    key: str
    weight: Expression | None
    shape: tuple[int, ...]  # of the first operand that is an activation
    build: Callable[[str, int | None], nn.Module]
    enter: Callable[[Sequence[Any], int | None], tuple]
    leave: Callable[[Any, int | None], Any]


def form(
    equation, operands: Sequence, place: Place, count: int, nonnegative: Sequence[bool]
) -> Form | str:
    """The Form of a product equation, or why it has none, a key of `intercept.LEFT`.

    `count` tells apart the products of two activations that `place` has. `nonnegative`: which of
    the operands are known not to be negative.
    """
    if any(not jnp.issubdtype(atom.aval.dtype, jnp.floating) for atom in equation.invars):
        return "type"
    if equation.primitive.name == "conv_general_dilated":
        return _convolution(equation, operands)
    weights = [side for side in (0, 1) if isinstance(operands[side], Expression)]
    if not weights:
        turned = list(nonnegative) == [False, True]
        return _product(equation, operands, place, count, turned)
    return _dense(equation, operands, weights[0])


def _dense(equation, operands, side: int) -> Form | str:
    """x times a parameter, which is operand `side`."""
    contracted, batched = equation.params["dimension_numbers"]
    weight, x_shape = operands[side], operands[1 - side].shape
    if not weight.leaves:
        return "constant"
    if batched[0]:
        return "batched"
    inner, x_inner = tuple(contracted[side]), tuple(contracted[1 - side])
    depth = prod(x_shape[axis] for axis in x_inner)
    if depth > MAX_CONTRACTION:
        return "deep"
    outer = tuple(axis for axis in range(len(weight.shape)) if axis not in inner)
    outer_shape = tuple(weight.shape[axis] for axis in outer)
    free = [axis for axis in range(len(x_shape)) if axis not in x_inner]
    kernel = expression.arranged(weight, inner + outer, (depth, prod(outer_shape)))
    precision = _precision(equation)

    def enter(operands, batch):
        (x,) = operands
        order = _first(batch, free)
        rows = [x_shape[axis] for axis in order] or [1]
        return (x.transpose(*order, *x_inner).reshape(*rows, depth),)

    def leave(y, batch):
        order = _first(batch, free)
        y = y.reshape(*(x_shape[axis] for axis in order), *outer_shape)
        have = [*(("x", axis) for axis in order), *(("w", axis) for axis in outer)]
        want = [*(("x", axis) for axis in free), *(("w", axis) for axis in outer)]
        if side == 0:
            want = want[len(free) :] + want[: len(free)]
        return _typed(y.transpose([have.index(axis) for axis in want]), equation)

    def build(name, batch):
        del batch
        return nn.Dense(
            prod(outer_shape),
            use_bias=False,
            dot_general=partial(_dot_general, types=_types(equation, side), exactly=precision),
            name=name,
        )

    key = f"dense {kernel.key} {precision} {_types(equation, side)}"
    return Form("dense", key, kernel, tuple(x_shape), build, enter, leave)


def _product(equation, operands, place: Place, count: int, turned: bool) -> Form:
    """An einsum of two activations, the second one first if `turned`: a softmax then is the one
    that can have a zero point (`activations.lopsided_left`)."""
    contracted, batched = equation.params["dimension_numbers"]
    shapes = [tuple(operand.shape) for operand in operands]
    letters = iter(string.ascii_letters)
    spelled = [[next(letters) for _ in shape] for shape in shapes]
    summed = [spelled[0][axis] for axis in contracted[0]]
    shared = [spelled[0][axis] for axis in batched[0]]
    for axes, names in ((contracted[1], summed), (batched[1], shared)):
        for axis, letter in zip(axes, names, strict=True):
            spelled[1][axis] = letter
    free = [[one for one in own if one not in (*summed, *shared)] for own in spelled]
    first, second = (1, 0) if turned else (0, 1)
    precision = _precision(equation)

    def ordered(batch):
        chosen = None if batch is None else spelled[first][batch]
        if not turned:
            return _first(chosen, shared + free[0] + free[1])
        # As attention is usually spelled: images, rows, heads, features.
        return _first(chosen, shared[:1] + free[1] + shared[1:] + free[0])

    def enter(operands, batch):
        del batch
        return operands[first], operands[second]

    def leave(y, batch):
        order = ordered(batch)
        traced = shared + free[0] + free[1]
        return _typed(y.transpose([order.index(letter) for letter in traced]), equation)

    def build(name, batch):
        sides = ",".join("".join(spelled[side]) for side in (first, second))
        return PreciseProduct(f"{sides}->{''.join(ordered(batch))}", precision, name=name)

    key = f"product {place.stack} {place.layers} {count}"
    return Form("product", key, None, shapes[first], build, enter, leave)


def _convolution(equation, operands) -> Form | str:
    """x convolved with a parameter over one or two axes."""
    params, kernel = equation.params, operands[1]
    numbers = params["dimension_numbers"]
    x_order, w_order, y_order = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    if not isinstance(kernel, Expression):
        return "dynamic"
    if not kernel.leaves:
        return "constant"
    if why := _unusual(params):
        return why
    axes = len(w_order) - 2
    # To [B,H,W,C] and [h,w,in,out]; one axis becomes two, the first of size 1.
    to_x = (x_order[0], *x_order[2:], x_order[1])
    to_w = (*w_order[2:], w_order[1], w_order[0])
    shape = tuple(kernel.shape[axis] for axis in to_w)
    if prod(shape[:-1]) > MAX_CONTRACTION:
        return "deep"
    single = axes == 1
    held = expression.arranged(kernel, to_w, (1, *shape) if single else shape)
    strides = (1, *params["window_strides"])[-2:]
    padding = ((0, 0), *((int(low), int(high)) for low, high in params["padding"]))[-2:]
    precision = _precision(equation)
    x_shape = operands[0].shape

    def enter(operands, batch):
        del batch
        x = operands[0].transpose(to_x)
        return (x[:, None] if single else x,)

    def leave(y, batch):
        del batch
        y = y[:, 0] if single else y
        back = (y_order[0], *y_order[2:], y_order[1])
        return _typed(y.transpose([back.index(axis) for axis in range(axes + 2)]), equation)

    def build(name, batch):
        del batch
        return nn.Conv(
            shape[-1],
            held.shape[:2],
            strides=strides,
            padding=padding,
            use_bias=False,
            conv_general_dilated=partial(_convolve, types=_types(equation, 1), exactly=precision),
            name=name,
        )

    key = f"conv {held.key} {strides} {padding} {precision} {_types(equation, 1)}"
    return Form("conv", key, held, tuple(x_shape), build, enter, leave)


def _unusual(params) -> str | None:
    """Why a convolution has no integer form, or None."""
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return "grouped"
    if any(step != 1 for step in params["lhs_dilation"]):
        return "transposed"
    if any(step != 1 for step in params["rhs_dilation"]):
        return "dilated"
    if len(params["window_strides"]) not in (1, 2):
        return "axes"
    if any(side < 0 for pair in params["padding"] for side in pair):
        return "cropped"
    return None


class PreciseProduct(Product):
    """A Product in the precision and result type of the traced one."""

    precision: Any = None

    @nn.compact
    def __call__(self, lhs, rhs):
        precision, preferred = self.precision
        return jnp.einsum(
            self.equation, lhs, rhs, precision=precision, preferred_element_type=preferred
        )


def _precision(equation):
    return equation.params["precision"], equation.params["preferred_element_type"]


def _types(equation, side: int):
    """(of x, of the weight), where operand `side` is the weight."""
    return equation.invars[1 - side].aval.dtype, equation.invars[side].aval.dtype


def _typed(y, equation):
    """y in the shape and type that the following equations were traced for."""
    return y.astype(equation.outvars[0].aval.dtype)


def _dot_general(x, kernel, dimension_numbers, *, types, exactly, **_):
    return lax.dot_general(
        x.astype(types[0]),
        kernel.astype(types[1]),
        dimension_numbers,
        precision=exactly[0],
        preferred_element_type=exactly[1],
    )


def _convolve(x, kernel, *args, types, exactly, **settings):
    return lax.conv_general_dilated(
        x.astype(types[0]),
        kernel.astype(types[1]),
        *args,
        **settings | {"precision": exactly[0], "preferred_element_type": exactly[1]},
    )


def _first(chosen, order: list) -> list:
    """`order` with `chosen` first, where it is in it."""
    return [chosen, *(one for one in order if one != chosen)] if chosen in order else list(order)
