"""Steps and bits together: which S, and which widths, under budgets that both of them spend.

DiffPro's loop (arXiv 2511.11446, Algorithm 1 as it can be read) with its outer choice made
explicit. Bytes do not depend on S; BitOPs, seconds and joules of an image grow with it, so that
under those a step saved buys bits. For each S of `plan.steps`:

    widths   solved under the budgets, S steps long
    steps    S of the F timesteps; where the recipe asks its student, the student of those very
             widths (`student`)
    error    mean squared error of x_0 against the float model of arm 0, same noise and condition,
             of the integer model itself

The plan is the S of least error; of those tied with it by the paired test, the fewest steps. With
`plan.tolerance`, it is the fewest steps whose relative error stays within that.
"""

from dataclasses import replace

import jax
import numpy as np

from mpqdiff import planning, student
from mpqdiff.artifacts import load_arrays, read_json, save_arrays, write_json
from mpqdiff.config import Config
from mpqdiff.errors import InfeasibleError, InputError
from mpqdiff.evaluate.intervals import mean_interval
from mpqdiff.evaluate.paired import paired_difference, x0_errors
from mpqdiff.pipeline import VERSIONS, Experiment
from mpqdiff.plan import Plan
from mpqdiff.recipe import by_student
from mpqdiff.records import FLOAT_BITS

BATCH = 64  # images followed at once


def plan(experiment: Experiment, config: Config, system: str) -> Plan:
    """The recipe's plan, at one S of `plan.steps`. InputError where none is feasible."""
    counts = tuple(config.plan.steps)
    if len(counts) <= 1:
        return at_steps(experiment, config, system, *counts)
    found = search(experiment, config, system)
    return at_steps(experiment, config, system, chosen(found, config.plan.tolerance)["steps"])


def at_steps(experiment: Experiment, config: Config, system: str, steps: int | None = None) -> Plan:
    """The plan of the recipe at `steps` (default: the sampler's own), timesteps selected."""
    recipe = config.copy_and_resolve_references()
    recipe.plan.steps = ()
    recipe.diffusion.num_steps = config.diffusion.num_steps if steps is None else steps
    if not by_student(config):
        return planning.plan(experiment, recipe, system)
    recipe.timesteps.name = "uniform"  # widths come first; a score that samples takes even steps
    solved = planning.plan(experiment, recipe, system)
    kept = student.steps(experiment, config, solved, recipe.diffusion.num_steps)
    return replace(
        solved,
        timesteps=tuple(int(t) for t in kept),
        groups=experiment.served(config, kept),
    )


def search(experiment: Experiment, config: Config, system: str) -> list[dict]:
    """One point per S of `plan.steps`, descending, each cached: steps, timesteps, status,
    predicted, error (mean, ends and, of each image, values), relative (error over the mean square
    of x_0)."""
    counts = sorted(set(config.plan.steps), reverse=True)
    return [_point(experiment, config, system, steps) for steps in counts]


def _truth(experiment: Experiment, config: Config) -> np.ndarray:
    """x_0 [n,H,W,C] of arm 0, which every recipe's points are measured against, cached."""

    def compute(folder):
        x_0 = sampled(experiment, config, experiment.denoise, experiment.params, None)
        save_arrays(folder / "x_0.npz", {"x_0": x_0})

    key = {**experiment.key, "count": config.plan.rollout, "seed": config.seed}
    folder = experiment.store.get("rollout", version=VERSIONS["rollout"], key=key, compute=compute)
    return load_arrays(folder / "x_0.npz")["x_0"]


def _point(experiment: Experiment, config: Config, system: str, steps: int) -> dict:
    try:
        solved = at_steps(experiment, config, system, steps)
    except InfeasibleError as error:
        return {"steps": steps, "status": str(error), "predicted": None, "error": None}
    kept = np.asarray(solved.timesteps, np.int32)

    def compute(folder):
        truth = _truth(experiment, config)
        model = student.model(experiment, config, solved)
        errors = x0_errors(sampled(experiment, config, model.denoise, model.params, kept), truth)
        size = float(np.mean(np.square(truth, dtype=np.float64)))
        write_json(folder / "point.json", {"values": errors.tolist(), "size": size})

    key = {
        **experiment.key,
        "plan": solved.hash,
        "record": experiment.statistics[0].name,
        "quantize": config.quantize.to_dict(),
        "count": config.plan.rollout,
        "seed": config.seed,
    }
    folder = experiment.store.get("joint", version=VERSIONS["joint"], key=key, compute=compute)
    found = read_json(folder / "point.json")
    interval = mean_interval(np.asarray(found["values"]))
    return {
        "steps": steps,
        "status": "feasible",
        "timesteps": kept.tolist(),
        "predicted": solved.predicted,
        "w_bits": _mean_bits(experiment, solved),
        "error": interval.value,
        "error_ci": [interval.low, interval.high],
        "relative": interval.value / found["size"],
        "values": found["values"],
    }


