"""What an arm costs: latency, memory, share of the device's peak, and its BitOPs, term by term.

Latency is of a compiled call, warmed up, waited for, every arm once per round in turn, so that a
drift of the machine falls on all; medians with quartiles, at batch 1 and at a throughput batch.

The share of the peak sets the time that an arm's products would take at the fastest rates this
very device was seen to reach, in each type of operand, against the time that the arm takes:

    share = (MACs_int8 / rate_int8 + MACs_float32 / rate_float32) / seconds

MACs do not depend on bit widths, so a narrower plan does not look busier. All else that an arm
does (quantising, softmax, the sampler) lowers its share.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.costs.latency import time_plans
from mpqdiff.errors import InputError, unknown_name
from mpqdiff.kernels.quantized_matmul import xla
from mpqdiff.records import FLOAT_BITS
from mpqdiff.sites import Remainder, Site

# How a square product of each operand type is run for the ceiling: as the arms run theirs.
PRODUCTS = {"float32": jnp.matmul, "int8": xla.accumulate}
SIZES = (256, 512, 1024, 2048, 4096, 8192)
_LONG_ENOUGH = 0.02  # seconds of one product, past which a larger one is no faster
_ZERO_POINT_BITS, _COLUMN_SUM_BITS, _CONTAINER_BITS = 8, 32, 8

ASSUMPTIONS = (
    "a multiply-add of w x a bits counts w a, a float operand 32 bits",
    "attention products count the widths of both operands; products outside any site, found by "
    "closure, count 32 x 32",
    "a zero point counts a product of 8 x 32 bits per output, its column sums being prepared "
    "(at most that: often one serves many outputs)",
    "convolution windows that reach over padding count whole",
    "planned widths are counted; 'executed' counts 8 x 8 for every integer product, which is what "
    "the kernels multiply at any width",
    "left out: quantising and dequantising, softmax, normalisation, activation functions, the "
    "sampler's own arithmetic, rows that fill up a last batch",
)


class Latency(NamedTuple):
    """Milliseconds per image at `batch` images per call: median and quartiles of `n` rounds."""

    batch: int
    median: float
    low: float
    high: float
    n: int

    @property
    def images_per_second(self) -> float:
        return 1e3 / self.median

    def to_json(self) -> dict[str, float]:
        """As `results.json` holds it."""
        return {**self._asdict(), "iqr": self.high - self.low}


def latencies(
    calls: Mapping[str, Mapping[int, Callable[[], Any]]], *, rounds: int
) -> dict[str, dict[int, Latency]]:
    """The latency of each arm at each batch; `calls[arm][batch]()` starts that call.

    A first round, which may compile, is not counted. Raises InputError on fewer than 2 rounds or
    a batch below 1.
    """
    pairs = [(arm, batch) for arm, batches in calls.items() for batch in batches]
    if rounds < 2 or any(batch < 1 for _, batch in pairs):
        raise InputError(
            f"got rounds={rounds}, batches {sorted({batch for _, batch in pairs})}; expected at "
            "least 2 rounds and batches of at least 1"
        )
    runners = [_blocking(calls[arm][batch]) for arm, batch in pairs]
    found: dict[str, dict[int, Latency]] = {arm: {} for arm in calls}
    for (arm, batch), seconds in zip(pairs, time_plans(runners, rounds), strict=True):
        low, median, high = (float(v) for v in np.percentile(1e3 * seconds / batch, [25, 50, 75]))
        found[arm][batch] = Latency(batch, median, low, high, rounds)
    return found


def _blocking(call: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(call())


def peak_memory(compiled) -> dict[str, int | None]:
    """Bytes: `executable`, what a compiled call holds at once (arguments, results, scratch);
    `device`, the most that this process ever held on its device, None where that is not counted.
    """
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    counted = jax.local_devices()[0].memory_stats() or {}
    return {
        "executable": int(held - memory.alias_size_in_bytes),
        "device": counted.get("peak_bytes_in_use"),
    }


class Ceiling(NamedTuple):
    """The fastest square product seen on this device: `size` x `size` operands of `kind`."""

    kind: str
    macs_per_second: float
    size: int


@lru_cache
def ceiling(kind: str) -> Ceiling:
    """The measured ceiling of "int8" or "float32" (at default precision); once per process.

    Sizes rise until one product takes 0.02 s; the best of 5 times at the best size counts.
    Raises InputError on another kind.
    """
    if kind not in PRODUCTS:
        raise unknown_name("operand type", kind, PRODUCTS)
    product, best = jax.jit(PRODUCTS[kind]), Ceiling(kind, 0.0, 0)
    rng = np.random.default_rng(0)
    for size in SIZES:
        operands = (jnp.asarray(rng.integers(-127, 128, (size, size)), kind) for _ in range(2))
        seconds = _fastest(product, *operands)
        if size**3 / seconds > best.macs_per_second:
            best = Ceiling(kind, size**3 / seconds, size)
        if seconds > _LONG_ENOUGH:
            break
    return best


def _fastest(product, lhs, rhs, *, repeats: int = 5) -> float:
    """Seconds per product; short ones start together, or starting them is what is timed."""
    jax.block_until_ready(product(lhs, rhs))
    seconds, together = [], 1
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([product(lhs, rhs) for _ in range(together)])
        seconds.append((time.perf_counter() - start) / together)
        together = int(np.clip(_LONG_ENOUGH / seconds[0], 1, 8))
    return min(seconds)


def macs_by_type(
    sites: Sequence[Site],
    remainder: Sequence[Remainder],
    integer: Iterable[Site],
    *,
    evaluations: int,
) -> dict[str, float]:
    """{"int8", "float32"}: MACs of an image that takes `evaluations` denoiser calls.

    `integer` are those of `sites` that run in integers (`Plan.integer`).
    """
    total = sum(entry.macs for entry in (*sites, *remainder))
    quantised = sum(site.macs for site in integer)
    return {
        "int8": float(evaluations * quantised),
        "float32": float(evaluations * (total - quantised)),
    }


def fraction_of_peak(
    macs: Mapping[str, float], seconds: float, ceilings: Mapping[str, Ceiling] | None = None
) -> float:
    """Share of the device's measured peak that `macs` (by type) in `seconds` amount to.

    `ceilings` default to `ceiling` of each type. Raises InputError unless the time is positive.
    """
    if not seconds > 0:
        raise InputError(f"got {seconds} seconds, expected a positive time")
    rates = {kind: (ceilings[kind] if ceilings else ceiling(kind)) for kind in macs if macs[kind]}
    return sum(macs[kind] / rate.macs_per_second for kind, rate in rates.items()) / seconds


def bitops_terms(
    sites: Sequence[Site],
    remainder: Sequence[Remainder],
    w_bits: Mapping[str, int | None],
    a_bits: Mapping[str, Any],
    *,
    asymmetric: Iterable[str],
    evaluations: int,
) -> dict[str, float]:
    """BitOPs of an image by term, under ASSUMPTIONS; `total` is the sum of the others but
    `executed`, which counts the integer products as they run.

    Widths by site path as a plan has them, None in float; `asymmetric` are the paths of the sites
    whose activation has a zero point.
    """
    terms = dict.fromkeys(("weights", "attention", "zero_points", "float"), 0.0)
    integer_macs, lopsided = 0, set(asymmetric)
    for site in sites:
        a = a_bits.get(site.path)
        bits = list(a.values()) if isinstance(a, dict) else [w_bits.get(site.path), a]
        if None in bits:  # a weight in integers before a float activation multiplies as float
            terms["float"] += site.macs * float(np.prod([b or FLOAT_BITS for b in bits]))
            continue
        terms["weights" if site.parameters else "attention"] += site.macs * bits[0] * bits[1]
        integer_macs += site.macs
        if site.path in lopsided:
            outputs = site.macs * site.shape[-1] // site.parameters
            terms["zero_points"] += outputs * _ZERO_POINT_BITS * _COLUMN_SUM_BITS
    terms["float"] += sum(entry.macs for entry in remainder) * FLOAT_BITS**2
    executed = integer_macs * _CONTAINER_BITS**2 + terms["zero_points"] + terms["float"]
    terms |= {"total": sum(terms.values()), "executed": executed}
    return {name: float(evaluations * value) for name, value in terms.items()}


def bitops_text(terms: Mapping[str, float]) -> str:
    """`bitops_terms` and their assumptions, for people."""
    total = terms["total"]
    shares = ", ".join(
        f"{name.replace('_', ' ')} {value / total:.1%}"
        for name, value in terms.items()
        if name not in ("total", "executed") and total
    )
    lines = [
        f"{total:.4g} BitOPs per image ({shares})",
        f"{terms['executed']:.4g} as executed",
        *ASSUMPTIONS,
    ]
    return "\n".join(lines)
