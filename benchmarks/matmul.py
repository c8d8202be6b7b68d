"""Float32 against int8 layers at the embedded model's shapes: medians and ratios from one run.

    python benchmarks/matmul.py [--batch 64] [--repeats 40]

Every row times float32 and int8 forms in turn, so that both meet the same machine. `layer` is
x @ W + b against quantise, product, dequantise, bias; `product` is the int8 product alone, its
integers given, `torch int8` the same by `torch._int_mm`; `aqt` the same layer by AQT; both where
they are installed. `mlp` is Dense, GELU, Dense.
`quantise` sets the package's rounding against clip(round(x / scale)) with a conversion to int8.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.kernels.quantized_matmul import quantized_matmul, xla
from mpqdiff.quantize.numerics import quantize_activation, quantize_weight

TOKENS = 49
LAYERS = {
    "qkv": (TOKENS, 96, 288),
    "proj": (TOKENS, 96, 96),
    "fc1": (TOKENS, 96, 384),
    "fc2": (TOKENS, 384, 96),
    "patches": (TOKENS, 16, 96),
    "final": (TOKENS, 96, 16),
    "adaln": (1, 96, 576),
}
SCALE = 0.03


def medians(
    functions: dict[str, tuple[Callable, tuple]],
    repeats: int,
    others: dict[str, Callable] | None = None,
) -> dict[str, float]:
    """Median seconds of each compiled (function, arguments), interleaved call by call.

    `others` take no arguments and block until they are done: another library's, not compiled here.
    """
    others = {} if others is None else others
    compiled = {
        name: (jax.jit(function).lower(*args).compile(), args)
        for name, (function, args) in functions.items()
    }
    for function, args in compiled.values():
        jax.block_until_ready(function(*args))
    for other in others.values():
        other()
    seconds: dict[str, list[float]] = {name: [] for name in (*compiled, *others)}
    for _ in range(repeats):
        for name, (function, args) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            seconds[name].append(time.perf_counter() - start)
        for name, other in others.items():
            start = time.perf_counter()
            other()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def float_layer(x, weight, bias):
    return x @ weight + bias


def integer_layer(x, qvalue, w_scale, bias):
    return quantized_matmul(x, qvalue, jnp.float32(SCALE), None, w_scale, None, bias)


def aqt_layer() -> Callable | None:
    """`integer_layer` by AQT, or None where AQT is not installed."""
    try:
        from mpqdiff.quantize.aqt import aqt_matmul
    except ImportError:
        return None
    return lambda x, qvalue, w_scale, bias: aqt_matmul(
        x, qvalue, jnp.float32(SCALE), None, w_scale, None, bias
    )


def operands(rng, batch: int, tokens: int, inputs: int, outputs: int):
    """(float arguments, integer arguments) of one layer, x [batch, tokens, inputs]."""
    x = jnp.asarray(rng.standard_normal((batch, tokens, inputs)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((inputs, outputs)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(outputs), jnp.float32)
    return (x, kernel, bias), (x, *quantize_weight(kernel, 8, clip="absmax"), bias)


def layer_row(rng, batch: int, shape: tuple[int, int, int], repeats: int) -> dict[str, float]:
    """Medians of one layer in float32, in int8, by AQT, and of the int8 product alone."""
    floats, integers = operands(rng, batch, *shape)
    xq = quantize_activation(floats[0], SCALE, 0, 8)
    functions = {
        "float32": (float_layer, floats),
        "layer": (integer_layer, integers),
        "product": (xla.accumulate, (xq, integers[1])),
    }
    if aqt := aqt_layer():
        functions["aqt"] = (aqt, integers)
    torch = torch_product(xq.reshape(-1, shape[1]), integers[1])
    return medians(functions, repeats, {"torch int8": torch} if torch else {})


def torch_product(xq, wq) -> Callable | None:
    """A call of torch's int8 x int8 -> int32 product on the same integers; None without torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    left, right = torch.from_numpy(np.array(xq)), torch.from_numpy(np.array(wq))
    return lambda: torch._int_mm(left, right)


def mlp_row(rng, batch: int, repeats: int) -> dict[str, float]:
    """Medians of Dense, GELU, Dense (96, 384, 96) in float32, in int8 and by AQT."""
    first, first_int = operands(rng, batch, TOKENS, 96, 384)
    second, second_int = operands(rng, batch, TOKENS, 384, 96)

    def mlp(layer):
        def run(x, inner, outer):
            return layer(jax.nn.gelu(layer(x, *inner), approximate=True), *outer)

        return run

    arguments = first_int[0], first_int[1:], second_int[1:]
    functions = {
        "float32": (mlp(float_layer), (first[0], first[1:], second[1:])),
        "layer": (mlp(integer_layer), arguments),
    }
    if aqt := aqt_layer():
        functions["aqt"] = (mlp(aqt), arguments)
    return medians(functions, repeats)


def quantise_row(rng, batch: int, repeats: int) -> dict[str, float]:
    """Medians of the plain rounding ("float32" column) and of the package's ("layer")."""
    x = jnp.asarray(rng.standard_normal((batch, TOKENS, 384)), jnp.float32)

    def plain(x):
        return jnp.clip(jnp.round(x * (1.0 / jnp.float32(SCALE))), -128, 127).astype(jnp.int8)

    def ours(x):
        return quantize_activation(x, SCALE, 0, 8)

    return medians({"float32": (plain, (x,)), "layer": (ours, (x,))}, repeats)


def table(batch: int, repeats: int) -> str:
    """The table: microseconds of the first column, then ratios to it (above 1 is faster)."""
    rng = np.random.default_rng(0)
    rows = {
        f"{name} {batch * tokens} x {inputs} -> {outputs}": layer_row(
            rng, batch, (tokens, inputs, outputs), repeats
        )
        for name, (tokens, inputs, outputs) in LAYERS.items()
    }
    rows[f"mlp {batch * TOKENS} x 96 -> 384 -> 96"] = mlp_row(rng, batch, repeats)
    rows[f"quantise {batch * TOKENS} x 384 (round, ours)"] = quantise_row(rng, batch, repeats)
    columns = ("layer", "product", "torch int8", "aqt")
    lines = [f"{'':36}{'float32 us':>12}" + "".join(f"{name:>12}" for name in columns)]
    for name, row in rows.items():
        ratios = (f"{row['float32'] / row[c]:.2f}x" if c in row else "-" for c in columns)
        lines.append(
            f"{name:36}{row['float32'] * 1e6:12.0f}" + "".join(f"{ratio:>12}" for ratio in ratios)
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Float32 against int8 layers")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    if min(options.batch, options.repeats) < 1:
        parser.error(f"batch {options.batch} and repeats {options.repeats} must be positive")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, batch {options.batch}")
    print(table(options.batch, options.repeats))


if __name__ == "__main__":
    main()
