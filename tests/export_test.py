"""Plans out to qwix and ModelOpt-like JSON and back; bit lists of others in."""

import json
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mpqdiff import export, intercept, models, weights
from mpqdiff import plan as plans
from mpqdiff import sites as site_list
from mpqdiff.denoiser import from_linen
from mpqdiff.errors import InputError
from mpqdiff.plan import Plan
from mpqdiff.quantize import apply
from mpqdiff.quantize.activations import Table
from mpqdiff.sites import Site

SITES = [
    Site("patch_embed", "conv", (2, 2, 1, 8), 32, 8, 128, "patch_embed", pin=8),
    Site("label_embed", "embedding", (4, 8), 32, 0, 0, "label_embed"),
    Site("block_0/attn/qkv", "dense", (8, 24), 192, 24, 768, "qkv"),
    Site("block_0/attn/qk", "product", (), 0, 0, 256, "qk"),
    Site("block_0/mlp/fc1", "dense", (8, 32), 256, 32, 1024, "mlp"),
    Site("block_0/mlp/fc1#1", "dense", (8, 32), 256, 32, 1024, "mlp"),
    Site("final", "dense", (8, 4), 32, 4, 128, "final"),
]
WIDTHS = {"patch_embed": 8, "block_0/attn/qkv": 3, "final": None,
          "block_0/mlp/fc1": 4, "block_0/mlp/fc1#1": 4}  # fmt: skip


def make_plan(sites=SITES, widths=None, *, mode="online", a_bits=8, products=True) -> Plan:
    widths = WIDTHS if widths is None else widths
    a = {path: None if bits is None else a_bits for path, bits in widths.items()}
    pair = dict.fromkeys(("lhs", "rhs"), a_bits if products else None)
    return Plan(
        model={"hash": "h"},
        w_bits={site.path: widths.get(site.path) for site in sites},
        a_bits={s.path: pair if s.kind == "product" else a.get(s.path) for s in sites},
        mode=mode,
        groups=((900, 0),),
        timesteps=(900, 0),
        system="test",
    )


@pytest.fixture(scope="module")
def dit():
    """(module, params, sites, inputs) of a small DiT whose every parameter is random."""
    module = models.build(
        "dit", image_size=8, channels=1, patch=4, width=32, depth=1, num_heads=2, num_classes=3
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.2, jnp.float32), shapes
    )
    every, _ = site_list.list_sites(
        from_linen(module), params, *site_list.example_inputs((8, 8, 1))
    )
    inputs = (jnp.asarray(rng.standard_normal((4, 8, 8, 1)), jnp.float32), jnp.int32(500),
              jnp.array([0, 1, 2, 1]))  # fmt: skip
    return module, params, every, inputs


def in_qwix(dit, plan, *, compiled=True):
    """(eps, quantised parameters) of qwix under the exported rules, none of which is idle."""
    qwix = pytest.importorskip("qwix")
    module, params, sites, inputs = dit
    provider = qwix.PtqProvider(export.to_qwix(plan, sites))
    model = qwix.quantize_model(module, provider)
    abstract = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    quantised = qwix.quantize_params(params, abstract)
    run = jax.jit(model.apply) if compiled else model.apply
    eps = np.asarray(run({"params": quantised}, *inputs).eps)
    assert not provider.get_unused_rules()
    return eps, quantised


def in_ours(dit, plan, *, clip):
    module, params, every, inputs = dit
    sites = site_list.planned(every, products=True)
    none = Table(jnp.zeros(0, jnp.int32), jnp.zeros((0, 9)), jnp.zeros((0, 9), jnp.int8))
    flags = [False] * len(sites)
    tensors = apply.quantize(params, sites, plan, none, flags, clip=clip)
    model = apply.build(from_linen(module), params, sites, plan, tensors, none)
    return np.asarray(jax.jit(model.denoise)(model.params, *inputs).eps)


def rounded(x, bits, axes):
    """(integers as float, scale) of x by qwix's convention, one scale over `axes`."""
    scale = jnp.abs(x).max(axis=axes, keepdims=True) / (2 ** (bits - 1) - 0.5)
    return jnp.clip(jnp.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1), scale


