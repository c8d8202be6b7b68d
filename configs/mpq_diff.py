"""MPQ-Diff (arXiv 2412.00144), the full experiment on the embedded Fashion-MNIST models.

    mpqdiff run --config=configs/mpq_diff.py --workdir=runs/mpq_diff_seed0
    mpqdiff run --config=configs/mpq_diff.py:seed1 --workdir=runs/mpq_diff_seed1
    mpqdiff run --config=configs/mpq_diff.py:unet --workdir=runs/mpq_diff_unet

5 000 images per arm, 20-step DDIM, no guidance; all controls at the paper's point (1.165 x uniform
4 bit), budgets from uniform 4 to uniform 8, and {2, 4, 8} below uniform 4. `:seed1` asks only the
first question, of the second trained DiT, `:unet` of the U-Net, with 1 000 images. The tables are
in docs/results.md, with the machine and the time it took. `:smoke` runs on random weights in
seconds and publishes no metric.
"""

from mpqdiff.config import base, smoke


def get_config(arg: str = ""):
    """`arg`: "", "seed1" (the second trained DiT), "unet" or "smoke"."""
    if arg not in ("", "seed1", "unet", "smoke"):
        raise ValueError(f"unknown argument {arg!r}; known: seed1, unet, smoke")
    config = base()
    config.name = f"mpq_diff {arg}".strip()
    models = {"seed1": "fashion_dit_seed1", "unet": "fashion_unet"}
    config.weights = models.get(arg, "fashion_dit")
    config.sample.num_images = 1000 if arg == "unet" else 5000
    config.sample.batch = 250
    if arg == "unet":
        config.plan.pins = (("conv_in|conv_out", 8), ("time/.*", 8))
    config.evaluate.timing_rounds = 3
    arms = {
        "plan_aqt": {"backend": "aqt"},
        "uniform": {"solver": "uniform"},
        "size_only": {"solver": "size_only"},
        "output_error": {"score": "output_error", "solver": "greedy"},
        "weight_error": {"score": "weight_error", "solver": "greedy"},
        **{f"random_{seed}": {"solver": "random", "seed": seed} for seed in range(5)},
        "uniform4": {"solver": "uniform", "ratio": 1.0},
        "w8a8": {"w_bits": (8,), "solver": "uniform", "ratio_bits": 8, "ratio": 1.0},
    }
    for ratio in (1.33, 1.6):
        arms[f"plan_{100 * ratio:.0f}"] = {"ratio": ratio}
        arms[f"uniform_{100 * ratio:.0f}"] = {"ratio": ratio, "solver": "uniform"}
    for ratio in (0.85,):
        below = {"ratio": ratio, "w_bits": (2, 4, 8)}
        arms[f"plan248_{100 * ratio:.0f}"] = below
        arms[f"uniform248_{100 * ratio:.0f}"] = {**below, "solver": "uniform"}
        output_error = {"score": "output_error", "solver": "greedy"}
        arms[f"output248_{100 * ratio:.0f}"] = below | output_error
    if arg in ("seed1", "unet"):
        kept = ("uniform", "size_only", "output_error", "weight_error", "random_0", "random_1")
        arms = {name: arms[name] for name in kept}
    config.arms = arms
    return smoke(config) if arg == "smoke" else config
