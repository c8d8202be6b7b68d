"""DiffPro taken apart on the embedded models: each signal, activation mode and selection alone.

    mpqdiff run --config=configs/ablations/diffpro.py --workdir=runs/diffpro_bits
    mpqdiff run --config=configs/ablations/diffpro.py:steps --workdir=runs/diffpro_steps

The default keeps 50 exact steps in every arm, the float one too, so that the paired error is that
of widths and activations alone, at 6.25x in the file: each signal of the combined score, the three
readings of its PCA sensitivity, other scores and solvers, and activations without DAQ. `:steps`
keeps the widths and changes how 150 of 1000 steps are chosen: tail lengths, the teacher's edges
alone, one number of drift for each step. `:input` leaves the first site, which reads the state
itself, in float. `benchmarks/ranking.py` has the stability of the ranking. `:smoke` runs on random
weights.
"""

import runpy
from pathlib import Path

from mpqdiff.config import smoke

SIGNALS = ("energy", "pca", "dimension", "growth")


def get_config(arg: str = ""):
    """`arg`: "", "steps", "input", "seed1" (the second trained DiT) or "smoke"."""
    if arg not in ("", "steps", "input", "seed1", "smoke"):
        raise ValueError(f"unknown argument {arg!r}; known: steps, input, seed1, smoke")
    common = runpy.run_path(str(Path(__file__).parents[1] / "diffpro.py"))
    config = common["method"]("fashion_dit_seed1" if arg == "seed1" else "fashion_dit")
    config.name = f"diffpro ablations {arg}".strip()
    config.evaluate.update(health_images=4, predict_ms=False, timing_rounds=1)
    config.sample.update(num_images=256, by_steps=())
    config.arms = _steps(config, common["EXACT"]) if arg == "steps" else _bits(config)
    if arg == "input":
        config.plan.pins = (("patch_embed", 32), ("final", 8))
        kept = ("w8a8", "output_error", "uniform", "size_only")
        config.arms = {name: config.arms[name] for name in kept}
    if arg == "smoke":
        config = smoke(config)
        config.plan.reduction.file_bytes = 2.5
        config.diffusion.num_steps = 4
        config.timesteps.update(name="uniform", tail=0.0)
    return config


def _bits(config):
    config.diffusion.num_steps = 50
    config.plan.steps = ()
    config.timesteps.update(name="shortest_path", tail=0.0, by_student=False)
    arms = {
        f"signal_{name}": {"manifold": {"weights": tuple(float(i == k) for k in range(4))}}
        for i, name in enumerate(SIGNALS)
    }
    arms |= {f"pca_{name}": {"manifold": {"pca": name}} for name in ("rotate", "concentration")}
    arms["no_seed"] = {"solver": "greedy"}
    arms["lp"] = {"solver": "lp"}
    for score in ("orthogonality", "weight_error", "output_error"):
        arms[score] = {"score": score, "solver": "lp"}
    arms |= {f"daq_{mode}": {"mode": mode} for mode in ("static", "online", "ema")}
    arms["daq_5_groups"] = {"groups": 5}
    eight = {"w_bits": (8,), "solver": "uniform", "ratio_bits": 8, "ratio": 1.0}
    arms |= {"w8a8": eight, "w8a8_static": {**eight, "mode": "static"}}
    arms["w8a8_online"] = {**eight, "mode": "online"}
    return arms | {name: {"solver": name} for name in ("uniform", "random", "size_only")}


def _steps(config, exact):
    config.plan.steps = (150,)
    config.sample.num_images = 128
    arms = {f"tail_{100 * tail:.0f}": {"tail": tail} for tail in (0.0, 0.05, 0.14)}
    arms["teacher"] = {"by_student": False}
    arms["per_step_drift"] = {"timesteps": "drift"}
    return arms | {"exact": exact, "even": {"timesteps": "uniform"}}