def by_hand(dit, plan):
    """The plan by qwix's convention, written apart from qwix and export, operation by operation."""
    module, params, every, inputs = dit

    def weighted(site, layer, x):
        leaves = layer.variables["params"]
        axes = tuple(range(1, x.ndim)) if site.kind == "conv" else -1  # per image, per token
        x, x_scale = rounded(x, plan.a_bits[site.path], axes)
        bits = plan.w_bits[site.path]
        kernel, scale = rounded(leaves["kernel"], bits, tuple(range(leaves["kernel"].ndim - 1)))
        zero = {"kernel": kernel, "bias": jnp.zeros_like(leaves["bias"])}
        product = layer.clone(parent=None).apply({"params": zero}, x)
        return product * x_scale * scale.reshape(-1) + leaves["bias"]

    def product(site, layer, lhs, rhs):
        operands, out = layer.equation.split("->")
        left, right = operands.split(",")
        axes = [tuple(i for i, c in enumerate(s) if c not in out) for s in (left, right)]
        bits = plan.a_bits[site.path]
        lhs, lhs_scale = rounded(lhs, bits["lhs"], axes[0])
        rhs, rhs_scale = rounded(rhs, bits["rhs"], axes[1])
        # One scale at a time and the right one first, as qwix: ties at absmax feel the order.
        one, two = jnp.ones_like(lhs_scale), jnp.ones_like(rhs_scale)
        acc = jnp.einsum(layer.equation, lhs, rhs) * jnp.einsum(layer.equation, one, rhs_scale)
        return acc * jnp.einsum(layer.equation, lhs_scale, two)

    operations = {
        site.path: partial(product if site.kind == "product" else weighted, site)
        for site in plan.integer(every)
    }
    return np.asarray(intercept.rewrite(from_linen(module), operations)(params, *inputs).eps)


