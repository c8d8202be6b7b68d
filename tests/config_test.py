"""The configuration: every wrong key, type and count is refused, with what exists."""

import json
import runpy
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mpqdiff.config import ARM_KEYS, POSITIVE, base, for_arm, smoke, validate
from mpqdiff.errors import InputError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def _set(config, path: str, value):
    *groups, leaf = path.split(".")
    for group in groups:
        config = config[group]
    with config.ignore_type():
        config[leaf] = value


def test_the_base_and_its_smoke_version_are_valid():
    validate(base())
    validate(smoke(base()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_and_its_smoke_version_are_valid(path):
    get_config = runpy.run_path(str(path))["get_config"]
    for config in (get_config(), get_config("smoke")):
        validate(config)
        assert config.name.split()[0] == path.stem


def test_a_config_that_went_through_json_is_valid_and_equal():
    stored = json.loads(json.dumps(smoke(base()).to_dict()))
    again = ConfigDict(stored)
    validate(again)
    assert json.loads(json.dumps(again.to_dict())) == stored


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("sed", r"unknown key config\.sed; did you mean 'seed'\? \(known: .*arms.*weights\)"),
        ("plan.ration", r"unknown key config\.plan\.ration; did you mean 'ratio'\? \(known: a_"),
        (
            "quantize.xyz",
            r"unknown key config\.quantize\.xyz \(known: backend, beta, clip, groups, mode, prod",
        ),
        ("diffusion.steps", r"unknown key config\.diffusion\.steps"),
        ("train.lr", r"unknown key config\.train\.lr "),
        ("model.kwarg", r"unknown key config\.model\.kwarg; did you mean 'kwargs'"),
    ],
)
def test_an_unknown_key_lists_the_known_ones(path, message):
    config = base()
    _set(config, path, 1)
    with pytest.raises(InputError, match=message):
        validate(config)


def test_an_unknown_key_of_an_arm_lists_the_known_ones():
    config = base()
    config.arms = {"fast": {"solvr": "lp"}}
    with pytest.raises(InputError, match=r"config\.arms\.fast\.solvr; did you mean 'solver'"):
        validate(config)
    config.arms = {"fast": 3}
    with pytest.raises(InputError, match=r"config\.arms\.fast=3: expected a group"):
        validate(config)


@pytest.mark.parametrize("path", ["seed", "plan", "plan.pins", "sample.batch", "model.kwargs"])
def test_a_missing_key_is_named(path):
    config = base()
    *groups, leaf = path.split(".")
    target = config[groups[0]] if groups else config
    with target.unlocked():
        del target[leaf]
    with pytest.raises(InputError, match=rf"config\.{path} is missing: start from"):
        validate(config)


@pytest.mark.parametrize("path", POSITIVE)
@pytest.mark.parametrize("value", [0, -1])
def test_zero_and_negative_counts_are_refused(path, value):
    config = base()
    _set(config, path, value)
    with pytest.raises(InputError, match=rf"config\.{path}={value}(\.0)?: expected a positive"):
        validate(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sample.num_images", "8", "expected a int"),
        ("sample.num_images", 8.0, "expected a int"),
        ("sample.num_images", True, "expected a int"),
        ("sample.num_images", None, "expected a int"),
        ("plan.ratio", float("nan"), "expected a float"),
        ("calibration.memory_gb", float("inf"), "expected a float"),
        ("plan.solver", 3, "expected a str"),
        ("publish", "no", "expected a bool"),
        ("plan.w_bits", 4, "expected a tuple"),
        ("plan", 3, "expected a group of keys"),
        ("arms", [1], "expected a group of keys"),
        ("model.kwargs", 1, "expected a group of keys"),
        ("plan.budget.bytes", -1.0, "expected a bound, or 0 for none"),
        ("plan.budget", 1e6, "expected a group of keys"),
        ("plan.ties", ("(",), "expected regexes"),
        ("calibration.samples", 3, "at least 4"),
        ("diffusion.eta", -0.5, "0 or more"),
        ("model.kwargs.depth", 0, "expected at least 1"),
        ("model.kwargs.num_heads", -2, "expected at least 1"),
        ("plan.pins", (("final", 8, 9),), "expected pairs"),
        ("plan.pins", (("(", 8),), "expected pairs"),
        ("plan.pins", (("final", "8"),), "expected pairs"),
        ("plan.pins", ("final",), "expected pairs"),
    ],
)
def test_other_unusable_values_are_refused_by_name(path, value, message):
    config = base()
    _set(config, path, value)
    with pytest.raises(InputError, match=message) as caught:
        validate(config)
    assert path in str(caught.value)


def test_whole_numbers_pass_for_floats_and_lists_for_tuples():
    config = base()
    for path, value in (("plan.ratio", 2), ("plan.w_bits", [2, 4]), ("plan.pins", [])):
        _set(config, path, value)
    validate(config)


def test_the_type_of_an_arms_value_is_checked():
    config = base()
    for key, value in (("w_bits", 4), ("num_steps", "ten"), ("float", 1), ("backend", 2)):
        config.arms = ConfigDict({"x": {key: value}})
        with pytest.raises(InputError, match=rf"config\.arms\.x\.{key}={value!r}: expected a"):
            validate(config)


def test_an_arm_changes_its_keys_and_nothing_else():
    config = base()
    changes = {"solver": "greedy", "score": "random", "num_steps": 7, "seed": 5, "w_bits": (2, 4)}
    before = config.to_dict()
    arm = for_arm(config, changes)
    assert (arm.plan.solver, arm.score.name, arm.diffusion.num_steps) == ("greedy", "random", 7)
    assert (arm.seed, arm.plan.w_bits) == (5, (2, 4))
    assert config.to_dict() == before
    expected = base()
    for key, value in changes.items():
        _set(expected, ARM_KEYS[key], value)
    assert arm.to_dict() == expected.to_dict()
    assert for_arm(config, {"float": True}).to_dict() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction": {"file_bytes": -1.0}}, "plan.reduction.file_bytes=-1.0"),
        ({"manifold": {"weights": (1.0, 0.0)}}, "manifold.weights=.*expected four numbers"),
        ({"steps": (0,)}, r"plan.steps=\(0,\): expected counts"),
        ({"budget": {"bytes": -5.0}}, "plan.budget.bytes=-5.0"),
        ({"num_steps": 0}, "diffusion.num_steps=0: expected a positive"),
    ],
)
def test_what_an_arm_changes_is_checked_like_the_rest(changes, message):
    config = base()
    config.arms = {"odd": changes}
    with pytest.raises(InputError, match=message):
        validate(config)


@pytest.mark.parametrize("pairs", [((50,),), (50,), ((50, 0),), ((50, 1.5),)])
def test_images_by_steps_are_pairs_of_counts(pairs):
    config = base()
    config.sample.by_steps = pairs
    with pytest.raises(InputError, match=r"expected pairs \(steps at most, images\)"):
        validate(config)


@pytest.mark.parametrize("key", ["tolerance", "rollout"])
def test_a_negative_number_of_the_joint_choice_is_refused(key):
    config = base()
    config.plan[key] = -1 if key == "rollout" else -0.1
    with pytest.raises(InputError, match=f"plan.{key}=-"):
        validate(config)
