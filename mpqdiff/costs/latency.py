"""Seconds of each site at each choice, measured per unique operation shape on this device.

A site's operation is its shape as the sampler's batched call has it; an execution is how a choice
runs it. The width of an activation changes nothing (int8 holds them all), and a packed width is
timed as it runs: unpacked inside a loop that XLA may take it out of. Each pair is timed once, with
fresh inputs, in a loop like the sampler's, and kept per device in the user's cache folder; remove
the file to measure again.

Layers in a sampler fuse with what is around them: `costs.calibration` fits the table to whole
samplers.
"""

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from mpqdiff.artifacts import digest, read_json, write_json
from mpqdiff.costs.legality import (
    FLOATS,
    INTEGERS,
    Choice,
    Convolution,
    Einsum,
    Operation,
    execution,
    executions,
)
from mpqdiff.errors import InputError
from mpqdiff.models.product import Product
from mpqdiff.quantize.numerics import qmax
from mpqdiff.sites import Site

# What multiplies packed weights beside XLA, by platform: names of `quantize.backends.BACKENDS`. An
# execution by one of them is named "int4@pallas_tpu".
ALTERNATIVES: dict[str, tuple[str, ...]] = {"tpu": ("pallas_tpu",), "gpu": ("pallas_gpu",)}
DTYPES = {"float32": jnp.float32, "bf16": jnp.bfloat16}
VERSION = 2  # of the way of measuring: other versions' entries are not read
ROUNDS = 40
QUIET = 25  # percentile of rounds that sets the level: other work only ever adds time
CALL = 2e-3  # seconds that one timed call should take, unless a single step takes longer
MAX_REPEATS = 20_000
INPUTS, INPUT_BYTES = 4, 2**26  # different inputs per loop, and what they may take together


class Timing(NamedTuple):
    """Seconds that an operation takes: median and quartiles over rounds (`steady`)."""

    median: float
    low: float
    high: float


class Latencies(NamedTuple):
    """What was measured on `device`: seconds by operation and execution."""

    device: dict[str, Any]
    seconds: dict[Operation, dict[str, Timing]]

    @property
    def digest(self) -> str:
        """Of the device and these entries: a measured table is an input, hashed like one."""
        named = {_name(operation): entry for operation, entry in self.seconds.items()}
        return digest(self.device, named)


def table(
    latencies: Latencies, operations: Mapping[str, Operation], choices: Sequence[Choice]
) -> np.ndarray:
    """Seconds per denoiser call of each site at each of `choices`, float64 [L,K].

    Infinite where an operation has no such execution: no plan may choose it (`legality`).
    """
    return np.array(
        [
            [
                fastest(latencies.seconds[operation], execution(operation, *choice))[1]
                for choice in choices
            ]
            for operation in operations.values()
        ],
        np.float64,
    ).reshape(len(operations), len(choices))


def alternatives() -> tuple[str, ...]:
    """The back ends beside XLA that this device has."""
    return ALTERNATIVES.get(jax.default_backend(), ())


def fastest(entry: Mapping[str, Timing], name: str) -> tuple[str, float]:
    """(back end, seconds) of execution `name` where it is quickest: "kernels" is XLA's own.

    ("kernels", infinity) where it was not measured.
    """
    found = {
        key.partition("@")[2] or "kernels": timing.median
        for key, timing in entry.items()
        if key.partition("@")[0] == name
    }
    best = min(found, key=lambda key: found[key], default="kernels")
    return best, found.get(best, np.inf)


def ways(operation: Operation) -> tuple[str, ...]:
    """The executions of `operation` to time: its own, and those of packed weights by every
    alternative."""
    names = executions(operation)
    if operation.kind == "product":
        return names
    packed = [name for name in names if name in INTEGERS]
    return (*names, *(f"{name}@{other}" for other in alternatives() for name in packed))


def device() -> dict[str, Any]:
    """What timings depend on, as far as it can be named: the key of the cache."""
    kind = jax.devices()[0].device_kind
    return {
        "kind": _processor() if kind == "cpu" else kind,
        "jax": jax.__version__,
        "cpus": os.cpu_count(),
        "version": VERSION,
    }


def _processor() -> str:
    """The processor's model: jax calls every one "cpu", and a home folder may serve several."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"{platform.machine()} {platform.processor()}".strip()


def cache_folder() -> Path:
    """Where measurements are kept: mpqdiff/latency in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "mpqdiff" / "latency"


