"""The stages called in turn: what is refused before any work, and what a change computes anew."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mpqdiff import arms, fidelity, pipeline, planning, preview, weights
from mpqdiff import models as model_list
from mpqdiff import plan as plans
from mpqdiff.config import base, for_arm, smoke
from mpqdiff.errors import InputError, VerificationError
from mpqdiff.timesteps import edges

MODEL = {"image_size": 8, "channels": 1, "patch": 4, "width": 16, "depth": 1, "num_heads": 2,
         "num_classes": 3}  # fmt: skip


def _config(**changes):
    config = smoke(base())
    config.model.kwargs.update(MODEL)
    config.calibration.update(samples=4, timesteps=3)
    config.sample.update(num_images=4, batch=4)
    for path, value in changes.items():
        group, leaf = path.split("__")
        config[group][leaf] = value
    return config


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A file of random weights: quicker to read than to draw."""
    module = model_list.build("dit", **MODEL)
    shapes = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape), shapes)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    weights.save(path, params, model={"name": "dit", "kwargs": MODEL})
    return str(path)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, weights_file):
    config = _config()
    config.weights = weights_file
    config.arms = {"fewer": {"num_steps": 2}, "damage": {"score": "weight_error"}}
    return pipeline.Experiment(config, tmp_path_factory.mktemp("workdir"))


NAMES = {
    "score": ("score__name", "output_error"),
    "estimator": ("score__estimator", "centered"),
    "temporal policy": ("score__temporal_policy", "pooled"),
    "aggregation": ("aggregate__name", "exp_mean"),
    "solver": ("plan__solver", "size_only"),
    "budget resource": ("plan__resource", "file_bytes"),
    "back end": ("quantize__backend", "aqt"),
    "activation mode": ("quantize__mode", "step_table"),
    "weight clip": ("quantize__clip", "mse"),
    "sampler": ("diffusion__sampler", "ddim"),
    "noise schedule": ("diffusion__schedule", "cosine"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_an_unknown_name_is_refused_before_any_work(kind, tmp_path):
    path, known = NAMES[kind]
    config = _config(**{path: "nonsense"})
    with pytest.raises(InputError, match=rf"unknown {kind} 'nonsense'; known: .*{known}"):
        pipeline.Experiment(config, tmp_path / "workdir")
    assert not (tmp_path / "workdir").exists()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("plan__w_bits", (), "distinct widths within"),
        ("plan__w_bits", (4, 16), "distinct widths within"),
        ("plan__a_bits", (16,), "distinct widths within"),
        ("plan__ratio_bits", 1, "width 1"),
        ("plan__pins", (("final", 9),), "'final' at width 9: expected 2 to 8 bits, or 32"),
        ("diffusion__num_steps", 2000, "num_steps=2000: expected 1 to 1000"),
    ],
)
def test_widths_and_steps_out_of_range_are_refused_before_any_work(path, value, message, tmp_path):
    with pytest.raises(InputError, match=message):
        pipeline.Experiment(_config(**{path: value}), tmp_path / "workdir")
    assert not (tmp_path / "workdir").exists()


def test_an_arms_unknown_name_is_refused_before_any_work(tmp_path):
    config = _config()
    config.arms = ConfigDict({"odd": {"solver": "annealing"}})
    with pytest.raises(
        InputError, match="unknown solver 'annealing'; known: evolution, greedy, lp"
    ):
        pipeline.Experiment(config, tmp_path / "workdir")


def test_a_pin_that_matches_nothing_lists_the_sites(tmp_path, weights_file):
    config = _config(plan__pins=(("nowhere", 8),))
    config.weights = weights_file
    with pytest.raises(InputError, match="pin 'nowhere' matches no site; sites: patch_embed"):
        pipeline.Experiment(config, tmp_path)


def _plan(experiment, **changes):
    """The plan of the config with `changes` by arm key, and the stages that were computed."""
    before = len(experiment.store.log)
    plan = planning.plan(experiment, for_arm(experiment.config, ConfigDict(changes)), "test")
    log = experiment.store.log[before:]
    return plan, [entry["stage"] for entry in log if not entry["cached"]]


def test_a_plan_holds_the_budget_the_pins_and_all_sites(experiment):
    plan, _ = _plan(experiment)
    assert plan.predicted["bytes"] <= plan.budgets["bytes"]
    assert list(plan.w_bits) == [site.path for site in experiment.all_sites]
    for site in experiment.sites:
        assert plan.w_bits[site.path] in ((site.pin,) if site.pin else (4, 8))
    assert plan.w_bits["label_embed"] is plan.a_bits["label_embed"] is None
    assert plan.a_bits["block_0/attn/qk"] == {"lhs": None, "rhs": None}
    assert plan.bound <= plan.objective
    least = planning.uniform(experiment, experiment.config, 4)["bytes"]
    assert plan.budgets["bytes"] == int(1.165 * least)


