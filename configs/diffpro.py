"""DiffPro (arXiv 2511.11446) on the embedded Fashion-MNIST models: bits, activations and steps.

    mpqdiff run --config=configs/diffpro.py --workdir=runs/diffpro
    mpqdiff run --config=configs/diffpro.py:unet --workdir=runs/diffpro_unet
    mpqdiff run --config=configs/diffpro.py:joint --workdir=runs/diffpro_joint

The paper's headline is the plan: 6.25x smaller in the file, half of 1000 steps, those that greedy
pruning by its own student's drift leaves. Beside it float at 1000 to 10 steps, even ones and
those of the exact selector; W8A8; uniform widths at the same bytes; the plan with other steps.
500 images an arm (U-Net 128), 1 000 up to 500 steps (128), 5 000 up to 50 (256); arms are
compared at equal numbers, on the seeds that both have. `:joint` chooses the number of steps too,
under budgets of bytes, seconds and energy at once, with all controls;
`configs/ablations/diffpro.py` takes the method apart. The tables are in docs/results.md. `:smoke`
runs on random weights in seconds and publishes no metric.
"""

from mpqdiff.config import base, smoke

PINS = {"fashion_dit": (("patch_embed|final", 8),), "fashion_unet": (("conv_in|conv_out", 8),)}
EXACT = {"timesteps": "shortest_path", "tail": 0.0}
ARGUMENTS = ("", "unet", "seed1", "joint", "smoke")


def method(weights: str = "fashion_dit"):
    """The recipe alone, without arms."""
    config = base()
    config.name = config.system = "diffpro"
    config.weights = weights
    config.diffusion.num_steps = 1000
    config.calibration.update(samples=128, timesteps=25)
    config.score.name = "manifold"
    config.aggregate.name = "mean"
    config.plan.update(w_bits=(4, 6, 8), solver="repair", steps=(500,))
    config.plan.pins = PINS[weights.removesuffix("_seed1")]
    config.plan.reduction.file_bytes = 6.25
    config.quantize.mode = "step_table"
    config.timesteps.update(name="drift_edges", by_student=True, tail=0.1, samples=64)
    config.sample.update(num_images=500, by_steps=((50, 5000), (500, 1000)), batch=64)
    config.evaluate.update(timing_rounds=2, health_images=8, predict_ms=True)
    config.arms = {}
    return config


def get_config(arg: str = ""):
    """`arg`: "", "unet", "seed1" (the second trained DiT), "joint" or "smoke"."""
    if arg not in ARGUMENTS:
        raise ValueError(f"unknown argument {arg!r}; known: {', '.join(ARGUMENTS[1:])}")
    models = {"unet": "fashion_unet", "seed1": "fashion_dit_seed1"}
    config = method(models.get(arg, "fashion_dit"))
    config.name = f"diffpro {arg}".strip()
    arms = {}
    for steps in (500, 50, 20, 10):
        at = {"float": True, "num_steps": steps}
        arms[f"float_{steps}_even"] = {**at, "timesteps": "uniform"}
        arms[f"float_{steps}_exact"] = {**at, **EXACT}
    eight = {"w_bits": (8,), "solver": "uniform", "ratio_bits": 8, "ratio": 1.0}
    arms["w8a8"] = {**eight, "timesteps": "uniform"}
    arms["uniform"] = {"solver": "uniform"}
    arms["plan_even"] = {"timesteps": "uniform"}
    for steps in (50, 20, 10):
        arms[f"plan_{steps}_even"] = {"steps": (steps,), "timesteps": "uniform"}
        arms[f"plan_{steps}_exact"] = {"steps": (steps,), **EXACT}
    if arg == "unet":
        # A step takes four times the DiT's.
        config.sample.update(num_images=128, by_steps=((50, 256),), batch=32)
        config.calibration.samples = 32
        config.timesteps.samples = 16
        config.evaluate.update(timing_rounds=1, predict_ms=False)
        kept = ("float_50_even", "float_50_exact", "uniform", "plan_50_even", "plan_50_exact")
        arms = {name: arms[name] for name in kept}
    if arg == "joint":
        config.plan.update(a_bits=(6, 8), solver="lp", rollout=128)
        config.sample.by_steps = ((50, 1000),)
        config.plan.steps = (500, 250, 100, 50, 20, 10)
        # 500 steps take too long; 250 leave energy for about 5 bits; fewer have bits to spend.
        config.plan.reduction.update(file_bytes=4.5, seconds=5.0, joules=30.0)
        config.timesteps.update(name="shortest_path", tail=0.0)
        arms = {name: {"solver": name} for name in ("uniform", "random", "size_only")}
    config.arms = arms
    if arg == "smoke":
        config = smoke(config)
        config.diffusion.update(num_timesteps=40, num_steps=40)
        config.plan.steps = (8,)
        config.evaluate.predict_ms = False
        config.plan.reduction.file_bytes = 2.5  # the header of so small a file is half of it
        config.timesteps.samples = 4
        config.sample.by_steps = ()
        config.arms = {
            "float_8_exact": {"float": True, "num_steps": 8, **EXACT},
            "plan_4_exact": {"steps": (4,), **EXACT},
            "uniform": {"solver": "uniform"},
        }
    return config
