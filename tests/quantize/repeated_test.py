"""A module that is called several times: its weights are held, stored and paid for once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import mpqdiff
from mpqdiff import costs, solve
from mpqdiff import sites as site_list
from mpqdiff.costs.bytes import device_bytes, file_bytes, fixed_bytes
from mpqdiff.denoiser import from_linen
from mpqdiff.errors import InputError
from mpqdiff.plan import Plan
from mpqdiff.quantize import activations, apply, simulate, store
from mpqdiff.records import FLOAT_BITS, Statistics

STEPS = np.array([700, 20], np.int32)
X = np.random.default_rng(0).standard_normal((4, 4, 4, 2)).astype(np.float32)


class Shared(nn.Module):
    """One Dense three times, its second input one-sided, and one Conv twice."""

    @nn.compact
    def __call__(self, x_t, t, cond):
        mix, fold = nn.Dense(2, name="mix"), nn.Conv(2, (3, 3), name="fold")
        x = mix(fold(x_t) + jnp.sin(jnp.asarray(t, jnp.float32)).reshape(-1, 1, 1, 1))
        return nn.Dense(2, name="own")(mix(nn.relu(x)) + fold(mix(x)))


@pytest.fixture(scope="module", params=["linen", "flax"])
def case(request):
    """(denoise, params, sites) through either door."""
    module, t = Shared(), np.full(4, 20, np.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), X, t, None)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda s: (rng.standard_normal(s.shape) * 0.4).astype(np.float32), shapes
    )
    denoise, params = from_linen(module), variables["params"]
    if request.param == "flax":
        denoise, params = mpqdiff.from_flax(module, variables, X, t, None)
    found, left = site_list.list_sites(denoise, params, X[:1], t[:1], None)
    assert not left and [site.path for site in found] == [
        "fold", "mix", "mix#1", "mix#2", "fold#1", "own",
    ]  # fmt: skip
    return denoise, params, found


def statistics(sites):
    """Ranges that differ by call: that of "mix#1" alone is lopsided."""
    low = np.array([[-3.0 - i, 0.0] for i in range(len(sites))])
    low[[site.path for site in sites].index("mix#1")] = 0
    high = np.array([[4.0 + i, 0.0] for i in range(len(sites))])
    return Statistics(STEPS, None, None, None, None, None, *(np.stack([e, e]) for e in (low, high)))


def planned(sites, w_bits):
    """(plan, table, flags) of `w_bits` by module; FLOAT_BITS is left in float."""
    by_site = {site.path: w_bits[site.path.split("#")[0]] for site in sites}
    stats = statistics(sites)
    plan = Plan(
        model={"hash": "shared"},
        w_bits={path: None if bits == FLOAT_BITS else bits for path, bits in by_site.items()},
        a_bits={path: None if bits == FLOAT_BITS else 8 for path, bits in by_site.items()},
        mode="step_table",
        groups=activations.groups(STEPS, STEPS, "step_table"),
        timesteps=tuple(STEPS.tolist()),
        system="test",
    )
    table = activations.table(stats, sites, mode=plan.mode, a_bits=plan.a_bits)
    return plan, table, activations.lopsided(stats, sites)


def test_calls_of_one_module_have_one_answer_to_lopsided(case):
    sites = case[2]
    flags = dict(
        zip([s.path for s in sites], planned(sites, dict.fromkeys(NAMES, 8))[2], strict=True)
    )
    assert flags == {s.path: s.path.startswith("mix") for s in sites}


NAMES = ("fold", "mix", "own")
WIDTHS = [
    {"fold": 4, "mix": 4, "own": 8},
    {"fold": 8, "mix": 2, "own": 3},
    {"fold": FLOAT_BITS, "mix": 8, "own": 4},
    {"fold": 5, "mix": FLOAT_BITS, "own": FLOAT_BITS},
]


@pytest.mark.parametrize("w_bits", WIDTHS)
def test_bytes_on_the_device_and_in_the_file_are_those_promised(case, w_bits, tmp_path):
    denoise, params, sites = case
    plan, table, flags = planned(sites, w_bits)
    tensors = apply.quantize(params, sites, plan, table, flags, clip="absmax")
    assert tensors.keys() == {name for name in NAMES if w_bits[name] != FLOAT_BITS}
    model = apply.build(denoise, params, sites, plan, tensors, table)
    fixed = apply.fixed_cost(params, sites, rows=len(STEPS))
    pairs = [
        (site, w_bits[site.path.split("#")[0]], flag)
        for site, flag in zip(sites, flags, strict=True)
    ]
    assert model.bytes == fixed["bytes"] + sum(device_bytes(*pair) for pair in pairs)
    left = apply.float_leaves(params, plan.integer(sites))
    size = store.save(tmp_path / "m.safetensors", plan, tensors, left, table)
    assert size == (tmp_path / "m.safetensors").stat().st_size
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as stored:
        payload = sum(stored.get_tensor(name).nbytes for name in stored.keys())  # noqa: SIM118
    assert payload == fixed["file_bytes"] + sum(file_bytes(*pair) for pair in pairs)
    bare = apply.float_leaves(params, sites)
    assert size - payload <= store.header_bytes(plan, sites, bare)


def test_a_call_more_costs_nothing_and_the_first_pays_all(case):
    first, repeat = (next(s for s in case[2] if s.path == path) for path in ("mix", "mix#1"))
    for bits in (4, 8, FLOAT_BITS):
        assert device_bytes(repeat, bits, True) == file_bytes(repeat, bits, True) == 0
        assert device_bytes(first, bits, True) > 0 and file_bytes(first, bits, True) > 0


def test_integers_agree_with_the_simulation_and_with_the_float_model(case):
    denoise, params, sites = case
    plan, table, flags = planned(sites, {"fold": 8, "mix": 8, "own": 8})
    tensors = apply.quantize(params, sites, plan, table, flags, clip="absmax")
    model = apply.build(denoise, params, sites, plan, tensors, table)
    integer = np.asarray(jax.jit(model.denoise)(model.params, X, np.int32(20), None).eps)
    net = simulate.supernet(params, sites, [(8, 8)], {8: table}, flags, clip="absmax")
    assert net["sites"]["mix"]["qvalue"] is net["sites"]["mix#2"]["qvalue"]
    simulated = simulate.simulated_denoise(denoise, sites, [(8, 8)])
    given = {**net, "choice": np.zeros(len(sites), np.int32)}
    same = jax.jit(simulated)(given, X, np.int32(20), None).eps
    np.testing.assert_allclose(integer, same, rtol=1e-3, atol=1e-3)
    exact = np.asarray(jax.jit(denoise)(params, X, np.int32(20), None).eps)
    assert np.linalg.norm(integer - exact) < 0.1 * np.linalg.norm(exact)


def test_a_file_alone_gives_the_model_back(case, tmp_path):
    denoise, params, sites = case
    plan, table, flags = planned(sites, {"fold": 4, "mix": 8, "own": FLOAT_BITS})
    pieces = apply.stream(params, sites, plan, flags)
    left = apply.float_leaves(params, plan.integer(sites))
    store.save(tmp_path / "m.safetensors", plan, pieces, left, table)
    found, tensors, steps = store.load(tmp_path / "m.safetensors")
    floats = store.load_float(tmp_path / "m.safetensors")
    again = apply.build(denoise, floats, sites, found, tensors, steps)
    whole = apply.quantize(params, sites, plan, table, flags)
    model = apply.build(denoise, params, sites, plan, whole, table)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_one_width_is_chosen_for_all_calls_and_paid_once(case):
    sites = case[2]
    choices, legal = costs.legal_choices(sites, costs.list_choices((4, 8), (8,)))
    flags = planned(sites, dict.fromkeys(NAMES, 8))[2]
    size = np.array(
        [[device_bytes(s, w, f) for w, _ in choices] for s, f in zip(sites, flags, strict=True)]
    )
    value = np.array([[9.0 if s.path == "mix#1" else 0.5, 0.0] for s in sites])
    once = {s.path: row for s, row in zip(sites, size, strict=True) if not s.repeated}
    budget = once["fold"][0] + once["own"][0] + once["mix"][1]
    problem = costs.problem(
        value,
        sites,
        choices,
        legal,
        budgets={"bytes": float(budget)},
        tables={"bytes": size},
        fixed=fixed_bytes(0, 0, 0),
    )
    answer = solve.solve(problem, "lp", exact=True)
    chosen = {s.path: choices[k][0] for s, k in zip(sites, np.asarray(answer.choice), strict=True)}
    assert chosen == {s.path: 8 if s.path.startswith("mix") else 4 for s in sites}


@pytest.mark.parametrize("other", [8, None])
def test_a_plan_with_several_widths_for_one_module_is_refused(case, other):
    _, params, sites = case
    plan, table, flags = planned(sites, dict.fromkeys(NAMES, 4))
    plan.w_bits["mix#2"] = other
    plan.a_bits["mix#2"] = other
    with pytest.raises(InputError, match=rf"'mix' and 'mix#2' read the same .* 4 and {other}; "):
        apply.quantize(params, sites, plan, table, flags)