def test_the_same_recipe_is_cached_and_each_change_is_not(experiment):
    _plan(experiment)
    _plan(experiment, score="weight_error")
    assert _plan(experiment)[1] == []
    assert _plan(experiment, ratio=1.3)[1] == ["plan"]
    assert _plan(experiment, mode="static")[1] == ["plan"]
    assert _plan(experiment, score="random", solver="greedy")[1] == ["score", "plan"]
    other = experiment.config.copy_and_resolve_references()
    other.quantize.clip, other.score.name = "absmax", "weight_error"
    before = len(experiment.store.log)
    planning.plan(experiment, other, "test")
    computed = [e["stage"] for e in experiment.store.log[before:] if not e["cached"]]
    assert computed == ["score", "plan"]


def test_an_arm_keeps_its_own_number_of_steps(experiment):
    whole, fewer = _plan(experiment)[0], _plan(experiment, num_steps=2)[0]
    assert len(whole.timesteps) == experiment.config.diffusion.num_steps == 4
    assert fewer.timesteps == (999, 0)
    # Three recorded timesteps serve four steps: the ranges cover them all.
    covered = [t for t in whole.timesteps if any(a >= t >= b for a, b in whole.groups)]
    assert covered == list(whole.timesteps)
    assert len(whole.groups) == 3


@pytest.mark.parametrize("budget", [1.0, 1e9])
def test_an_impossible_budget_states_the_range(experiment, budget):
    config = experiment.config.copy_and_resolve_references()
    config.plan.budget.bytes = budget
    least, most = (planning.uniform(experiment, config, bits)["bytes"] for bits in (4, 8))
    stated = rf"bytes.* {least}" if budget < least else rf"above the maximum {most}"
    with pytest.raises(InputError, match=stated):
        planning.plan(experiment, config, "test")


def test_several_budgets_hold_at_once_and_float_is_a_choice(experiment):
    whole, narrow = (planning.uniform(experiment, experiment.config, b) for b in (8, 4))
    between = {name: (whole[name] + narrow[name]) / 2 for name in ("bytes", "bitops", "mean_bits")}
    changes = {"budget": between, "a_bits": (4, 8), "keep_float": True, "score": "rollout_error"}
    plan, _ = _plan(experiment, **changes)
    assert set(plan.budgets) == set(between)
    for name, limit in between.items():
        assert plan.predicted[name] <= limit * (1 + 1e-9)
    assert plan.bound <= plan.objective
    arm = _arm(experiment, plan)
    arm.verify()
    assert arm.passed_bytes == plan.predicted["bytes"]


def test_a_site_kept_in_float_is_paid_for_and_verified(experiment):
    changes = {"keep_float": True, "score": "weight_error", "budget": {"bytes": 20_000.0}}
    plan, _ = _plan(experiment, **changes)
    kept = [site for site in experiment.sites if plan.w_bits[site.path] is None]
    assert kept and len(kept) < len(experiment.sites)
    assert all(plan.a_bits[site.path] is None for site in kept)
    arm = _arm(experiment, plan)
    arm.verify()
    assert arm.passed_bytes == plan.predicted["bytes"] <= 20_000


def test_an_imported_bit_list_is_a_plan(experiment, tmp_path):
    bits = {site.path: 6 for site in experiment.sites}
    (tmp_path / "bits.json").write_text(json.dumps(bits))
    plan, _ = _plan(experiment, bits=str(tmp_path / "bits.json"))
    assert {plan.w_bits[path] for path in bits} == {6}
    arm = _arm(experiment, plan)
    assert arm.passed_bytes == plan.predicted["bytes"]


def _arm(experiment, plan):
    return arms.Arm(experiment, "plan", "test", experiment.config, plan)


def test_an_arm_runs_the_activation_widths_of_its_plan(experiment):
    plan, _ = _plan(experiment)
    narrow = replace(plan, a_bits={p: 4 if b == 8 else b for p, b in plan.a_bits.items()})
    eight, four = (arms.store.load(_arm(experiment, p).file)[2] for p in (plan, narrow))
    symmetric = np.asarray(eight.zero_point[0]) == 0
    ratio = np.asarray(four.scale / eight.scale)[:, symmetric]
    np.testing.assert_allclose(ratio, 127 / 7, rtol=1e-5)


def test_an_arm_refuses_a_plan_that_the_config_cannot_run(experiment):
    plan, _ = _plan(experiment)
    with pytest.raises(InputError, match=r"values in 0\.\.999"):
        _arm(experiment, replace(plan, timesteps=(1000, 0)))
    products = plan.a_bits | {"block_0/attn/qk": {"lhs": 8, "rhs": 8}}
    with pytest.raises(InputError, match=r"\['block_0/attn/qk'\], .*quantize\.products=True"):
        _arm(experiment, replace(plan, a_bits=products))


