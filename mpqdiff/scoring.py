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
from mpqdiff.errors import InputError, unknown_name
from mpqdiff.pipeline import VERSIONS, Experiment
from mpqdiff.quantize.simulate import supernet
from mpqdiff.recipe import recipes
from mpqdiff.records import Scores
from mpqdiff.sensitivity import manifold_record, manifold_score, ranking
from mpqdiff.sensitivity.eps_error import kappa
from mpqdiff.solve import quantile


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


def _manifold_key(experiment: Experiment, config: Config) -> dict:
    """The recorded signals, and the readings by which they become a score."""
    readings = _readings(config)
    for kind, name, known in (
        ("PCA sensitivity", readings["pca"], manifold_score.PCA),
        ("normalisation", readings["normalisation"], ranking.NORMALISATIONS),
    ):
        if name not in known:
            raise unknown_name(kind, name, known)
    return {"manifold": _manifold_recorded(experiment, config).name, **readings}


def _readings(config: Config) -> dict:
    """The arguments of the manifold score."""
    own = config.score.manifold
    weights = dict(zip(ranking.SIGNALS, map(float, own.weights), strict=True))
    return {"pca": own.pca, "normalisation": own.normalisation, "weights": weights}


def _manifold_recorded(experiment: Experiment, config: Config) -> Path:
    """The folder with what the manifold score reads of the model, whatever it makes of it."""
    own = config.score.manifold
    arguments = {
        "rows": own.rows,
        "share": own.share,
        "rotate": own.pca == "rotate",  # a pass of its own
        "memory_gb": config.calibration.memory_gb,
    }

    def compute(folder):
        found = manifold_record.record(
            *simulation(experiment, config),
            *experiment.calibrated,
            **arguments,
            chunks=lambda name: chunked(folder, name),
        )
        save_arrays(folder / "recorded.npz", found)

    key = {"record": experiment.statistics[0].name, **_simulated(experiment, config), **arguments}
    return experiment.store.get("manifold", version=VERSIONS["manifold"], key=key, compute=compute)


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


def _manifold(experiment: Experiment, config: Config, folder: Path) -> Scores:
    """Beside the score, its signals by site: `manifold_signals` reads them."""
    recorded = load_arrays(_manifold_recorded(experiment, config) / "recorded.npz")
    choices, legal = every_choice(experiment, config)
    readings, paths = _readings(config), [site.path for site in experiment.sites]
    if len(recorded["site"]):
        signals = manifold_score.signals(recorded, **readings)
        signals["distribution"] = quantile.distribution(signals["combined"])
        signals["paths"] = np.array([paths[site] for site in recorded["site"]])
        signals["spectrum"] = manifold_record.spectra(recorded["spectrum"], recorded["features"])
        save_arrays(folder / "signals.npz", signals)
    return manifold_score.score(recorded, experiment.sites, choices, legal, **readings)


def manifold_signals(experiment: Experiment, config: Config) -> dict[str, np.ndarray]:
    """Signals of the recipe's manifold score, [M] each, of the sites at which anything is decided.

    {paths, energy, pca, dimension, k, features, growth, combined, distribution}: see
    `manifold_score.signals`; distribution is F(combined). And spectrum [M,D], the variances along
    the principal directions of the inputs (`manifold_record.spectra`). Raises InputError for a
    recipe with another score, and where every site is pinned.
    """
    if config.score.name != "manifold":
        raise InputError(
            f"score {config.score.name!r} has no manifold signals: expected 'manifold'"
        )
    path = experiment.store.workdir / "artifacts" / "score" / scores(experiment, config)[0]
    if not (path / "signals.npz").exists():
        raise InputError("every site is pinned or has one choice: no manifold signal was recorded")
    return load_arrays(path / "signals.npz")


def importance(experiment: Experiment, config: Config) -> np.ndarray:
    """The combined manifold score of every site, float64 [L], 0 where nothing is decided: what the
    solver `repair` takes as `score`. Raises InputError as `manifold_signals`."""
    signals = manifold_signals(experiment, config)
    found = dict(zip(signals["paths"].tolist(), signals["combined"], strict=True))
    return np.array([found.get(site.path, 0.0) for site in experiment.sites])


# What each score takes from the experiment, and what else than the recorded statistics its value
# depends on.
MEASURES = {
    "orthogonality": _orthogonality,
    "weight_error": _weight_error,
    "output_error": _output_error,
    "eps_error": _eps_error,
    "rollout_error": _rollout_error,
    "manifold": _manifold,
    "random": _random,
}
ARGUMENTS = {
    "orthogonality": _members,
    "weight_error": _simulated,
    "output_error": _simulated,
    "eps_error": _simulated,
    "rollout_error": _rollout,
    "manifold": _manifold_key,
    "random": lambda experiment, config: {"seed": config.seed},
}
