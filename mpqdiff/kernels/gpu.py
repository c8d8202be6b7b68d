"""What GPU kernels share: when they may be traced, Triton, masked access, and opened planes.

Triton is asked for by its own compiler parameters, because Pallas' default on a GPU is Mosaic GPU
in newer releases of jax: one text then serves Ampere, Ada and Hopper.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from mpqdiff.errors import InputError

# Triton's dots take at least 16 rows and columns, and 32 bytes of int8 along the contraction.
LEAST_ROWS = 16
LEAST_DEPTH = 32
# Programs that keep a large GPU busy: three quarters of the 132 multiprocessors of an H100.
ENOUGH_PROGRAMS = 100

# float32 spacing is 1 between 2^23 and 2^24: adding this rounds to an integer, half to even.
_ROUNDING = 1.5 * 2**23

_ahead_of_time: ContextVar[bool] = ContextVar("gpu_ahead_of_time", default=False)


@contextmanager
def compiling_for_gpu(device_kind: str = "NVIDIA H100") -> Iterator[None]:
    """Within it `pallas_gpu` may be traced on a machine without a GPU, and lowered for one.

    What was traced so must be lowered within it too, with `lowering_platforms=("cuda",)`; Pallas
    refuses to lower it for a CPU. `device_kind`: the GPU that Pallas is told of.
    """
    token = _ahead_of_time.set(True)
    device = AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
    try:
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            yield
    finally:
        _ahead_of_time.reset(token)


def require_gpu(operation: str) -> None:
    """Raises InputError unless the program being traced is for a GPU."""
    platform = jax.default_backend()
    if platform != "gpu" and not _ahead_of_time.get():
        raise InputError(
            f"{operation}: implementation 'pallas_gpu' needs a GPU and this machine's default back "
            f"end is {platform!r}; take 'xla', or 'pallas_gpu_interpret' to check the kernel "
            "slowly, or trace under kernels.gpu.compiling_for_gpu() to lower it for one"
        )


def triton():
    """Pallas' Triton module.

    Raises InputError where this jax no longer has it: the kernels are written for nothing else.
    """
    try:
        from jax.experimental.pallas import triton as module
    except ImportError as error:
        raise InputError(
            f"jax {jax.__version__} has no jax.experimental.pallas.triton, in which the GPU "
            "kernels are written; take implementation 'xla', or a jax that has it (0.10 to 0.12 do)"
        ) from error
    return module


def power_of_two(size: int) -> int:
    """`size` or the next power of two above it; 1 for 0."""
    return 1 << max(size - 1, 0).bit_length()


def inside(start, count: int, size: int):
    """Which of `count` places from `start` on are below `size`: bool [count], or None for all.

    None where blocks of `count` divide `size`, which is the only case in which no place can be
    beyond it, wherever a block starts.
    """
    return None if size % count == 0 else start + lax.iota(jnp.int32, count) < size


def both(rows, columns):
    """The mask [m,n] of places inside by row [m] and by column [n]; None stands for all."""
    if rows is None:
        return None if columns is None else columns[None, :]
    return rows[:, None] if columns is None else rows[:, None] & columns[None, :]


def load(ref, mask=None):
    """The values that `ref` (`ref.at[...]`) points to, 0 outside of `mask`."""
    return triton().load(ref, mask=mask, other=None if mask is None else 0)


def store(ref, value, mask=None) -> None:
    """Write `value` where `mask` is, or everywhere."""
    triton().store(ref, value, mask=mask)


def rounded(x, reciprocal, low, high, zero):
    """Inside a kernel: int8 of round(x reciprocal) saturated to [low, high], plus `zero`.

    All float32 and broadcastable, `low` and `high` already less `zero`. The integers are those of
    `numerics.quantize_activation`; Triton has no rounding, so it is done by an addition.
    """
    steps = x.astype(jnp.float32) * reciprocal
    steps = jnp.minimum(jnp.maximum(jnp.where(steps == steps, steps, 0.0), low), high)
    integer = lax.bitcast_convert_type(steps + jnp.float32(_ROUNDING), jnp.int32)
    return (integer + zero.astype(jnp.int32)).astype(jnp.int8)


def planes(packed, bits: int) -> list:
    """The planes of int8 [r,n] (`quantize.pack`): int8 [r,n] each, in order.

    Every integer comes times 2^(8 - bits): in the top bits of its byte, where its sign already is.
    One operation then opens a weight, and one exact shift of the sum makes up for it.
    """
    if bits == 8:
        return [packed]
    top = jnp.int8(-1 << (8 - bits))
    shifts = range(8 - bits, 0, -bits)
    return [(packed << jnp.int8(shift)) & top for shift in shifts] + [packed & top]