def test_an_arm_verifies_its_program_and_its_bytes(experiment):
    plan, _ = _plan(experiment)
    arm = _arm(experiment, plan)
    arm.verify(arm.execution.resident_bytes)
    assert arm.passed_bytes == plan.predicted["bytes"]
    arm.plan = replace(plan, predicted=plan.predicted | {"bytes": plan.predicted["bytes"] - 1})
    with pytest.raises(VerificationError, match=rf"arm 'plan': bytes passed {arm.passed_bytes}"):
        arm.verify()


def test_random_weights_leave_no_parameter_at_zero():
    _, params, _ = pipeline.load_model(_config())
    assert all(np.count_nonzero(leaf) == leaf.size for leaf in jax.tree.leaves(params))


def test_timesteps_of_an_arm_are_chosen_by_one_trajectory(tmp_path, weights_file):
    """The Gram is taken once, and every number of steps is read off it."""
    config = _config(diffusion__num_timesteps=12, diffusion__num_steps=4, timesteps__samples=3)
    config.weights = weights_file
    config.arms = {
        "exact": {"timesteps": "shortest_path"},
        "exact3": {"timesteps": "shortest_path", "num_steps": 3, "float": True},
        "even": {"timesteps": "quadratic"},
    }
    experiment = pipeline.Experiment(config, tmp_path)
    kept = {arm.name: arm.timesteps.tolist() for arm in arms.list_arms(experiment)}
    assert kept["float"] == kept["plan"] == [11, 7, 4, 0]
    assert len(kept["exact"]) == 4 and len(kept["exact3"]) == 3
    assert sum(entry["stage"] == "gram" for entry in experiment.store.log) == 1
    costs = edges.edge_costs(experiment.eps_gram, experiment.abar)
    cost = {name: edges.path_cost(costs, np.array(kept[name]), np.arange(11, -1, -1))
            for name in ("float", "exact", "even")}  # fmt: skip
    assert cost["exact"] <= min(cost.values())


def test_the_ceiling_has_even_steps_whatever_the_arms_have(tmp_path, weights_file):
    config = _config(timesteps__name="drift_edges", timesteps__tail=0.1,
                     diffusion__num_timesteps=40, diffusion__num_steps=6)  # fmt: skip
    config.weights = weights_file
    base_arm = arms.Arm(pipeline.Experiment(config, tmp_path), "float", "float32", config, None)
    assert len(base_arm.timesteps) == 6 and base_arm.timesteps.tolist()[-4:] == [3, 2, 1, 0]
    assert fidelity.ceiling_arm(base_arm).timesteps.tolist() == [39, 0]


UNSELECTABLE = {
    "a tail longer than the steps": (dict(name="drift_edges", tail=0.5), "more than the num_steps"),
    "a tail that is no share": (dict(name="shortest_path", tail=1.5), "tail=1.5"),
    "no such power": (dict(name="shortest_path", power=3), "power=3"),
    "a reach beyond the schedule": (dict(name="quadratic", reach=2.0), "reach=2.0"),
}


@pytest.mark.parametrize("case", UNSELECTABLE)
def test_timesteps_that_cannot_be_selected_are_refused_before_any_work(case, tmp_path):
    changes, message = UNSELECTABLE[case]
    config = _config()
    config.timesteps.update(changes)
    with pytest.raises(InputError, match=message):
        pipeline.Experiment(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_float_arms_of_a_recipe_that_prunes_by_drift_run_even_steps(tmp_path):
    found = pipeline.Experiment(_config(timesteps__name="drift"), tmp_path)
    even = pipeline.Experiment(_config(), tmp_path)
    np.testing.assert_array_equal(found.timesteps, even.timesteps)


def test_an_unknown_reading_of_drift_is_refused(tmp_path):
    config = _config(timesteps__name="drift", timesteps__drift="x_0")
    with pytest.raises(InputError, match="unknown reading of drift 'x_0'; known: state"):
        pipeline.Experiment(config, tmp_path)


def test_a_site_pinned_to_float_is_in_float_in_every_arm(tmp_path, weights_file):
    config = _config(plan__pins=(("patch_embed", 32), ("final", 8)))
    config.weights = weights_file
    config.arms = {"uniform": {"solver": "uniform"}, "wide": {"w_bits": (8,), "ratio_bits": 8}}
    found = arms.list_arms(pipeline.Experiment(config, tmp_path))
    for arm in found[1:]:
        assert arm.plan.w_bits["patch_embed"] is None and arm.plan.w_bits["final"] == 8
        arm.verify()
        assert arm.passed_bytes == arm.plan.predicted["bytes"]
        changed = arm.plan.w_bits | {"patch_embed": 8}, arm.plan.a_bits | {"patch_embed": 8}
        wrong = replace(arm.plan, w_bits=changed[0], a_bits=changed[1])
        with pytest.raises(InputError, match=r"pinned at 32 \(float\)"):
            plans.validate(wrong, arm.experiment.all_sites, arm.experiment.model_hash)
    line = next(each for each in preview.text(config).split("\n") if each.startswith("patch_embed"))
    assert line.endswith("float")
