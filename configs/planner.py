"""Which score should the planner believe? Every score at the same bytes, on the embedded DiT.

    mpqdiff run --config=configs/planner.py --workdir=runs/planner
    mpqdiff plan --workdir=runs/planner --pareto=64
    mpqdiff run --config=configs/planner.py:seed1 --workdir=runs/planner_seed1

The plan takes its damage from whole rollouts, solved to the optimum; the arms change the score, the
solver, or the choices, and keep the budget: 1.165 x the device bytes of uniform 4 bit. 2 000 images
per arm, 20-step DDIM, no guidance. `:seed1` repeats it on the second trained model, `:smoke` on
random weights in seconds, publishing no metric. The tables are in docs/results.md.
"""

from mpqdiff.config import base, smoke

SCORES = ("orthogonality", "weight_error", "output_error", "eps_error")


def get_config(arg: str = ""):
    """`arg`: "", "seed1" (the second trained model) or "smoke"."""
    if arg not in ("", "seed1", "smoke"):
        raise ValueError(f"unknown argument {arg!r}; known: seed1, smoke")
    config = base()
    config.name = f"planner {arg}".strip()
    config.system = "rollout_error_lp"
    config.weights = "fashion_dit_seed1" if arg == "seed1" else "fashion_dit"
    config.score.name = "rollout_error"
    config.score.samples = 32
    config.plan.exact = True
    config.sample.update(num_images=2000, batch=250)
    config.evaluate.timing_rounds = 3
    arms = {name: {"score": name} for name in SCORES}
    arms |= {solver: {"solver": solver} for solver in ("greedy", "threshold", "evolution")}
    arms |= {"uniform": {"solver": "uniform"}, "size_only": {"solver": "size_only"}}
    arms |= {f"random_{seed}": {"solver": "random", "seed": seed} for seed in range(3)}
    arms |= {
        f"{name}_248": {"score": name, "w_bits": (2, 4, 8)}
        for name in ("rollout_error", "eps_error", "weight_error")
    }
    arms["uniform_248"] = {"solver": "uniform", "w_bits": (2, 4, 8)}
    config.arms = arms
    return smoke(config) if arg == "smoke" else config
