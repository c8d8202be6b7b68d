"""What TPU kernels share: when they may be traced, their memory, and how planes are opened."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from mpqdiff.errors import InputError

# What a kernel may take of a core's vector memory: 128 MiB on v5e and v6e, 64 MiB on v7x.
VMEM_LIMIT = 48 * 2**20
# What blocks are sized for; the rest is for values the compiler keeps between operations.
VMEM_BUDGET = 32 * 2**20

LANES = 128  # last axis of a vector register
SUBLANES_INT8 = 32  # rows of an int8 tile

_ahead_of_time: ContextVar[bool] = ContextVar("ahead_of_time", default=False)


@contextmanager
def compiling_for_tpu() -> Iterator[None]:
    """Within it `pallas_tpu` may be traced on a machine without a TPU, to compile ahead of time.

    What was traced so must be lowered for a TPU (`jax.experimental.topologies`); Pallas refuses
    to lower it for anything else.
    """
    token = _ahead_of_time.set(True)
    try:
        yield
    finally:
        _ahead_of_time.reset(token)


def require_tpu(operation: str) -> None:
    """Raises InputError unless the program being traced is for a TPU."""
    platform = jax.default_backend()
    if platform != "tpu" and not _ahead_of_time.get():
        raise InputError(
            f"{operation}: implementation 'pallas_tpu' needs a TPU and this machine's default back "
            f"end is {platform!r}; take 'xla', or 'pallas_interpret' to check the kernel slowly, "
            "or trace under kernels.tpu.compiling_for_tpu() to compile for one"
        )


def compiler_params(*semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    """`semantics`: one for each axis of the grid."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT)


def round_up(size: int, multiple: int) -> int:
    """`size` or the next multiple above it."""
    return -(-size // multiple) * multiple


def planes(packed, bits: int) -> list:
    """The planes of int8 [R,n] (`quantize.pack`), R a multiple of 32: int8 [R,n] each, in order.

    Every integer comes times 2^(8 - bits): it stays in the top bits of its byte, where its sign
    already is. A product then needs one exact shift of its sum, instead of two per weight. Four
    bytes are shifted at once, since vector units have no shift of bytes; what crosses into the
    next byte falls in the bits that the mask clears.
    """
    if bits == 8:
        return [packed]
    top = (0xFF << (8 - bits)) & 0xFF
    mask = jnp.uint32(top * 0x01010101).view(jnp.int32)
    words = pltpu.bitcast(packed, jnp.int32)
    shifts = range(8 - bits, -1, -bits)
    return [pltpu.bitcast((words << shift) & mask, jnp.int8) for shift in shifts]
