"""How stable the ranking of sites by manifold sensitivity is: Kendall's tau between rankings.

    mpqdiff bench ranking --weights=fashion_dit,fashion_dit_seed1 --seeds=3 --workdir=runs/ranking

Between calibration seeds of one model, and between two models trained from different seeds, for
the combined score and for each of its signals. DiffPro (arXiv 2511.11446) says that its ranking can
depend on the seed; its notes aim at 0.8.
"""

import argparse
import runpy
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau
from table import piped

from mpqdiff import scoring
from mpqdiff.pipeline import Experiment

CONFIG = Path(__file__).parents[1] / "configs" / "diffpro.py"


def signals(weights: str, seed: int, samples: int, workdir: Path) -> dict[str, np.ndarray]:
    """{"combined" and each signal: [L]} of one model and calibration seed."""
    config = runpy.run_path(str(CONFIG))["method"](weights)
    config.seed = seed
    config.diffusion.num_steps = 50
    config.plan.steps = ()
    config.timesteps.update(name="uniform", tail=0.0)
    config.calibration.update(samples=samples, timesteps=10)
    experiment = Experiment(config, workdir / f"{weights}_{seed}")
    found = scoring.manifold_signals(experiment, config)
    return {name: found[name] for name in ("combined", "energy", "pca", "dimension", "growth")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="fashion_dit,fashion_dit_seed1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--workdir", type=Path, default=Path("runs/ranking"))
    given = parser.parse_args()
    models = given.weights.split(",")
    found = {
        (name, seed): signals(name, seed, given.samples, given.workdir)
        for name in models
        for seed in range(given.seeds)
    }
    pairs = {f"{name}, calibration seeds": [] for name in models}
    for (a, i), (b, j) in combinations(found, 2):
        if a == b:
            pairs[f"{a}, calibration seeds"].append(((a, i), (b, j)))
        elif i == j and len(found[a, i]["combined"]) == len(found[b, j]["combined"]):
            pairs.setdefault(f"{a} against {b}", []).append(((a, i), (b, j)))
    rows = []
    for label, several in pairs.items():
        row = [label]
        for name in ("combined", "energy", "pca", "dimension", "growth"):
            taus = [kendalltau(found[a][name], found[b][name]).statistic for a, b in several]
            row.append(f"{np.mean(taus):.3f} ({min(taus):.3f})" if taus else "-")
        rows.append(row)
    print("Kendall's tau, mean over pairs (least)")
    print(piped(["rankings", "combined", "energy", "pca", "dimension", "growth"], rows))


if __name__ == "__main__":
    main()
