"""One site in integers: what a call of its module is replaced by, float in and float out."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mpqdiff.errors import InputError
from mpqdiff.kernels import attention_products
from mpqdiff.kernels.quantize_activations.reference import token_scale
from mpqdiff.kernels.quantized_conv import pads, quantized_conv
from mpqdiff.kernels.quantized_conv.patches import patches, surround
from mpqdiff.kernels.quantized_conv.reference import image_scale
from mpqdiff.kernels.quantized_matmul import quantized_matmul
from mpqdiff.quantize.numerics import quantize_activation
from mpqdiff.sites import Site

# The equations that have an operation of their own, letters by their first appearance.
ATTENTION = {
    "abcd,aecd->acbe": attention_products.qk,
    "abcd,adbe->acbe": attention_products.pv,
}


def integer_site(
    site: Site,
    module,
    args,
    tensors,
    row,
    columns,
    bits,
    *,
    open_=None,
    matmul=quantized_matmul,
    attention: str | None = None,
):
    """The integer product of one call `module(*args)` of `site`: float in, float out.

    tensors: qvalue (what `open_` turns into int8 [K,N]), scale, and colsum and bias where there
    are any; row: scales and zero points [..., A] of this step, or None for online ones; columns:
    the site's own of the A; bits: `a_bits` of a plan, which may be traced; attention: the
    implementation of attention products (`kernels.attention_products`).
    """
    if site.kind == "product":
        return _activation_product(site, module, args, row, columns, bits, attention)
    (x,) = args
    if site.kind == "conv":
        matmul = partial(_convolve, matmul, geometry=geometry(module))
    scale, zero = _scales(site.path, x, row, columns[0])
    return matmul(
        x,
        open_(tensors["qvalue"]) if open_ else tensors["qvalue"],
        scale,
        zero if "colsum" in tensors else None,
        tensors["scale"],
        tensors.get("colsum"),
        tensors.get("bias"),
        x_bits=bits,
    )


def _activation_product(site, module, args, row, columns, bits, implementation=None):
    """An attention product by its own operation, in `implementation`; any other as an einsum."""
    widths = bits["lhs"], bits["rhs"]
    (scale, zero), (other, _) = (
        _scales(site.path, x, row, column) for x, column in zip(args, columns, strict=True)
    )
    attention = ATTENTION.get(_spelled(module.equation))
    if attention:
        return attention(*args, scale, zero, other, bits=widths, implementation=implementation)
    if scale is None or other is None:  # online: one for all, as any axis may be summed
        scale, other = (
            token_scale(x.reshape(-1), width)[0] for x, width in zip(args, widths, strict=True)
        )
    left = quantize_activation(args[0], scale, 0 if zero is None else zero, widths[0])
    right = quantize_activation(args[1], other, 0, widths[1])
    acc = jnp.einsum(module.equation, left, right, preferred_element_type=jnp.int32)
    by_image = (-1,) + (1,) * (acc.ndim - 1)
    if zero is not None:
        point = jnp.reshape(zero, by_image).astype(jnp.int32)
        acc = acc - point * _column_sums(module.equation, left, right)
    return acc * (jnp.ravel(scale) * jnp.ravel(other)).reshape(by_image)


def _spelled(equation: str) -> str:
    """An einsum's equation in the letters a, b, c, ... by their first appearance."""
    letters = list(dict.fromkeys(filter(str.isalpha, equation)))
    return equation.translate({ord(letter): ord("a") + i for i, letter in enumerate(letters)})


def _column_sums(equation: str, left, right):
    """What each unit of a zero point adds to einsum(equation, left, right): int32, broadcastable
    to it. A sum over the left operand's rows would repeat itself, so it is given one row."""
    operands, out = equation.split("->")
    letters, others = operands.split(",")
    sizes = zip(letters, left.shape, strict=True)
    shape = [1 if letter in out and letter not in others else size for letter, size in sizes]
    ones = jnp.ones(shape, jnp.int8)
    return jnp.einsum(equation, ones, right, preferred_element_type=jnp.int32)


def _scales(path: str, x, row, column: int):
    """(scale, zero point) of operand x from the step's row; (None, None), each token's own (each
    image's of a convolution), taken by the product, where there is none."""
    if row is None:
        return None, None
    return tuple(_against(value[..., column], x, path) for value in row)


def _against(value, x, path: str):
    """A row's entry ([] or one per sample [B]) shaped to scale x [B, ...]."""
    if not value.ndim:
        return value
    if value.shape[0] != x.shape[0]:
        raise InputError(
            f"site {path!r}: {value.shape[0]} timesteps for {x.shape[0]} rows; a model that folds "
            "other axes into the batch must be called with one timestep, t of shape []"
        )
    return value.reshape((-1,) + (1,) * (x.ndim - 1))


def geometry(module: nn.Conv) -> dict[str, Any]:
    """kernel_size, strides and padding of a convolution, as `quantized_conv` takes them.

    Raises InputError on a convolution that has no integer form.
    """
    size, strides = _pair(module.kernel_size), _pair(module.strides)
    plain = _pair(module.kernel_dilation) == _pair(module.input_dilation) == (1, 1)
    padding = module.padding
    zeros = not isinstance(padding, str) or padding in ("SAME", "SAME_LOWER", "VALID")
    if len(size) != 2 or module.feature_group_count != 1 or not plain or not zeros:
        raise InputError(
            f"conv {'/'.join(module.path)}: only ungrouped, undilated, zero-padded 2-D "
            "convolutions run in integers; leave this one in float (null widths in the plan)"
        )
    if not isinstance(padding, str):
        sides = [padding] * 2 if isinstance(padding, int) else list(padding)
        padding = [(side, side) if isinstance(side, int) else tuple(side) for side in sides]
    return {"kernel_size": size, "strides": strides, "padding": padding}


def _pair(value) -> tuple[int, ...]:
    """Flax's `None | int | sequence` as a pair."""
    if value is None:
        return (1, 1)
    return (value, value) if isinstance(value, int) else tuple(value)


def _convolve(matmul: Callable, x, weight, scale, *rest, geometry: Mapping[str, Any], x_bits):
    """`quantized_conv`, or by patches for a back end that has only a `matmul`."""
    if matmul is quantized_matmul:
        return quantized_conv(x, weight, scale, *rest, **geometry, x_bits=x_bits)
    scale = image_scale(x, x_bits) if scale is None else scale
    padded = surround(x, pads(x.shape[1:3], **geometry))
    rows = patches(padded, geometry["kernel_size"], geometry["strides"])
    return matmul(rows, weight, scale, *rest, x_bits=x_bits)
