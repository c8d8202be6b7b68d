"""What it costs to switch precision between groups of steps: time per image and bytes held.

    mpqdiff bench switching --weights=fashion_dit --steps=50 --groups=1,2,5,10

Two plans of one model, all sites at 4 bits and all at 8, take turns over G groups of neighbouring
steps: one compiled scan that chooses the model of its step by `lax.switch`. A plan that keeps its
widths for all steps is one model; every stored width of one that does not is paid for in bytes.
Ratios are within rounds, to the mean of the two models alone.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
from table import piped

from mpqdiff import joint, student
from mpqdiff.config import base
from mpqdiff.pipeline import Experiment


def taking_turns(models, steps: np.ndarray, groups: int, length: int):
    """A denoiser that runs `models` in turn over `groups` groups of `steps`, and its parameters."""
    turn = np.zeros(length, np.int32)
    for index, own in enumerate(np.array_split(steps, groups)):
        turn[own] = index % len(models)
    member = jnp.asarray(turn)

    def denoise(params, x_t, t, cond):
        branches = [
            lambda x_t, t, cond, i=i, model=model: model.denoise(params[i], x_t, t, cond)
            for i, model in enumerate(models)
        ]
        return jax.lax.switch(member[t], branches, x_t, t, cond)

    return denoise, [model.params for model in models]


def build(weights: str, steps: int, batch: int, folder: Path):
    """(experiment, [model at 4 bits, model at 8 bits], kept steps)."""
    config = base()
    config.weights = weights
    config.plan.pins = ()
    config.score.name = "weight_error"
    config.diffusion.num_steps = steps
    config.calibration.update(samples=16, timesteps=10)
    config.sample.update(num_images=batch, batch=batch)
    config.plan.update(solver="uniform", ratio=1.0)
    experiment = Experiment(config, folder)
    models = []
    for bits in (4, 8):
        recipe = config.copy_and_resolve_references()
        recipe.plan.update(w_bits=(bits,), ratio_bits=bits)
        models.append(student.model(experiment, recipe, joint.plan(experiment, recipe, "uniform")))
    return experiment, models, experiment.timesteps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="fashion_dit")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--groups", default="1,2,5,10")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        experiment, models, kept = build(given.weights, given.steps, given.batch, Path(folder))
        inputs = experiment.inputs(0, 0, given.batch)
        runs = {
            f"{bits} bits alone": (model.denoise, model.params)
            for bits, model in zip((4, 8), models, strict=True)
        }
        counts = [int(count) for count in given.groups.split(",")]
        for count in counts:
            runs[f"switched, {count} groups"] = taking_turns(
                models, kept, count, len(experiment.abar)
            )
        compiled = {}
        for name, (denoise, params) in runs.items():
            run = jax.jit(experiment.sampler(denoise, kept))
            compiled[name] = run.lower(params, *inputs).compile(), params
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for index in range(given.rounds + 1):
            for name, (run, params) in compiled.items():
                start = time.perf_counter()
                run(params, *inputs).block_until_ready()
                if index:
                    taken[name].append(1e3 * (time.perf_counter() - start) / given.batch)
    alone = (np.array(taken["4 bits alone"]) + np.array(taken["8 bits alone"])) / 2
    rows = []
    for name, (_, params) in runs.items():
        held = sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(params))
        ratio = np.array(taken[name]) / alone
        low, middle, high = np.percentile(ratio, [25, 50, 75])
        milliseconds = f"{np.median(taken[name]):.3f}"
        rows.append([name, milliseconds, f"{middle:.3f} ({low:.3f} to {high:.3f})", f"{held:,}"])
    print(piped(["sampler", "ms/image", "to the mean of both alone (quartiles)", "bytes"], rows))


if __name__ == "__main__":
    main()
