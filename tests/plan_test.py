"""Plan: JSON that comes back the same, refused when malformed or made for another model."""

import copy
import json
from dataclasses import replace

import pytest

from mpqdiff import plan as plans
from mpqdiff.errors import InputError
from mpqdiff.plan import Plan
from mpqdiff.sites import Site

SITES = [
    Site("a", "dense", (4, 6), 24, 6, 24, "a", pin=8),
    Site("b", "dense", (6, 2), 12, 2, 12, "b"),
    Site("label", "embedding", (5, 4), 20, 0, 0, "label"),
    Site("qk", "product", (), 0, 0, 9, "qk"),
]


def _plan(**changes) -> Plan:
    whole = Plan(
        model={"hash": "abc", "name": "dit"},
        w_bits={"a": 8, "b": 4, "label": None, "qk": None},
        a_bits={"a": 8, "b": 8, "label": None, "qk": {"lhs": None, "rhs": None}},
        mode="step_table",
        groups=((999, 600), (400, 0)),
        timesteps=(999, 600, 400, 0),
        system="mpq_diff",
        budgets={"bytes": 1234.5},
        predicted={"bytes": 1200.0},
        objective=1 / 3,
        bound=0.1 + 0.2,
        gap=1 / 3 - (0.1 + 0.2),
        provenance={"seed": 0, "versions": {"jax": "1"}},
    )
    return replace(whole, **changes)


def test_json_round_trip(tmp_path):
    path = tmp_path / "plan.json"
    plans.save(_plan(), path)
    found = plans.load(path)
    assert found.hash == _plan().hash
    assert found == replace(_plan(), objective=0.333333333, bound=0.3, gap=0.0333333333)
    plans.save(found, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_the_schema_is_that_of_the_contract():
    body = plans.to_json(_plan())
    assert set(body) == {
        "schema", "model", "sites", "activations", "timesteps", "tokens", "base_method",
        "budgets", "predicted", "objective", "bound", "gap", "system", "provenance",
    }  # fmt: skip
    assert body["schema"] == 1
    assert body["sites"]["b"] == {"w_bits": 4, "stored_bits": [4], "a_bits": 8}
    assert body["sites"]["qk"] == {
        "w_bits": None, "stored_bits": [], "a_bits": {"lhs": None, "rhs": None}
    }  # fmt: skip
    assert body["activations"] == {"mode": "step_table", "groups": [[999, 600], [400, 0]]}
    assert body["objective"] == 0.333333333
    json.dumps(body, allow_nan=False)


def test_the_hash_is_of_the_decision_alone():
    base = _plan().hash
    assert _plan(system="other", objective=2.0, provenance={}).hash == base
    changes = [
        {"w_bits": _plan().w_bits | {"b": 2}}, {"a_bits": _plan().a_bits | {"b": 4}},
        {"mode": "online"}, {"groups": ((999, 0),)}, {"timesteps": (999, 0)},
        {"model": {"hash": "other"}},
    ]  # fmt: skip
    hashes = {_plan(**change).hash for change in changes}
    assert len(hashes | {base}) == len(changes) + 1


def test_average_bits_weighs_by_parameters_and_counts_float_as_32():
    assert plans.average_bits(_plan(), SITES[:2]) == (24 * 8 + 12 * 4) / 36
    assert plans.average_bits(_plan(), SITES) == (24 * 8 + 12 * 4 + 20 * 32) / 56


def test_integer_sites_are_those_with_widths():
    assert [site.path for site in _plan().integer(SITES)] == ["a", "b"]
    pair = {"qk": {"lhs": 8, "rhs": 8}}
    assert [s.path for s in _plan(a_bits=_plan().a_bits | pair).integer(SITES)] == ["a", "b", "qk"]


def _damaged(path: str, value):
    """The JSON of a good plan with `value` at the slash-separated `path` (... removes the key)."""
    body = copy.deepcopy(plans.to_json(_plan()))
    *groups, last = path.split("/")
    target = body
    for name in groups:
        target = target[name]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return body


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 2, "schema 2, expected 1"),
        ("schema", ..., "schema None, expected 1"),
        ("sites", ..., "'sites' is missing"),
        ("sites", [], "missing or malformed"),
        ("sites/b", 4, "missing or malformed"),
        ("sites/b/w_bits", ..., "'w_bits' is missing"),
        ("sites/b/a_bits", ..., "'a_bits' is missing"),
        ("sites/b/w_bits", 1, "site 'b' has w_bits 1, expected 2..8 or null"),
        ("sites/b/w_bits", 9, "site 'b' has w_bits 9"),
        ("sites/b/w_bits", True, "site 'b' has w_bits True"),
        ("sites/b/w_bits", 4.0, "site 'b' has w_bits 4.0"),
        ("sites/b/w_bits", "4", "site 'b' has w_bits '4'"),
        ("sites/b/a_bits", 16, "site 'b' has a_bits 16"),
        ("sites/b/a_bits", None, "both operands in integers, or null for both"),
        ("sites/b/w_bits", None, "both operands in integers, or null for both"),
        ("sites/qk/a_bits", {"lhs": 8, "rhs": None}, "both operands in integers"),
        ("sites/qk/a_bits", {"left": 8}, "not lhs and rhs"),
        ("model", "abc", "model is 'abc'"),
        ("activations/mode", "tdq", "'tdq'; known: static, step_table, online, ema"),
        ("activations/groups", [[1, 2, 3]], "missing or malformed"),
        ("activations/groups", 3, "missing or malformed"),
        ("timesteps", [], "strictly descending"),
        ("timesteps", [0, 5], "strictly descending"),
        ("timesteps", [5, 5], "strictly descending"),
        ("timesteps", ["x"], "missing or malformed"),
        ("provenance", ..., "'provenance' is missing"),
    ],
)
def test_a_malformed_plan_is_refused(path, value, message):
    with pytest.raises(InputError, match=message) as caught:
        plans.from_json(_damaged(path, value), "somewhere/plan.json")
    assert str(caught.value).startswith("somewhere/plan.json: ")


