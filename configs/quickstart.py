"""Quickstart: MPQ-Diff on the embedded Fashion-MNIST DiT, in integers, in a few minutes on a CPU.

    mpqdiff run --config=configs/quickstart.py --workdir=runs/quickstart

Paper: MPQ-Diff (arXiv 2412.00144). 20-step DDIM, no guidance, 256 images, budget 1.165 x the bytes
of uniform 4 bit. `--config=configs/quickstart.py:smoke` runs the same pipeline on random weights
in seconds and publishes no metric.
"""

from mpqdiff.config import base, smoke


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    config = base()
    config.name = "quickstart"
    config.arms = {
        "plan_aqt": {"backend": "aqt"},  # the same plan, AQT's tensors and products
        "uniform": {"solver": "uniform"},  # controls at the plan's budget
        "random_0": {"solver": "random", "seed": 0},
        "size_only": {"solver": "size_only"},
        "w8a8": {"w_bits": (8,), "solver": "uniform", "ratio_bits": 8, "ratio": 1.0},
    }
    if arg not in ("", "smoke"):
        raise ValueError(f"unknown argument {arg!r}; known: smoke")
    return smoke(config) if arg == "smoke" else config
