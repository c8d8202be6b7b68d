"""The score of a recipe from what the experiment recorded, cached: a new budget only solves.

Damage scores are measured once for every choice that some recipe of the experiment offers.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpqdiff import costs, sensitivity
from mpqdiff.artifacts import chunked, load_arrays, read_json, save_arrays, write_json
from mpqdiff.config import Config
from mpqdiff.pipeline import VERSIONS, Experiment
from mpqdiff.quantize.simulate import supernet
from mpqdiff.recipe import recipes
from mpqdiff.records import Scores
from mpqdiff.sensitivity.eps_error import kappa


def every_choice(experiment: Experiment, config: Config) -> tuple[list[costs.Choice], np.ndarray]:
    """(all choices that this or another recipe offers, ascending; legal bool [L,K])."""
    offered = {
        choice
        for recipe in [config, *recipes(experiment.config)]
        for choice in costs.list_choices(
            recipe.plan.w_bits, recipe.plan.a_bits, keep_float=recipe.plan.keep_float
        )
    }
    return costs.legal_choices(experiment.sites, sorted(offered))


def scores(experiment: Experiment, config: Config) -> tuple[str, Scores]:
    """(artifact name, Scores) of the recipe `config`."""
    name, recorded = config.score.name, experiment.statistics[0].name
    arguments = ARGUMENTS[name](experiment, config)

    def compute(folder):
        found = MEASURES[name](experiment, config, folder)
        save_arrays(folder / "scores.npz", {"value": found.value, "matrix": found.matrix})
        write_json(folder / "scores.json", {"kind": found.kind, "violations": found.violations})

    key = {"record": recorded, "score": name, **arguments}
    folder = experiment.store.get("score", version=VERSIONS["score"], key=key, compute=compute)
    return folder.name, Scores(
        **load_arrays(folder / "scores.npz"), name=name, **read_json(folder / "scores.json")
    )


def _members(experiment: Experiment, config: Config) -> dict:
    """Estimator and policy of the orthogonality metric, and which sites it is a mean over."""
    arguments = {name: config.score[name] for name in ("estimator", "temporal_policy")}
    if not config.score.include_pinned:
        arguments["member"] = [site.pin is None for site in experiment.sites]
    return arguments


def _simulated(experiment: Experiment, config: Config) -> dict:
    """What the damage of a choice depends on."""
    choices, legal = every_choice(experiment, config)
    return {
        "choices": [list(choice) for choice in choices],
        "legal": legal.tolist(),
        "clip": config.quantize.clip,
        "mode": config.quantize.mode,
    }


def _rollout(experiment: Experiment, config: Config) -> dict:
    return _simulated(experiment, config) | {
        "samples": config.score.samples,
        "timesteps": experiment.steps(config).tolist(),
    }


def simulation(experiment: Experiment, config: Config) -> tuple[Any, Any, Any, Any, Any]:
    """(denoise, supernet, sites, choices, legal): what every damage score starts from."""
    choices, legal = every_choice(experiment, config)
    sites = experiment.sites
    tables = {a: experiment.table(config, a) for _, a in choices if a != costs.FLOAT[1]}
    net = supernet(
        experiment.params,
        sites,
        choices,
        tables,
        experiment.asymmetric(config),
        clip=config.quantize.clip,
    )
    return experiment.denoise, net, sites, choices, legal


def _orthogonality(experiment: Experiment, config: Config, folder: Path) -> Scores:
    arguments = _members(experiment, config)
    return sensitivity.orthogonality.score(experiment.statistics[1], **arguments)


def _random(experiment: Experiment, config: Config, folder: Path) -> Scores:
    count = len(experiment.statistics[1].timesteps)
    return sensitivity.random.score(jax.random.key(config.seed), count, len(experiment.sites))


def _weight_error(experiment: Experiment, config: Config, folder: Path) -> Scores:
    return sensitivity.weight_error.score(*simulation(experiment, config)[1:])


def _output_error(experiment: Experiment, config: Config, folder: Path) -> Scores:
    return sensitivity.output_error.score(
        *simulation(experiment, config), *experiment.calibrated, chunks=chunked(folder, "score")
    )


def _eps_error(experiment: Experiment, config: Config, folder: Path) -> Scores:
    """Steps count by what they add to x_0 (`kappa`), at the timesteps that were recorded."""
    x_ts, timesteps, cond = experiment.calibrated
    return sensitivity.eps_error.score(
        *simulation(experiment, config),
        x_ts,
        timesteps,
        cond,
        weights=kappa(experiment.abar, timesteps),
        chunks=chunked(folder, "score"),
    )


def _rollout_error(experiment: Experiment, config: Config, folder: Path) -> Scores:
    timesteps = experiment.steps(config)
    return sensitivity.rollout_error.score(
        *simulation(experiment, config),
        lambda denoise: experiment.sampler(denoise, timesteps),
        *experiment.inputs(config.seed, 0, config.score.samples),
        steps=len(timesteps) * experiment.halves,
        chunks=chunked(folder, "score"),
    )


# What each score takes from the experiment, and what else than the recorded statistics its value
# depends on.
MEASURES = {
    "orthogonality": _orthogonality,
    "weight_error": _weight_error,
    "output_error": _output_error,
    "eps_error": _eps_error,
    "rollout_error": _rollout_error,
    "random": _random,
}
ARGUMENTS = {
    "orthogonality": _members,
    "weight_error": _simulated,
    "output_error": _simulated,
    "eps_error": _simulated,
    "rollout_error": _rollout,
    "random": lambda experiment, config: {"seed": config.seed},
}
