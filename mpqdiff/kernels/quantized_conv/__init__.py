"""The integer convolution of a quantised layer: float in, float out, int8 x int8 -> int32 between.

y = x_scale * w_scale_n * (sum_tc (q_tc - zero_point) w_tcn) + bias_n over the taps t of the kernel
and the channels c, then the layer's activation where one is asked for. x is quantised once per
element, before any patch is gathered, so all of an image has one scale. Padding is real zero, whose
integer is the zero point: the correction by column sums stays exact at the borders.
"""

from collections.abc import Sequence
from functools import partial, reduce
from operator import add

import jax
import jax.numpy as jnp

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.kernels.epilogue import check_activation, finish
from mpqdiff.kernels.quantized_conv import reference, xla
from mpqdiff.kernels.quantized_conv.patches import by_patches
from mpqdiff.kernels.quantized_matmul import MAX_CONTRACTION, pallas_gpu, pallas_tpu
from mpqdiff.quantize.numerics import check_bits
from mpqdiff.quantize.pack import packed_shape, unpack

IMPLEMENTATIONS = {
    "reference": reference.quantized_conv,
    "xla": xla.quantized_conv,
    # int8 patches, multiplied by the kernels of `quantized_matmul`.
    "pallas_tpu": partial(xla.quantized_conv, accumulate=by_patches(pallas_tpu.accumulate)),
    "pallas_interpret": partial(
        xla.quantized_conv, accumulate=by_patches(partial(pallas_tpu.accumulate, interpret=True))
    ),
    "pallas_gpu": partial(xla.quantized_conv, accumulate=by_patches(pallas_gpu.accumulate)),
    "pallas_gpu_interpret": partial(
        xla.quantized_conv, accumulate=by_patches(partial(pallas_gpu.accumulate, interpret=True))
    ),
}
DEFAULT = "xla"

Padding = str | Sequence[tuple[int, int]]


def quantized_conv(
    x,
    weight,
    x_scale,
    x_zero_point,
    w_scale,
    w_colsum,
    bias,
    *,
    kernel_size: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    padding: Padding = "SAME",
    split: int | None = None,
    x_bits=8,
    w_bits: int = 8,
    activation: str | None = None,
    implementation: str | None = None,
):
    """x float [B,H,W,C] convolved with integers [kh,kw,C,N] -> float32 [B,h,w,N].

    weight: the kernel flattened, int8 [kh*kw*C,N], or below 8 bits as `quantize.pack.pack` packs
    it at `w_bits`; x_scale: float [], or one per image [B] (or [B,1,1,1]), or None for each image's
    own; x_zero_point: integers likewise, or None for symmetric activations; w_scale float [N];
    w_colsum int32 [N], needed only with a zero point; bias float [N] or None; padding: "SAME",
    "SAME_LOWER", "VALID" or (before, after) for each axis; x_bits: width of x's integers, which may
    be traced; activation: None, "gelu" (tanh) or "silu".
    split: where x is two tensors side by side, the channels of the first. x_scale, x_zero_point and
    w_colsum are then pairs (or None), each half has its own int32 sum, and the two are added after
    dequantisation. Raises InputError, when traced, on an unknown name, an implementation this
    machine cannot run, shapes or dtypes that do not match, a zero point without column sums or
    without a scale, a split outside x, or a contraction above MAX_CONTRACTION.
    """
    name = DEFAULT if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise unknown_name("implementation of quantized_conv", name, IMPLEMENTATIONS)
    check_bits(x_bits)
    check_activation(activation)
    _check_weight(x, weight, kernel_size, w_bits)
    run = partial(
        IMPLEMENTATIONS[name],
        kernel_size=kernel_size,
        strides=strides,
        pads=pads(x.shape[1:3], kernel_size, strides, padding),
        x_bits=x_bits,
    )
    if split is None:
        parts = [(x, weight, x_scale, x_zero_point, w_colsum)]
    else:
        parts = _halves(x, weight, x_scale, x_zero_point, w_colsum, kernel_size, split, w_bits)
        w_bits = 8
    halves = [
        run(
            part,
            integers,
            *_by_image(part, scale, zero, colsum),
            w_scale,
            colsum,
            w_bits=w_bits,
        )
        for part, integers, scale, zero, colsum in parts
    ]
    return finish(reduce(add, halves), bias, activation)


def pads(
    size: tuple[int, int], kernel_size: tuple[int, int], strides: tuple[int, int], padding: Padding
) -> tuple[tuple[int, int], ...]:
    """(before, after) of both axes of an image of `size`."""
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(size, kernel_size, strides, padding)
    return tuple((int(before), int(after)) for before, after in padding)


def _check_weight(x, weight, kernel_size, w_bits) -> None:
    if x.ndim != 4:
        raise InputError(f"x of a convolution is [B,H,W,C]; got {list(x.shape)}")
    contraction = kernel_size[0] * kernel_size[1] * x.shape[-1]
    fits = weight.ndim == 2 and weight.dtype == jnp.int8
    if not fits or weight.shape != packed_shape((contraction, weight.shape[1]), w_bits):
        rows = packed_shape((contraction, 1), w_bits)[0]
        raise InputError(
            f"weight {weight.dtype}{list(weight.shape)} against x {list(x.shape)} and a kernel of "
            f"{list(kernel_size)} at {w_bits} bits: expected int8 [{rows}, N]; flatten the kernel "
            "first, or pass w_bits of a packed one"
        )
    if contraction > MAX_CONTRACTION:
        raise InputError(
            f"a contraction of {contraction} can overflow int32; at most {MAX_CONTRACTION} is "
            "exact: leave the layer in float"
        )


def _by_image(x, scale, zero, colsum):
    """scale and zero point, [] or [B,1,1,1] (or None), after checking that they fit."""
    if zero is not None and colsum is None:
        raise InputError("a zero point needs w_colsum: pass numerics.column_sums(weight)")
    if zero is not None and scale is None:
        raise InputError("x_scale None takes symmetric scales; pass x_zero_point=None with it")
    return tuple(None if value is None else _one_per_image(value, x) for value in (scale, zero))


def _one_per_image(value, x):
    value = jnp.asarray(value)
    if not value.ndim:
        return value
    if value.size != value.shape[0] or value.shape[0] not in (1, x.shape[0]):
        raise InputError(
            f"scales or zero points of shape {list(value.shape)} for x {list(x.shape)}: patches "
            "overlap, so a convolution takes one number, or one for each image"
        )
    return value.reshape(-1, 1, 1, 1)


def _halves(x, weight, scales, zeros, colsums, kernel_size, split, w_bits):
    """The operands of both halves; their rows of the kernel alternate, so it is opened here."""
    channels = x.shape[-1]
    if not 0 < split < channels:
        raise InputError(
            f"split={split}: expected 1 to {channels - 1}, as x has {channels} channels"
        )
    shape = (*kernel_size, channels, weight.shape[-1])
    kernel = unpack(weight, w_bits, shape)
    found = []
    for half, channel in enumerate((slice(None, split), slice(split, None))):
        each = (None if pair is None else pair[half] for pair in (scales, zeros, colsums))
        integers = kernel[:, :, channel].reshape(-1, shape[-1])
        found.append((x[..., channel], integers, *each))
    return found
