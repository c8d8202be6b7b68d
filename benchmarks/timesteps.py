"""Which steps to run: selectors against each other, by edge cost and by paired error of x_0.

    python benchmarks/timesteps.py [--weights fashion_dit] [--steps 10 20 50] [--images 256]
                                   [--recorded 32] [--drift_images 8] [--sampler ddim] [--batch 64]

One trajectory of F = 1000 steps of `recorded` images gives the Gram; `exact` is the shortest path
over it, `exact, x_0` and `exact, squares` are other readings of the edge cost (data_std = inf,
power = 2), `edges pruned` is greedy on the same costs. `drift pruned` goes by the drift of a
student whose kernels are rounded to 4 bits. No tail is protected: a tenth of the schedule is more
than 50 steps. Costs are all of the default reading. The x0 MSE is against the float sample in 1000
steps, from the same noise, of images that were not recorded; both 95 % intervals are over images.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mpqdiff import cli, timesteps, weights
from mpqdiff.denoiser import from_linen
from mpqdiff.diffusion.samplers import SAMPLERS, initial_noise, step_keys
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.evaluate.intervals import mean_interval
from mpqdiff.evaluate.paired import paired_difference, x0_errors
from mpqdiff.quantize.numerics import dequantize_weight, quantize_weight
from mpqdiff.timesteps import drift, edges, gram, shortest_path
from mpqdiff.timesteps.candidates import candidates_of

LENGTH = 1000
RECORDED_SEED, SEED = 1, 1234


def rounded(params, bits: int):
    """`params` with every kernel rounded to `bits` and back: a student in float arithmetic."""

    def leaf(path, value):
        name = path[-1].key
        return dequantize_weight(*quantize_weight(value, bits)) if name == "kernel" else value

    return jax.tree_util.tree_map_with_path(leaf, params)


def sampled(denoise, params, shape, classes: int, steps, abar, options) -> np.ndarray:
    """x_0 [images,H,W,C] over `steps` [S], in batches of one compiled shape."""

    @jax.jit
    def run(params, noise, labels, keys):
        sampler = SAMPLERS[options.sampler]
        return sampler(
            denoise, params, noise, labels, timesteps=steps, alphas_cumprod=abar, keys=keys
        )

    parts = []
    starts = range(0, options.images, options.batch)
    for start in tqdm(starts, desc=f"{len(steps)} steps", unit="batch", leave=False):
        noise = initial_noise(SEED, start, options.batch, shape)
        labels = (start + jnp.arange(options.batch)) % classes
        keys = step_keys(SEED, start, options.batch)
        parts.append(np.asarray(run(params, noise, labels, keys)))
    return np.concatenate(parts)[: options.images]


def timed(text: str, function, *args, **kwargs):
    """The result, after a line with its seconds."""
    begin = time.perf_counter()
    out = function(*args, **kwargs)
    print(f"{text}: {time.perf_counter() - begin:.2f} s", flush=True)
    return out


def selections(abar, num_steps: int, found: dict) -> dict[str, np.ndarray]:
    """The timesteps of every arm."""
    from_gram = {"gram": found["gram"]}
    arms = {
        "exact": ("shortest_path", from_gram),
        "uniform": ("uniform", {}),
        "quadratic": ("quadratic", {}),
        "log-SNR": ("log_snr", {}),
        "drift pruned": ("drift", {"drift": found["drift"], "tail": 0.0}),
        "edges pruned": ("drift_edges", {**from_gram, "tail": 0.0}),
        "exact, x_0": ("shortest_path", {**from_gram, "data_std": np.inf}),
        "exact, squares": ("shortest_path", {**from_gram, "power": 2}),
    }
    return {
        arm: timesteps.select(abar, num_steps, name, **kwargs)
        for arm, (name, kwargs) in arms.items()
    }


def record(denoise, params, shape, classes: int, abar, options) -> dict:
    """The Gram of the teacher and the drift of the 4-bit student, on seeds of their own."""
    noise = initial_noise(RECORDED_SEED, 0, options.recorded, shape)
    labels = jnp.arange(options.recorded) % classes
    few = slice(options.drift_images)
    student = rounded(params, 4)
    return {
        "gram": timed(
            f"Gram of {options.recorded} images in {LENGTH} steps",
            gram.record_gram,
            denoise,
            params,
            noise,
            labels,
            alphas_cumprod=abar,
        ),
        "drift": timed(
            f"drift of {options.drift_images} images in {LENGTH} steps",
            drift.measure,
            denoise,
            params,
            denoise,
            student,
            noise[few],
            labels[few],
            alphas_cumprod=abar,
            reading="teacher_eps",
        ),
    }


def main(argv=None) -> None:
    """Print seconds, then a row for each number of steps and arm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="fashion_dit")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--recorded", type=int, default=32)
    parser.add_argument("--drift_images", type=int, default=8)
    parser.add_argument("--sampler", default="ddim", choices=sorted(SAMPLERS))
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args(argv)
    cli.prepare_jax()
    module, params, _ = weights.load(options.weights)
    denoise, classes = from_linen(module), module.num_classes
    shape = (module.image_size, module.image_size, module.channels)
    abar = alphas_cumprod("linear", LENGTH)
    every = candidates_of(abar)
    print(f"{options.weights}, jax {jax.__version__} on {jax.devices()[0].device_kind}")
    found = record(denoise, params, shape, classes, abar, options)
    costs = timed("edge costs", edges.edge_costs, found["gram"], abar)
    timed("shortest paths for 1 to 500 steps", shortest_path.front, costs, 500)
    reference = timed(
        f"{options.images} samples in {LENGTH} steps",
        sampled,
        *(denoise, params, shape, classes, every, abar, options),
    )
    print("\n| steps | timesteps | edge cost | x0 MSE (95 %) | x uniform | less uniform (95 %) |")
    print("|---|---|---|---|---|---|")
    for num_steps in options.steps:
        arms = selections(abar, num_steps, found)
        errors = {
            arm: x0_errors(
                sampled(denoise, params, shape, classes, steps, abar, options), reference
            )
            for arm, steps in arms.items()
        }
        for arm, steps in arms.items():
            value, low, high = mean_interval(errors[arm])
            ratio = value / errors["uniform"].mean()
            less = paired_difference(errors[arm], errors["uniform"])
            cost = edges.path_cost(costs, steps, every)
            print(
                f"| {num_steps} | {arm} | {cost:.4f} | {value:.3e} ({low:.3e} to {high:.3e}) | "
                f"{ratio:.3f} | {less.value:+.2e} ({less.low:+.2e} to {less.high:+.2e}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