@pytest.mark.parametrize("body", [None, [], 3, "plan"])
def test_json_that_is_no_object_is_refused(body):
    with pytest.raises(InputError, match=f"schema '{type(body).__name__}'"):
        plans.from_json(body)


def test_a_truncated_or_absent_file_is_refused_by_name(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(InputError, match=r"plan\.json: no such file"):
        plans.load(path)
    plans.save(_plan(), path)
    path.write_text(path.read_text()[:200])
    with pytest.raises(InputError, match=r"plan\.json: not valid JSON"):
        plans.load(path)


def test_validate_accepts_its_own_model():
    plans.validate(_plan(), SITES, "abc")


def test_validate_refuses_another_model():
    with pytest.raises(InputError, match="made for model abc, the weights given are xyz"):
        plans.validate(_plan(), SITES, "xyz")


def test_validate_names_unknown_and_missing_sites():
    with pytest.raises(InputError, match=r"the model lacks: \['label'\]; .*decision: none"):
        plans.validate(_plan(), [s for s in SITES if s.path != "label"], "abc")
    more = [*SITES, Site("late", "dense", (2, 2), 4, 2, 4, "late")]
    with pytest.raises(InputError, match=r"the model lacks: none; .*decision: \['late'\]"):
        plans.validate(_plan(), more, "abc")


def test_validate_holds_the_plan_to_the_pins():
    with pytest.raises(InputError, match="'a' has w_bits 4 in the plan and is pinned at 8"):
        plans.validate(_plan(w_bits=_plan().w_bits | {"a": 4}), SITES, "abc")


def test_diff_lists_the_sites_that_differ():
    other = plans.with_choices(_plan(), [SITES[1]], {"b": (2, 8)}, mode="online")
    assert other.mode == "online"
    assert plans.diff(_plan(), _plan()) == {}
    assert plans.diff(_plan(), other) == {"b": ((4, 8), (2, 8))}
    wider = replace(_plan(), a_bits=_plan().a_bits | {"a": 4})
    assert plans.diff(_plan(), wider) == {"a": ((8, 8), (8, 4))}
    kept = plans.with_choices(_plan(), [SITES[1]], {"b": (32, 32)})
    assert plans.diff(_plan(), kept) == {"b": ((4, 8), (None, None))}
    fewer = replace(_plan(), w_bits={"a": 8}, a_bits={"a": 8})
    assert plans.diff(_plan(), fewer)["b"] == ((4, 8), (None, None))
