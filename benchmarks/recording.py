"""Cost of recording Grams against the bare forward passes, in time and in memory.

    python benchmarks/recording.py [--weights fashion_dit] [--samples 64] [--chunk 5]
                                   [--timesteps 5 10 20] [--rounds 5] [--widths 48 96 192]

Both run the same forward, vmapped over `chunk` timesteps at a time and compiled before timing;
inputs are noise. Rounds alternate between the two; the ratio is that of the medians. Memory is
the temporary memory of the compiled program, for a DiT of each width.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from tqdm import tqdm

from mpqdiff import models, sites, weights
from mpqdiff.denoiser import from_linen
from mpqdiff.record import one_timestep


def programs(module, params, sample):
    """Compiled {"bare", "recording"} over a chunk; `sample` is (x_t [T,N,H,W,C], t [T,N], cond)."""
    denoise = from_linen(module)
    shape = (module.image_size, module.image_size, module.channels)
    found, _ = sites.list_sites(denoise, params, *sites.example_inputs(shape))
    functions = {
        "bare": lambda *call: denoise(*call).eps,
        "recording": one_timestep(denoise, sites.planned(found)),
    }
    compiled = {
        name: jax.jit(jax.vmap(function, in_axes=(None, 0, 0, None)))
        .lower(params, *sample)
        .compile()
        for name, function in functions.items()
    }
    return compiled, len(sites.planned(found))


def sample_of(module, *, chunk: int, samples: int):
    """Noise at `chunk` timesteps, with every class in turn."""
    shape = (chunk, samples, module.image_size, module.image_size, module.channels)
    x_t = jax.random.normal(jax.random.key(0), shape)
    t = jnp.broadcast_to(jnp.linspace(999, 0, chunk).astype(jnp.int32)[:, None], shape[:2])
    return x_t, t, jnp.arange(samples, dtype=jnp.int32) % module.num_classes


def seconds(program, params, sample, chunks: int) -> float:
    begin = time.perf_counter()
    for _ in range(chunks):
        jax.block_until_ready(program(params, *sample))
    return time.perf_counter() - begin


def time_both(compiled, params, sample, *, chunks: int, rounds: int) -> dict[str, float]:
    """Median seconds of each program over alternating rounds."""
    taken = {name: [] for name in compiled}
    for _ in tqdm(range(rounds), desc=f"{chunks} chunks", unit="round", leave=False):
        for name, program in compiled.items():
            taken[name].append(seconds(program, params, sample, chunks))
    return {name: statistics.median(times) for name, times in taken.items()}


def memory(width: int, *, chunk: int, samples: int) -> dict[str, int]:
    """Temporary bytes of both programs for a two-block DiT of `width`; nothing is run."""
    module = models.build(
        "dit",
        image_size=28,
        channels=1,
        patch=4,
        width=width,
        depth=2,
        num_heads=4,
        num_classes=10,
    )
    params = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    sample = jax.eval_shape(lambda: sample_of(module, chunk=chunk, samples=samples))
    compiled, _ = programs(module, params, sample)
    return {
        name: program.memory_analysis().temp_size_in_bytes for name, program in compiled.items()
    }


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="fashion_dit")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=5, help="timesteps vmapped at once")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="*", default=[48, 96, 192])
    options = parser.parse_args(argv)
    module, params, _ = weights.load(options.weights)
    sample = sample_of(module, chunk=options.chunk, samples=options.samples)
    compiled, count = programs(module, params, sample)
    for program in compiled.values():
        jax.block_until_ready(program(params, *sample))
    print(
        f"{options.weights}: {count} sites, {options.samples} samples, {options.chunk} timesteps "
        f"at once, {options.rounds} rounds; jax {jax.__version__} on {jax.devices()[0].device_kind}"
    )
    print("| timesteps | bare, s | recording, s | ratio of medians | recording, ms per timestep |")
    print("|---|---|---|---|---|")
    for timesteps in options.timesteps:
        chunks = -(-timesteps // options.chunk)
        taken = time_both(compiled, params, sample, chunks=chunks, rounds=options.rounds)
        ratio = taken["recording"] / taken["bare"]
        each = 1e3 * taken["recording"] / (chunks * options.chunk)
        cells = f"{taken['bare']:.3f} | {taken['recording']:.3f} | {ratio:.2f} | {each:.1f}"
        print(f"| {chunks * options.chunk} | {cells} |")
    if options.widths:
        print("| width | bare, temporary MB | recording | beyond the bare forward |")
        print("|---|---|---|---|")
    for width in options.widths:
        taken = memory(width, chunk=options.chunk, samples=options.samples)
        bare, recording = (taken[name] / 2**20 for name in ("bare", "recording"))
        print(f"| {width} | {bare:.1f} | {recording:.1f} | {recording - bare:+.1f} |")


if __name__ == "__main__":
    main()
