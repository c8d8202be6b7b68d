"""`mpqdiff doctor`: devices, versions, back ends, and self-tests on this machine."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.errors import VerificationError
from mpqdiff.results import environment


def integers() -> str:
    """int8 x int8 -> int32 products equal NumPy's, on every implementation and in AQT."""
    from mpqdiff.kernels.quantized_matmul import reference, xla
    from mpqdiff.quantize import aqt

    rng = np.random.default_rng(0)
    lhs = rng.integers(-127, 128, (33, 96)).astype(np.int8)
    rhs = rng.integers(-127, 128, (96, 40)).astype(np.int8)
    expected = lhs.astype(np.int64) @ rhs.astype(np.int64)
    backends = {"reference": reference.accumulate, "xla": xla.accumulate, "aqt": aqt.accumulate}
    for name, accumulate in backends.items():
        found = np.asarray(jax.jit(accumulate)(lhs, rhs))
        if not np.array_equal(found, expected):
            raise VerificationError(f"{name}: int32 accumulators differ from NumPy's")
    return f"int32 accumulators exact: {', '.join(backends)}"


def packing() -> str:
    """Packed integers come back as they went in, on this device."""
    from mpqdiff.quantize.pack import pack, unpack

    rng = np.random.default_rng(0)
    for bits in (2, 4, 8):
        limit = 2 ** (bits - 1) - 1
        values = rng.integers(-limit, limit + 1, (37, 12)).astype(np.int8)
        found = jax.jit(lambda p, b=bits: unpack(p, b, (37, 12)))(jnp.asarray(pack(values, bits)))
        if not np.array_equal(np.asarray(found), values):
            raise VerificationError(f"packing at {bits} bits does not round-trip on this device")
    return "packing round-trips: 2, 4, 8 bits"


def embedded() -> str:
    """The shipped weights load and fit their models."""
    from mpqdiff.weights import ZOO, load

    names = sorted(path.stem for path in ZOO.glob("*_dit*.safetensors"))
    for name in names:
        load(name)
    return f"embedded weights: {', '.join(names)}"


CHECKS: dict[str, Callable[[], str]] = {
    "integers": integers,
    "packing": packing,
    "embedded": embedded,
}


def report() -> str:
    """What to print. Raises VerificationError when a self-test fails."""
    lines = [f"{name:<14} {value}" for name, value in environment().items()]
    lines += [f"{'ok':<14} {check()}" for check in CHECKS.values()]
    return "\n".join(lines)
