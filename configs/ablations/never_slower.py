"""A plan that is never slower than float32: half the bytes, and at most float's own seconds.

    mpqdiff run --config=configs/ablations/never_slower.py --workdir=runs/never_slower

Where integers lose (the U-Net on jax 0.10), the planner keeps sites in float until the measured
latency model fits; W8A8 everywhere stands beside it. docs/results.md has the run.
"""

from mpqdiff.config import base, smoke


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    config = base()
    config.name = "never slower"
    config.weights = "fashion_unet"
    config.diffusion.num_steps = 10
    config.calibration.update(samples=16, timesteps=10)
    config.score.name = "weight_error"
    config.plan.update(w_bits=(4, 8), keep_float=True, pins=())
    config.plan.reduction.update(seconds=1.0, file_bytes=2.0)
    config.sample.update(num_images=64, batch=64)
    config.evaluate.timing_rounds = 9
    eight = {"w_bits": (8,), "solver": "uniform", "ratio_bits": 8, "ratio": 1.0}
    config.arms = {"w8a8": {**eight, "keep_float": False}}
    config.publish = False
    return smoke(config) if arg == "smoke" else config
