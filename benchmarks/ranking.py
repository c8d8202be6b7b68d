"""How stable manifold sensitivity is: Kendall's tau between rankings, and what the plans are worth.

    mpqdiff bench ranking --weights=fashion_dit,fashion_dit_seed1 --seeds=3 --images=500

Rankings between calibration seeds of one model, and between two models trained from different
seeds, for the combined score and for each of its signals. DiffPro (arXiv 2511.11446) says that its
ranking can depend on the seed; its notes aim at 0.8. With `--images`, the plan at 6.25x of every
model and calibration seed is sampled in 50 even steps, on the same image seeds: paired error, delta
FID and damage against float at those steps.
"""

import argparse
import runpy
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau
from table import interval, piped

from mpqdiff import fidelity, scoring
from mpqdiff.arms import list_arms
from mpqdiff.pipeline import Experiment

SIGNALS = ("combined", "energy", "pca", "dimension", "growth")
WORTH = {"x0_mse": ".2e", "delta_fid": ".2f", "damage": ".3f"}
CONFIG = Path(__file__).parents[1] / "configs" / "diffpro.py"


def recipe(weights: str, seed: int, samples: int, images: int):
    """DiffPro's bits on one model and calibration seed, at 50 even steps."""
    config = runpy.run_path(str(CONFIG))["method"](weights)
    config.seed = seed
    config.diffusion.num_steps = 50
    config.plan.steps = ()
    config.timesteps.update(name="uniform", tail=0.0)
    config.calibration.update(samples=samples, timesteps=10)
    config.sample.update(num_images=max(images, 1), by_steps=())
    return config


def signals(experiment: Experiment) -> dict[str, np.ndarray]:
    """{"combined" and each signal: [L]}."""
    found = scoring.manifold_signals(experiment, experiment.config)
    return {name: found[name] for name in SIGNALS}


def worth(label: list[str], experiment: Experiment) -> list[str]:
    """A row of the plan's paired error, delta FID and damage."""
    row = fidelity.metrics(list_arms(experiment))[0][1]
    return [*label, *(interval(row, key, form) for key, form in WORTH.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="fashion_dit,fashion_dit_seed1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--images", type=int, default=0, help="sampled of each plan; 0: none")
    parser.add_argument("--workdir", type=Path, default=Path("runs/ranking"))
    given = parser.parse_args()
    models = given.weights.split(",")
    experiments = {
        (name, seed): Experiment(
            recipe(name, seed, given.samples, given.images), given.workdir / f"{name}_{seed}"
        )
        for name in models
        for seed in range(given.seeds)
    }
    found = {key: signals(experiment) for key, experiment in experiments.items()}
    pairs = {f"{name}, calibration seeds": [] for name in models}
    for (a, i), (b, j) in combinations(found, 2):
        if a == b:
            pairs[f"{a}, calibration seeds"].append(((a, i), (b, j)))
        elif i == j and len(found[a, i]["combined"]) == len(found[b, j]["combined"]):
            pairs.setdefault(f"{a} against {b}", []).append(((a, i), (b, j)))
    rows = []
    for label, several in pairs.items():
        row = [label]
        for name in SIGNALS:
            taus = [kendalltau(found[a][name], found[b][name]).statistic for a, b in several]
            row.append(f"{np.mean(taus):.3f} ({min(taus):.3f})" if taus else "-")
        rows.append(row)
    print("Kendall's tau, mean over pairs (least)")
    print(piped(["rankings", *SIGNALS], rows))
    if given.images:
        print(f"\nThe plans in 50 even steps, {given.images} images each")
        rows = [worth([name, str(seed)], each) for (name, seed), each in experiments.items()]
        print(piped(["model", "calibration seed", *WORTH], rows))


if __name__ == "__main__":
    main()
