"""The numerics contract: what an integer means, and how a float becomes one. Stated only here.

Weights are symmetric, one scale per output channel: w = scale * q with |q| <= qmax(b). Activations
are x = scale * (q - zero_point) with -qmax(b) - 1 <= q <= qmax(b); `zero_point` 0 is the symmetric
case. Every rounding is half to even. Division by a scale is multiplication by its float32
reciprocal: XLA rewrites division by a constant or broadcast value that way, by a full array not,
and NumPy never, so that near ties the integers would depend on how the scale was passed.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.errors import InputError, unknown_name

BITS = range(2, 9)
CLIPS = ("mse", "absmax")

# Below a quarter, an asymmetric step is at most (1 + 1/4) / 2 = 0.63 of the symmetric one: two
# thirds of a bit, which pays for the zero-point correction. GELU and SiLU outputs fall below it.
LOPSIDED_RATIO = 0.25

# Candidate fractions of a channel's largest magnitude; 1 comes first, so that clipping must win.
SHRINK = np.linspace(1.0, 0.1, 91, dtype=np.float32)

# float32 spacing is 1 between 2^23 and 2^24: adding this leaves round-half-even(y) in the low bits.
_ROUNDING = np.float32(1.5 * 2**23)
_TINY = np.finfo(np.float32).tiny


def qmax(bits):
    """2^(bits-1) - 1, the largest integer of a width; `bits` a Python int or an integer array."""
    return (1 << (bits - 1)) - 1


def check_bits(bits) -> None:
    """Raises InputError unless a concrete width is in 2..8; traced widths pass unseen."""
    if isinstance(bits, int | np.integer) and bits not in BITS:
        raise InputError(f"width {bits}: integers have 2 to 8 bits; choose a width in that range")


def quantize_weight(kernel, bits, *, clip: str = "mse"):
    """Integers and scales of a kernel, one scale for each output channel.

    kernel: float [in..., out]; bits: int, or an int array [] that may be traced (one compile
    serves all widths). Returns qvalue int8 of the same shape and scale float32 [out].
    clip "absmax": scale = max|w| / qmax. "mse": of the candidates r * max|w| / qmax (r in SHRINK)
    the one with the least sum of (w - scale * q)^2. An all-zero channel has scale 1. A channel
    with a value that is not finite has a scale that is not finite: check loaded weights first.
    Raises InputError on an unknown clip, a width outside 2..8 or a kernel without axes.
    """
    check_bits(bits)
    if clip not in CLIPS:
        raise unknown_name("weight clip", clip, CLIPS)
    if not jnp.ndim(kernel):
        raise InputError("a kernel has shape [in..., out]; got a scalar")
    kernel = jnp.asarray(kernel, jnp.float32)
    rows = kernel.reshape(-1, kernel.shape[-1])
    limit = qmax(bits)
    largest = _positive(jnp.max(jnp.abs(rows), axis=0) / limit)
    scale = largest if clip == "absmax" else _least_error_scale(rows, largest, limit)
    return _round_weight(rows, scale, limit).astype(jnp.int8).reshape(kernel.shape), scale


def dequantize_weight(qvalue, scale):
    """scale * q: qvalue int8 [in..., out], scale [out] -> float32 of qvalue's shape."""
    return qvalue.astype(jnp.float32) * scale


def column_sums(qvalue):
    """Sum of the integers that feed each output channel: int8 [in..., out] -> int32 [out].

    What a product owes to a zero point: sum_k (q_k - z) w_kn = sum_k q_k w_kn - z colsum_n.
    """
    return jnp.sum(qvalue, axis=tuple(range(qvalue.ndim - 1)), dtype=jnp.int32)


def activation_scale(minimum, maximum, bits, *, asymmetric=False):
    """Scale and zero point that cover a range: float arrays [...] -> float32 [...], int8 [...].

    Symmetric: scale = max(|minimum|, |maximum|) / qmax, zero_point 0. Asymmetric: scale =
    (maximum - minimum) / (2^b - 1), zero_point the integer of real zero, which is therefore exact.
    The range is widened to hold 0; an empty one has scale 1. `asymmetric` may be a bool array.
    Raises InputError on a width outside 2..8.
    """
    check_bits(bits)
    low = jnp.minimum(jnp.asarray(minimum, jnp.float32), 0.0)
    high = jnp.maximum(jnp.asarray(maximum, jnp.float32), 0.0)
    limit = qmax(bits)
    symmetric = _positive(jnp.maximum(-low, high) / limit)
    full = _positive((high - low) / (2 * limit + 1))
    zero = jnp.clip(jnp.round(-low * (1.0 / full)) - (limit + 1), -limit - 1, limit)
    # Where the whole range is the point 0, the symmetric answer stands.
    asymmetric = jnp.logical_and(asymmetric, high > low)
    scale = jnp.where(asymmetric, full, symmetric)
    return scale, jnp.where(asymmetric, zero, 0.0).astype(jnp.int8)


def is_lopsided(minimum, maximum):
    """Whether one side of a range is under a quarter of the other (`LOPSIDED_RATIO`): bool [...].

    An empty range is not lopsided.
    """
    low, high = jnp.maximum(-jnp.asarray(minimum), 0.0), jnp.maximum(jnp.asarray(maximum), 0.0)
    return jnp.minimum(low, high) < LOPSIDED_RATIO * jnp.maximum(low, high)


def quantize_activation(x, scale, zero_point, bits):
    """round(x / scale) + zero_point, saturated to [-qmax - 1, qmax], as int8 of x's shape.

    x: float [...]; scale float and zero_point integer, broadcastable to x. Infinities saturate;
    NaN becomes the zero point (the integer of 0.0), so look for NaN before quantising.
    Raises InputError on a width outside 2..8.
    """
    check_bits(bits)
    limit = qmax(bits)
    zero = jnp.asarray(zero_point, jnp.int32)
    # Held apart: XLA would divide once per element of x inside the fused loop.
    reciprocal = jax.lax.optimization_barrier(1.0 / jnp.asarray(scale, jnp.float32))
    scaled = x.astype(jnp.float32) * reciprocal
    # The bounds are integers, so saturating before rounding is exact; it also keeps the sum below
    # within the range where its spacing is 1, and the product out of a fused multiply-add.
    low, high = ((end - zero).astype(jnp.float32) for end in (-limit - 1, limit))
    bounded = jnp.clip(scaled, low, high)
    # Adding and reading the low byte beats round-then-convert: see benchmarks/matmul.py.
    low_bits = jax.lax.bitcast_convert_type(bounded + _ROUNDING, jnp.int32)
    return (low_bits + zero).astype(jnp.int8)


def _positive(scale):
    """`scale` with 1 in place of zero (and of values whose reciprocal overflows); keeps NaN."""
    return jnp.where(scale < _TINY, jnp.float32(1), scale)


def _round_weight(rows, scale, limit):
    return jnp.clip(jnp.round(rows * (1.0 / scale)), -limit, limit)


@jax.jit  # outside of a jit, a bare scan would be compiled anew at every call
def _least_error_scale(rows, largest, limit):
    """rows [M,N], largest [N]: the scale [N] among SHRINK * largest of least squared error."""

    def step(best, ratio):
        scale = _positive(largest * ratio)
        error = jnp.sum((rows - scale * _round_weight(rows, scale, limit)) ** 2, axis=0)
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better, scale, best[1])), None

    start = (jnp.full_like(largest, jnp.inf), largest)
    return jax.lax.scan(step, start, SHRINK)[0][1]
