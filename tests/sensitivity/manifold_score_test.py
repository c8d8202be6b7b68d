"""The manifold score of a recipe: what is computed anew, its signals, readings that are refused."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from mpqdiff import pipeline, planning, scoring
from mpqdiff.config import base, for_arm, smoke, validate
from mpqdiff.errors import InputError

MODEL = dict(
    image_size=8, channels=1, patch=4, width=8, depth=1, num_heads=2, num_classes=3
)  # fmt: skip


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    config = smoke(base())
    config.model.kwargs.update(MODEL)
    config.calibration.update(samples=4, timesteps=3)
    config.score.name, config.plan.solver = "manifold", "repair"
    config.arms = {}
    return pipeline.Experiment(config, tmp_path_factory.mktemp("workdir"))


def stages(experiment, **changes):
    """The stages that the plan of a recipe computes anew."""
    before = len(experiment.store.log)
    planning.plan(experiment, for_arm(experiment.config, ConfigDict(changes)), "test")
    return [entry["stage"] for entry in experiment.store.log[before:] if not entry["cached"]]


def test_a_new_budget_only_solves_and_a_new_reading_records_nothing(experiment):
    assert stages(experiment)[-3:] == ["manifold", "score", "plan"]
    assert stages(experiment) == []
    assert stages(experiment, ratio=1.4) == ["plan"]
    energy = {"weights": (1.0, 0.0, 0.0, 0.0)}
    assert stages(experiment, manifold=energy) == ["score", "plan"]
    assert stages(experiment, manifold={"pca": "concentration"}) == ["score", "plan"]
    assert stages(experiment, manifold={"pca": "rotate"}) == ["manifold", "score", "plan"]
    assert stages(experiment, manifold={"share": 0.8}) == ["manifold", "score", "plan"]


def test_the_signals_lie_beside_the_score(experiment):
    signals = scoring.manifold_signals(experiment, experiment.config)
    free = [site.path for site in experiment.sites if site.pin is None]
    assert signals["paths"].tolist() == free
    np.testing.assert_allclose(signals["dimension"], signals["k"] / signals["features"])
    order = np.argsort(signals["combined"])
    assert (np.diff(signals["distribution"][order]) >= 0).all()
    assert signals["distribution"].max() == 1
    whole = scoring.importance(experiment, experiment.config)
    known = dict(zip(free, signals["combined"], strict=True))
    assert whole.tolist() == [known.get(site.path, 0.0) for site in experiment.sites]
    energy = for_arm(experiment.config, ConfigDict({"manifold": {"weights": (2.0, 0.0, 0.0, 0.0)}}))
    ranks = scoring.manifold_signals(experiment, energy)["combined"]
    np.testing.assert_array_equal(np.argsort(ranks), np.argsort(signals["energy"]))
    other = for_arm(experiment.config, ConfigDict({"score": "random"}))
    with pytest.raises(InputError, match="score 'random' has no manifold signals"):
        scoring.manifold_signals(experiment, other)


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        ("weights", (1.0, 1.0), "four numbers"),
        ("weights", (0.0, 0.0, 0.0, 0.0), "not all 0"),
        ("weights", (1.0, 1.0, -1.0, 1.0), "at least 0"),
        ("share", 0.0, r"share of the variance in \(0,1\]"),
        ("rows", 0, r"score\.manifold\.rows=0: expected a positive number"),
    ],
)
def test_readings_that_are_none_are_refused_by_the_config(leaf, value, message):
    config = base()
    config.score.manifold[leaf] = value
    with pytest.raises(InputError, match=message):
        validate(config)


@pytest.mark.parametrize("leaf", ["pca", "normalisation"])
def test_an_unknown_reading_is_refused_before_it_is_recorded(experiment, leaf):
    odd = for_arm(experiment.config, ConfigDict({"manifold": {leaf: "odd"}}))
    before = len(experiment.store.log)
    with pytest.raises(InputError, match=r"unknown .* 'odd'; known: "):
        scoring.scores(experiment, odd)
    assert "manifold" not in [entry["stage"] for entry in experiment.store.log[before:]]
