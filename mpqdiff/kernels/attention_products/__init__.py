"""The two integer products of attention: queries with keys, and probabilities with values.

qk_bhmn = q_scale k_scale sum_d (qi_bmhd - zero) ki_bnhd,
pv_bmhd = p_scale v_scale sum_n (pi_bhmn - zero) vi_bnhd = ... (sum_n pi vi - zero colsum_bhd(vi)),
with the integers of each operand (`quantize.numerics.quantize_activation`), int32 sums, exact in
every implementation. The left operand may have a zero point: a softmax, which is never negative,
takes -2^(bits - 1) and so all 2^bits levels. The column sum is of an activation, taken as it runs.
"""

from typing import Any

import jax.numpy as jnp

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.kernels.attention_products import pallas_gpu, pallas_tpu, reference, xla
from mpqdiff.quantize.numerics import activation_scale, check_bits, is_lopsided

# Each is product(left [B,H,M,K], right [B,H,N,K] or [B,H,K,N], scales, ...) -> [B,H,M,N].
IMPLEMENTATIONS = {
    "reference": reference.product,
    "xla": xla.product,
    "pallas_tpu": pallas_tpu.product,
    "pallas_interpret": pallas_tpu.interpreted,
    "pallas_gpu": pallas_gpu.product,
    "pallas_gpu_interpret": pallas_gpu.interpreted,
}
DEFAULT = "xla"

# |q - zero| <= 255 and |k| <= 128: up to this contraction no sum can leave int32.
MAX_CONTRACTION = (2**31 - 1) // (255 * 128)


def qk(
    q,
    k,
    q_scale=None,
    q_zero_point=None,
    k_scale=None,
    *,
    bits=(8, 8),
    implementation: str | None = None,
):
    """Scores of queries q float [B,M,H,D] and keys k float [B,N,H,D] -> float32 [B,H,M,N].

    A scale is float [], or one per image [B] (also [B,1,1,1]), or None for each image's own, over
    its finite values; q_zero_point: integers likewise, or None for symmetric ones (with an own
    scale: what the image's range asks for). bits: widths of the operands, which may be traced. NaN
    counts as 0, infinities saturate. `implementation`: a name in IMPLEMENTATIONS; "pallas_tpu"
    needs a TPU, "pallas_gpu" a GPU.
    Raises InputError, when traced, on an unknown name, an implementation this machine cannot run,
    shapes that do not fit, a zero point without a scale, and a D above MAX_CONTRACTION.
    """
    fits = q.ndim == k.ndim == 4 and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
    if not fits:
        raise InputError(
            f"qk: q {list(q.shape)} and k {list(k.shape)}; expected [B,M,H,D] and [B,N,H,D]"
        )
    left, right = jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2)
    scales = q_scale, q_zero_point, k_scale
    return _product("qk", left, right, scales, bits, implementation, transposed=True)


def pv(
    p,
    v,
    p_scale=None,
    p_zero_point=None,
    v_scale=None,
    *,
    bits=(8, 8),
    implementation: str | None = None,
):
    """Probabilities p float [B,H,M,N] times values v float [B,N,H,D] -> float32 [B,M,H,D].

    The scale 1 / (2^bits - 1) and zero point -2^(bits - 1) cover p in [0, 1]. Everything else is as
    in `qk`; N is at most MAX_CONTRACTION.
    """
    fits = p.ndim == v.ndim == 4 and (p.shape[0], p.shape[1], p.shape[3]) == (
        v.shape[0],
        v.shape[2],
        v.shape[1],
    )
    if not fits:
        raise InputError(
            f"pv: p {list(p.shape)} and v {list(v.shape)}; expected [B,H,M,N] and [B,N,H,D]"
        )
    right, scales = jnp.swapaxes(v, 1, 2), (p_scale, p_zero_point, v_scale)
    y = _product("pv", p, right, scales, bits, implementation, transposed=False)
    return jnp.swapaxes(y, 1, 2)


def own_range(x, bits, *, lopsided: bool):
    """(scale, zero point) [B,1,1,1] that cover the finite values of each image of x [B,...].

    With `lopsided` the zero point is used where `numerics.is_lopsided`; else it is 0.
    """
    finite = jnp.where(jnp.isfinite(x), x.astype(jnp.float32), 0.0)
    axes = tuple(range(1, x.ndim))
    low = jnp.min(finite, axis=axes, keepdims=True, initial=0.0)
    high = jnp.max(finite, axis=axes, keepdims=True, initial=0.0)
    flags: Any = is_lopsided(low, high) if lopsided else False
    return activation_scale(low, high, bits, asymmetric=flags)


def _product(what, left, right, scales, bits, implementation, *, transposed):
    name = DEFAULT if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise unknown_name(f"implementation of {what}", name, IMPLEMENTATIONS)
    for width in bits:
        check_bits(width)
    if left.shape[-1] > MAX_CONTRACTION:
        raise InputError(
            f"{what}: a contraction of {left.shape[-1]} can overflow int32; at most "
            f"{MAX_CONTRACTION} is exact: leave this product in float"
        )
    left_scale, zero, right_scale = scales
    if left_scale is None:
        if zero is not None:
            raise InputError(f"{what}: a zero point needs the scale that it belongs to; pass both")
        left_scale, zero = own_range(left, bits[0], lopsided=True)
    if right_scale is None:
        right_scale, _ = own_range(right, bits[1], lopsided=False)
    return IMPLEMENTATIONS[name](
        left,
        right,
        _by_image(what, left_scale, left),
        None if zero is None else _by_image(what, zero, left),
        _by_image(what, right_scale, left),
        transposed=transposed,
        left_bits=bits[0],
        right_bits=bits[1],
    )


def _by_image(what, value, x):
    """A scale or zero point as [], or [B,1,1,1] to scale x [B,H,...] from."""
    value = jnp.asarray(value)
    if not value.ndim:
        return value
    if value.shape[0] != x.shape[0] or value.size != x.shape[0]:
        raise InputError(
            f"{what}: scales or zero points of shape {list(value.shape)} for {x.shape[0]} images; "
            "expected one number, or one for each image"
        )
    return value.reshape(-1, 1, 1, 1)