def distance(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def mixed_plan(dit):
    """Every kind of site, three widths of weights and two of activations, and float elsewhere."""
    widths = dict.fromkeys(site.path for site in site_list.planned(dit[2]))
    widths |= {"patch_embed": 8, "block_0/adaln": 6, "block_0/attn/qkv": 4, "block_0/mlp/fc2": 8}
    plan = make_plan(dit[2], widths)
    return replace(plan, a_bits=plan.a_bits | {"block_0/attn/qkv": 5})


def test_qwix_runs_exactly_the_plan(dit):
    plan = mixed_plan(dit)
    eps, quantised = in_qwix(dit, plan, compiled=False)
    flat: dict[str, Any] = traverse_util.flatten_dict(quantised, sep="/")
    types = {name.removesuffix("/kernel"): leaf.array.qtype for name, leaf in flat.items()
             if not isinstance(leaf, jax.Array)}  # fmt: skip
    assert types == {path: f"int{bits}" for path, bits in plan.w_bits.items() if bits}
    assert len(set(types.values())) == 3 and "final" not in types
    # Widths of activations, axes and products too: the same plan written out by hand.
    assert distance(eps, by_hand(dit, plan)) < 1e-6
    other = replace(plan, a_bits=plan.a_bits | {"block_0/mlp/fc2": 7})
    assert distance(eps, by_hand(dit, other)) > 1e-3


def test_qwix_and_our_integers_are_close(dit):
    module, params, every, inputs = dit
    expected = np.asarray(jax.jit(from_linen(module))(params, *inputs).eps)
    paths = [site.path for site in site_list.planned(every)]
    eight = make_plan(every, dict.fromkeys(paths, 8), products=False)
    qwix, ours = in_qwix(dit, eight)[0], in_ours(dit, eight, clip="absmax")
    four = make_plan(every, dict.fromkeys(paths, 4) | {"patch_embed": 8}, products=False)
    assert distance(qwix, ours) < 0.05  # each is about 0.025 away from float
    assert 0.5 < distance(qwix, expected) / distance(ours, expected) < 2
    assert distance(in_qwix(dit, four)[0], ours) > 0.2


def test_qwix_rules_say_what_the_plan_says():
    pytest.importorskip("qwix")
    rules = export.to_qwix(make_plan(), SITES)
    assert [(r.module_path, r.weight_qtype, r.act_qtype) for r in rules] == [
        ("patch_embed", "int8", "int8"),
        ("block_0/attn/qkv", "int3", "int8"),
        ("block_0/attn/qk", "int8", "int8"),
        ("block_0/mlp/fc1", "int4", "int8"),
    ]
    assert not any(rule.act_static_scale for rule in rules)
    assert not any(r.act_static_scale for r in export.to_qwix(make_plan(mode="step_table"), SITES))
    assert all(r.act_static_scale for r in export.to_qwix(make_plan(mode="static"), SITES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a_bits": {"patch_embed": 4}}, "'patch_embed' is a conv of 4 by 8 bits"),
        ({"a_bits": {"block_0/attn/qk": {"lhs": 8, "rhs": 4}}}, "is a product of 8 by 4 bits"),
        ({"w_bits": {"block_0/mlp/fc1#1": 8}}, "'block_0/mlp/fc1#1' repeats a call"),
        ({"w_bits": {"block_0/mlp/fc1": None}, "a_bits": {"block_0/mlp/fc1": None}}, "repeats"),
    ],
)
def test_what_qwix_cannot_express_is_named(changes, message):
    pytest.importorskip("qwix")
    plan = make_plan()
    plan = replace(plan, **{key: {**getattr(plan, key), **new} for key, new in changes.items()})
    with pytest.raises(InputError, match=message):
        export.to_qwix(plan, SITES)


def test_a_written_rule_is_a_rule():
    qwix = pytest.importorskip("qwix")
    body = json.loads(json.dumps(export.FORMS["qwix"](make_plan(), SITES)))
    assert [qwix.QuantizationRule(**rule) for rule in body] == export.to_qwix(make_plan(), SITES)


def test_without_qwix_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(InputError, match="pip install qwix"):
        export.to_qwix(make_plan(), SITES)
    assert len(export.qwix_rules(make_plan(), SITES)) == 4


def write(tmp_path, body):
    path = tmp_path / "bits.json"
    path.write_text(json.dumps(body))
    return path


@pytest.mark.parametrize("mode", ["online", "static", "step_table"])
def test_modelopt_round_trip(tmp_path, mode):
    plan = make_plan(mode=mode)
    body = export.to_modelopt(plan, SITES)
    assert export.read_bits(write(tmp_path, body), SITES) == plan.w_bits
    first, *rest = body["quant_cfg"]
    assert first == {"quantizer_name": "*", "enable": False}
    entries = {entry["quantizer_name"]: entry for entry in rest}
    assert entries["block_0.attn.qkv.weight_quantizer"] == {
        "quantizer_name": "block_0.attn.qkv.weight_quantizer",
        "cfg": {"num_bits": 3, "axis": 0},
        "enable": True,
    }
    assert entries["final.weight_quantizer"]["enable"] is False
    assert entries["final.input_quantizer"]["enable"] is False
    assert entries["block_0.attn.qk.rhs_quantizer"]["cfg"]["num_bits"] == 8
    assert ("block_sizes" in entries["block_0.attn.qkv.input_quantizer"]["cfg"]) == (
        mode == "online"
    )


def as_list(widths):
    return [widths[site.path] for site in site_list.planned(SITES)]


def as_dotted(widths):
    names = {site.path: site.path.replace("block_0", "blocks.0").replace("/", ".")
             for site in SITES}  # fmt: skip
    return {names[path]: bits for path, bits in widths.items()}


@pytest.mark.parametrize(
    "body",
    [
        WIDTHS,
        as_list(WIDTHS),
        as_dotted(WIDTHS),
        {path.replace("/", "."): bits for path, bits in WIDTHS.items()},
        plans.to_json(make_plan()),
    ],
    ids=["paths", "list", "torch names", "dotted", "plan.json"],
)
def test_bit_lists_of_every_form(tmp_path, body):
    found = export.read_bits(write(tmp_path, body), SITES)
    assert found == make_plan().w_bits
    assert list(found) == [site.path for site in SITES]


@pytest.mark.parametrize("body", [plans.to_json(make_plan()), {**WIDTHS, "time_embed": None}])
def test_a_null_for_what_is_no_site_is_ignored(tmp_path, body):
    sites = site_list.planned(SITES)  # plan.json has the other sites too, at null
    assert export.read_bits(write(tmp_path, body), sites) == WIDTHS


def without(key):
    return {path: bits for path, bits in WIDTHS.items() if path != key}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (without("block_0/attn/qkv"), r"no width for sites \['block_0/attn/qkv'\]"),
        ({**WIDTHS, "block_7/attn/qkv": 4}, r"no such sites \['block_7/attn/qkv'\]; the model has"),
        ({**WIDTHS, "final": 16}, "{'final': 16}: expected 2 to 8, or null"),
        ({**WIDTHS, "final": 1}, "{'final': 1}"),
        ({**WIDTHS, "final": True}, "{'final': True}"),
        ({**WIDTHS, "final": 4.0}, "{'final': 4.0}"),
        ({**WIDTHS, "label_embed": 8}, "{'label_embed': 8}"),
        ({**WIDTHS, "blocks.0.attn.qkv": 3}, "'block_0/attn/qkv' is named twice"),
        ({**WIDTHS, "block_0/mlp/fc1#1": 8}, "share their weights"),
        (as_list(WIDTHS)[:-1], "4 widths for 5 dense and convolution sites"),
        (4, "a int, expected a JSON list or object"),
        ({"quant_cfg": {"*weight_quantizer": {"num_bits": 4}}}, "expected a list of objects"),
        ({"quant_cfg": [{"quantizer_name": "final.weight_quantizer"}]}, "quant_cfg: KeyError"),
        ({"quant_cfg": [{"quantizer_name": "*weight_quantizer"}]}, "wildcards are not resolved"),
        ({"schema": 1, "sites": {"final": {"w_bits": 9, "a_bits": 8}}}, "missing or malformed"),
    ],
)
def test_unusable_bit_lists_are_named(tmp_path, body, message):
    with pytest.raises(InputError, match=message):
        export.read_bits(write(tmp_path, body), SITES)


def test_names_that_two_sites_could_mean(tmp_path):
    twins = [replace(SITES[2], path="block_0/a", tie="a"), replace(SITES[2], path="blocks_0/a")]
    own = {"block_0/a": 4, "blocks_0/a": 8}
    assert export.read_bits(write(tmp_path, own), twins) == own
    with pytest.raises(InputError, match=r"'blocks\.0\.a' could be"):
        export.read_bits(write(tmp_path, {"blocks.0.a": 4, "block_0/a": 4}), twins)