def _mean_bits(experiment: Experiment, plan: Plan) -> float:
    weights = [site for site in experiment.sites if site.parameters]
    held = sum(site.stored * (plan.w_bits[site.path] or FLOAT_BITS) for site in weights)
    return held / sum(site.stored for site in weights)


def sampled(experiment: Experiment, config: Config, denoise, params, kept) -> np.ndarray:
    """x_0 float32 [n,H,W,C] of the calibration seeds, n = `plan.rollout`; `kept` None is arm 0."""
    kept = experiment.timesteps if kept is None else kept
    run = jax.jit(experiment.sampler(denoise, kept))
    count, batch = config.plan.rollout, min(BATCH, config.plan.rollout)
    parts = [
        np.asarray(run(params, *experiment.inputs(config.seed, start, batch)))
        for start in range(0, count, batch)
    ]
    return np.concatenate(parts)[:count]


def chosen(points: list[dict], tolerance: float = 0.0) -> dict:
    """The point that becomes the plan. Raises InputError, with every reason, where none can."""
    able = [point for point in points if point["error"] is not None]
    if not able:
        reasons = "; ".join(f"{point['steps']} steps: {point['status']}" for point in points)
        raise InputError(f"no number of steps in plan.steps fits the budgets ({reasons})")
    best = min(able, key=lambda point: point["error"])
    if tolerance:
        within = [point for point in able if point["relative"] <= tolerance]
        return min(within, key=lambda point: point["steps"]) if within else best
    tied = [point for point in able if _tied(point, best)]
    return min(tied, key=lambda point: point["steps"])


def _tied(point: dict, best: dict) -> bool:
    interval = paired_difference(point["values"], best["values"])
    return point is best or interval.low <= 0


def front(points: list[dict], resources: tuple[str, ...]) -> list[bool]:
    """Which points no other one beats in error and in all `resources` of its prediction."""

    def numbers(point):
        return [point["error"], *(point["predicted"][name] for name in resources)]

    able = [point for point in points if point["error"] is not None]

    def beaten(point):
        own = numbers(point)
        return any(
            all(a <= b for a, b in zip(numbers(other), own, strict=True)) and numbers(other) != own
            for other in able
        )

    return [point["error"] is not None and not beaten(point) for point in points]


def table(points: list[dict], picked: dict) -> str:
    """The points for people, one line each."""
    lines = ["steps  mean bits  file bytes     GBitOPs    x0 MSE (95 %)"]
    for point in points:
        if point["error"] is None:
            lines.append(f"{point['steps']:>5}  {point['status']}")
            continue
        low, high = point["error_ci"]
        mark = "  <- the plan" if point is picked else ""
        lines.append(
            f"{point['steps']:>5}  {point['w_bits']:>9.2f}  "
            f"{point['predicted']['file_bytes']:>10,}  {point['predicted']['bitops'] / 1e9:>10.4g}"
            f"    {point['error']:.3e} [{low:.3e}, {high:.3e}]{mark}"
        )
    return "\n".join(lines)


def record(experiment: Experiment) -> tuple[list[dict], dict] | None:
    """(the points of the config's own recipe, the one that is its plan), written to `joint.json`
    with which of them no other one beats; None where there are no steps to choose among."""
    config, path = experiment.config, experiment.store.workdir / "joint.json"
    if len(config.plan.steps) < 2:
        return None
    points = search(experiment, config, config.system)
    picked = chosen(points, config.plan.tolerance)
    resources = ("file_bytes", "bitops", "joules")
    kept = [
        {key: value for key, value in point.items() if key not in ("values", "timesteps")}
        | {"plan": point is picked, "front": flag}
        for point, flag in zip(points, front(points, resources), strict=True)
    ]
    write_json(path, {"schema": 1, "resources": ["error", *resources], "points": kept})
    return points, picked