def measure(
    operations: Iterable[Operation], *, rounds: int = ROUNDS, folder: Path | None = None
) -> Latencies:
    """The seconds of `operations` in all their executions; those not in the cache are timed now.

    All executions of an operation come from the same rounds, so that their ratios hold. Raises
    InputError on a cache file that is damaged or cannot be written.
    """
    about, unique = device(), list(dict.fromkeys(operations))
    path = (cache_folder() if folder is None else folder) / f"{digest(about)}.json"
    known = _read(path)
    new = [operation for operation in unique if _name(operation) not in known]
    if new:
        taken = {_name(operation): entry for operation, entry in time_all(new, rounds).items()}
        known = taken | _read(path)  # another process may have been faster
        try:
            write_json(path, {"device": about, "entries": known})
        except OSError as error:
            raise InputError(
                f"latencies cannot be kept in {path.parent} ({error.strerror}): set XDG_CACHE_HOME "
                "to a folder that can be written"
            ) from error
    found = {
        operation: {name: Timing(*entry) for name, entry in known[_name(operation)].items()}
        for operation in unique
    }
    return Latencies(about, found)


def _name(operation: Operation) -> str:
    return json.dumps(asdict(operation))


def _read(path: Path) -> dict[str, dict[str, list[float]]]:
    if not path.exists():
        return {}
    stored = read_json(path)
    try:
        for entry in stored["entries"].values():
            if not all(0 < seconds < np.inf for name in FLOATS for seconds in Timing(*entry[name])):
                raise ValueError(entry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a latency table; delete it and run again") from error
    return stored["entries"]


# --- One operation, timed.


def time_all(operations: Sequence[Operation], rounds: int) -> dict[Operation, dict[str, Timing]]:
    """Seconds of each of `operations` in each execution, interleaved over `rounds`."""
    runners, repeats = {}, {}
    for operation in tqdm(operations, desc="compile latencies", disable=len(operations) < 2):
        inputs = example_inputs(operation)
        for name in ways(operation):
            pair = operation, name
            runners[pair], repeats[pair] = _runner(*program(operation, name), inputs)
    seconds = steady(time_plans(list(runners.values()), rounds))
    seconds /= np.array([*repeats.values()])[:, None]
    found: dict[Operation, dict[str, Timing]] = {operation: {} for operation in operations}
    for (operation, name), taken in zip(runners, seconds, strict=True):
        found[operation][name] = Timing(*map(float, np.percentile(taken, [50, 25, 75])))
    return found


def example_inputs(operation: Operation):
    """Operands, scales and zero points of INPUTS steps (fewer where memory is short), stacked."""
    rng = np.random.default_rng(0)
    _, shapes = _module(operation)
    count = max(2, min(INPUTS, INPUT_BYTES // (4 * sum(map(prod, shapes)))))
    inputs = {
        "args": tuple(rng.random((count, *shape), np.float32) * 4 - 2 for shape in shapes),
        "scale": np.linspace(0.015, 0.02, 2 * count, dtype=np.float32).reshape(count, 2),
        "zero": np.arange(2 * count, dtype=np.int8).reshape(count, 2),
    }
    return jax.tree.map(jnp.asarray, inputs)


def program(operation: Operation, name: str):
    """(step, held): `step(inputs[i], held)` runs `operation` as execution `name`."""
    rng = np.random.default_rng(1)
    module, _ = _module(operation)
    held, shape = {}, (operation.contraction, operation.outputs)
    if operation.bias:
        held["bias"] = rng.random(operation.outputs, np.float32)
    if name in FLOATS:
        if operation.kind != "product":
            kernel = rng.random(shape, np.float32) - 0.5
            held["kernel"] = jnp.asarray(kernel.reshape(_kernel_shape(operation)), DTYPES[name])
        step = partial(_float_step, module, DTYPES[name])
    else:
        from mpqdiff.quantize.backends import BACKENDS  # of a higher layer: only here, when timed

        execution_name, _, other = name.partition("@")
        bits = INTEGERS[execution_name]
        hold, open_, matmul = BACKENDS[other or "kernels"]()
        if operation.kind != "product":
            qvalue = rng.integers(-qmax(bits), qmax(bits) + 1, shape, np.int8)
            held |= {"qvalue": hold(qvalue, bits), "scale": np.full(shape[1], 0.01, np.float32)}
            if operation.asymmetric:
                held["colsum"] = qvalue.sum(axis=0, dtype=np.int32)
        site = Site("timed", operation.kind, shape, prod(shape), 0, 0, "timed")
        open_ = partial(open_, bits=bits, shape=shape)
        step = partial(_integer_step, site, module, operation.online, open_, matmul)
    return step, jax.tree.map(jnp.asarray, held)


def _module(operation: Operation):
    """(the linen module of `operation`, the shapes of its operands)."""
    g = operation.geometry
    if isinstance(g, Einsum):
        return Product(g.equation), [g.lhs, g.rhs]
    if not isinstance(g, Convolution):
        shape = (operation.rows, operation.contraction)
        return nn.Dense(operation.outputs, use_bias=operation.bias), [shape]
    conv = nn.Conv(
        operation.outputs,
        g.kernel_size,
        strides=g.strides,
        padding=g.padding,
        kernel_dilation=g.kernel_dilation,
        input_dilation=g.input_dilation,
        feature_group_count=g.groups,
        use_bias=operation.bias,
    )
    return conv, [g.shape]


def _kernel_shape(operation: Operation) -> tuple[int, ...]:
    g = operation.geometry
    if not isinstance(g, Convolution):
        return operation.contraction, operation.outputs
    return *np.atleast_1d(g.kernel_size), g.shape[-1] // g.groups, operation.outputs


def _float_step(module, dtype, at, held):
    args = [x.astype(dtype) for x in at["args"]]
    if isinstance(module, Product):
        return jnp.asarray(module.apply({}, *args), jnp.float32)
    y = module.clone(dtype=dtype).apply({"params": held}, *args)
    return jnp.asarray(y, jnp.float32)


def _integer_step(site: Site, module, online: bool, open_, matmul, at, held):
    from mpqdiff.quantize.operate import integer_site

    product = site.kind == "product"
    return integer_site(
        site,
        module,
        at["args"],
        held,
        None if online else (at["scale"], at["zero"]),
        (0, 1) if product else (0,),
        {"lhs": 8, "rhs": 8} if product else 8,
        open_=open_,
        matmul=matmul,
    )


def _loop(step, count, inputs, held):
    """`step` `count` times, over the inputs in turn. Each output is added to a running mean, as a
    residual adds it, so that all of it is needed."""

    def body(index, mean):
        at = jax.tree.map(
            lambda a: lax.dynamic_index_in_dim(a, index % len(a), keepdims=False), inputs
        )
        return 0.5 * mean + step(at, held)

    out = jax.eval_shape(step, jax.tree.map(lambda a: a[0], inputs), held)
    return lax.fori_loop(0, count, body, jnp.zeros(out.shape, out.dtype))


def _runner(step, held, inputs):
    """(zero-argument callable that blocks, repetitions in it), compiled and warm."""
    loop = jax.jit(partial(_loop, step))

    def run(count: int) -> float:
        start = time.perf_counter()
        loop(count, inputs, held).block_until_ready()
        return time.perf_counter() - start

    run(1)
    count = 2
    for _ in range(3):  # the first guesses hold what a call costs beside its steps
        count = int(np.clip(CALL * count / run(count), 2, MAX_REPEATS))
    return partial(run, count), count


def time_plans(runners: Sequence[Callable[[], object]], rounds: int) -> np.ndarray:
    """Seconds [P, rounds] of `runners`, which block until they are done.

    Every round runs each once, in turn, so that a drift of the machine falls on all of them; a
    first round is not counted.
    """
    seconds = np.empty((rounds + 1, len(runners)))
    for taken in seconds:
        for index, runner in enumerate(runners):
            start = time.perf_counter()
            runner()
            taken[index] = time.perf_counter() - start
    return seconds[1:].T


def steady(seconds: np.ndarray) -> np.ndarray:
    """`seconds` [P, rounds] as if all rounds had been as quick as the quieter ones.

    A round in which the machine had other work is slow for every runner, so each is scaled by the
    median of its runners to the lower quartile of those medians.
    """
    level = np.median(seconds, axis=0)
    return seconds / level * np.percentile(level, QUIET)
