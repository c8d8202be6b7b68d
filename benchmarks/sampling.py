"""Integer sampling against float32: the embedded DiT, the same sampler, one process.

    python benchmarks/sampling.py [--batch 64] [--steps 20] [--rounds 7] [--weights fashion_dit]

Every arm runs once per round, in turn; the ratios are medians over rounds of float32's time over
the arm's, so a drift of the machine falls on all of them. Prints jax's version: it matters.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import numpy as np

from mpqdiff import cli
from mpqdiff.arms import list_arms, time_arms
from mpqdiff.config import base
from mpqdiff.pipeline import Experiment


def experiment_config(weights: str, batch: int, steps: int):
    """W8A8, the paper's plan, and both with AQT, at one batch size."""
    config = base()
    config.weights = weights
    config.plan.pins = ()  # paths differ between the models
    config.diffusion.num_steps = steps
    config.calibration.update(samples=16, timesteps=steps)
    config.sample.update(num_images=batch, batch=batch)
    eight = {"w_bits": (8,), "solver": "uniform", "ratio_bits": 8, "ratio": 1.0}
    config.arms = {
        "w8a8": eight,
        "w8a8_static": {**eight, "mode": "static"},
        "w8a8_online": {**eight, "mode": "online"},
        "w8a8_aqt": {**eight, "backend": "aqt"},
    }
    return config


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--weights", default="fashion_dit")
    options = parser.parse_args()
    cli.prepare_jax()
    with tempfile.TemporaryDirectory() as folder:
        config = experiment_config(options.weights, options.batch, options.steps)
        arms = list_arms(Experiment(config, Path(folder)))
        for arm in arms:
            arm.verify()  # what is timed runs in integers
        times = time_arms(arms, options.rounds)
    base_times = np.array(times[0]["own"])
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, batch {options.batch}")
    print(f"{'arm':<14}{'ms/image':>10}{'quartiles':>18}{'x float32':>11}")
    for arm, taken in zip(arms, times, strict=True):
        own = np.array(taken["own"])
        low, median, high = np.percentile(own, [25, 50, 75])
        ratio = np.median(base_times / own)
        print(f"{arm.name:<14}{median:>10.3f}{f'{low:.3f} - {high:.3f}':>18}{ratio:>10.2f}x")


if __name__ == "__main__":
    main()
