"""Seconds per image of every choice: the measured table of products, fitted to whole samplers.

A call of the denoiser takes alpha + beta * sum of the table's entries (`costs.latency`). Both are
fitted on random plans of this very model, mixing float and integer sites, that are compiled and
run; the error on plans held out is kept with the artifact and shown.
"""

from typing import NamedTuple

import jax
import numpy as np

from mpqdiff import costs
from mpqdiff.artifacts import load_arrays, save_arrays
from mpqdiff.config import Config
from mpqdiff.costs import calibration, latency, legality
from mpqdiff.diffusion.steps import uniform_timesteps
from mpqdiff.pipeline import VERSIONS, Experiment
from mpqdiff.plan import Plan, with_choices
from mpqdiff.quantize.apply import build, quantize
from mpqdiff.quantize.backends import MEASURED
from mpqdiff.sites import module_path

# Plans to fit on and to hold out, and the sampler's steps in each: enough that a call dominates.
FITTED, HELD_OUT, STEPS = 20, 10, 4
FIT_CHOICES = costs.list_choices((4, 8), (8,), keep_float=True)


class Model(NamedTuple):
    """seconds per denoiser call = alpha + beta * sum; relative errors of the plans held out."""

    alpha: float
    beta: float
    r2: float
    errors: np.ndarray

    def line(self) -> str:
        """For people."""
        return (
            f"latency model: {1e3 * self.alpha:.3g} ms + {self.beta:.3g} x products per call, R2 "
            f"{self.r2:.3f}; held-out plans off by {np.median(self.errors):.1%} (median), "
            f"{self.errors.max():.1%} at most"
        )


def batch(config: Config) -> int:
    """Images per call of the sampler."""
    return min(config.sample.batch, config.sample.num_images)


def operations(experiment: Experiment, config: Config) -> dict[str, legality.Operation]:
    """The product of every planned site, as the sampler's batched call has it."""
    rows = batch(config) * experiment.halves
    return legality.operations(
        experiment.denoise,
        experiment.params,
        experiment.sites,
        *experiment.input_shapes(rows),
        asymmetric=experiment.asymmetric(config),
        online=config.quantize.mode == "online",
    )


def model(experiment: Experiment, config: Config) -> tuple[str, Model]:
    """(artifact name, fit) for this device, batch and activation mode; minutes when not cached."""
    found = operations(experiment, config)
    latencies = latency.measure(found.values())

    def compute(folder):
        choices, legal = costs.legal_choices(experiment.sites, FIT_CHOICES)
        legal = legality.restrict(found, choices, legal, "cpu")[0]
        plans = calibration.random_plans(config.seed, legal, choices, FITTED)
        others = calibration.random_plans(config.seed + 1, legal, choices, HELD_OUT)
        fitted = calibration.calibrate(
            lambda choice: _runner(experiment, config, [choices[k] for k in choice]),
            latency.table(latencies, found, choices),
            plans,
            others,
            evaluations=STEPS,
        )
        save_arrays(
            folder / "fit.npz",
            {**fitted.fit._asdict(), "errors": fitted.errors}
            | {name: getattr(fitted, name) for name in ("sums", "measured")}
            | {name: getattr(fitted, name) for name in ("held_sums", "held_measured")},
        )

    key = {
        "model": experiment.model_hash,
        "sites": [site.path for site in experiment.sites],
        "batch": batch(config),
        "mode": config.quantize.mode,
        "guided": experiment.halves == 2,
        "latencies": latencies.digest,
    }
    folder = experiment.store.get("seconds", version=VERSIONS["seconds"], key=key, compute=compute)
    kept = load_arrays(folder / "fit.npz")
    alpha, beta, r2 = (float(kept[name]) for name in ("alpha", "beta", "r2"))
    return folder.name, Model(alpha, beta, r2, kept["errors"])


def _runner(experiment: Experiment, config: Config, pairs):
    """A zero-argument callable that samples with the choices `pairs` and blocks."""
    chosen = dict(zip((site.path for site in experiment.sites), pairs, strict=True))
    plan = with_choices(experiment.draft(config), experiment.sites, chosen)
    steps, flags = experiment.table(config, plan.a_bits), experiment.asymmetric(config)
    # The values of the weights do not matter here, so the cheaper scale search does.
    tensors = quantize(experiment.params, experiment.sites, plan, steps, flags, clip="absmax")
    built = build(
        experiment.denoise,
        experiment.params,
        experiment.sites,
        plan,
        tensors,
        steps,
        backend=backends(experiment, config, plan),
    )
    inputs = experiment.inputs(config.sample.seed, 0, batch(config))
    steps = uniform_timesteps(config.diffusion.num_timesteps, STEPS)
    run = jax.jit(experiment.sampler(built.denoise, steps))
    compiled = run.lower(built.params, *inputs).compile()
    return lambda: compiled(built.params, *inputs).block_until_ready()


def backends(experiment: Experiment, config: Config, plan: Plan) -> str | dict[str, str]:
    """The back end of the recipe; under "measured" that of each integer module of `plan`, the
    quickest at its shape and width. XLA's own where this device has no other: nothing is timed."""
    if config.quantize.backend != MEASURED:
        return config.quantize.backend
    if not latency.alternatives():
        return "kernels"
    found = operations(experiment, config)
    latencies = latency.measure(found.values())
    chosen: dict[str, str] = {}
    for site in plan.integer(experiment.sites):
        if site.parameters:
            operation = found[site.path]
            name = legality.execution(operation, plan.width(site.path), 8)
            quickest = latency.fastest(latencies.seconds[operation], name)[0]
            chosen.setdefault(module_path(site.path), quickest)
    return chosen


def per_image(
    experiment: Experiment, config: Config, choices, *, steps: int | None = None
) -> tuple[np.ndarray, float]:
    """(seconds of every choice per image, float64 [L,K]; what no choice changes), in `steps` steps,
    default the recipe's own."""
    fitted = model(experiment, config)[1]
    found = operations(experiment, config)
    table = latency.table(latency.measure(found.values()), found, choices)
    calls = (config.diffusion.num_steps if steps is None else steps) / batch(config)
    return calls * fitted.beta * table, calls * fitted.alpha


def predicted(experiment: Experiment, config: Config, plan: Plan | None, steps: int):
    """Seconds per image that the model expects of `plan` (None: float32) in `steps` steps; None
    under AQT, whose products are not those of the table."""
    if plan and config.quantize.backend == "aqt":
        return None
    integer = {site.path for site in plan.integer(experiment.sites)} if plan else set()
    chosen = [
        (plan.width(site.path) if site.parameters else 8, 8)
        if plan and site.path in integer
        else costs.FLOAT
        for site in experiment.sites
    ]
    choices = sorted(set(chosen))
    table, fixed = per_image(experiment, config, choices, steps=steps)
    taken = table[np.arange(len(chosen)), [choices.index(choice) for choice in chosen]]
    return fixed + float(taken.sum())
