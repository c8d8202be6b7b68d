"""What the planner counts: bytes of a model that is really built, and BitOPs by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mpqdiff.costs import FLOAT, RESOURCES, legal_choices, list_choices, problem, table
from mpqdiff.costs.bitops import bitops, site_bitops
from mpqdiff.costs.bytes import device_bytes, file_bytes, fixed_bytes
from mpqdiff.errors import InputError
from mpqdiff.plan import Plan
from mpqdiff.quantize import apply, store
from mpqdiff.quantize.activations import Table
from mpqdiff.sites import Remainder, Site

# path -> (kernel shape, has a bias): odd sizes leave planes and bytes unfilled.
LAYERS = {"a": ((7, 5), True), "b/c": ((3, 3, 3, 5), False), "d": ((1, 9), True)}


def _sites():
    return [
        Site(path, "conv" if len(shape) > 2 else "dense", shape, int(np.prod(shape)),
             shape[-1] if bias else 0, 10, path)
        for path, (shape, bias) in LAYERS.items()
    ]  # fmt: skip


def _built(widths, flags, rows=3):
    """(bytes of the built model, params, plan, tensors, table) with random integers.

    A width of None leaves its site in float.
    """
    rng = np.random.default_rng(len(widths))
    tensors, flat = {}, {"norm/scale": np.ones(11, np.float32)}
    bits_of = dict(zip(LAYERS, widths, strict=True))
    for (path, (shape, bias)), flag in zip(LAYERS.items(), flags, strict=True):
        flat[f"{path}/kernel"] = np.zeros(shape, np.float32)
        if bias:
            flat[f"{path}/bias"] = np.zeros(shape[-1], np.float32)
        if bits_of[path] is None:
            continue
        limit = (1 << (bits_of[path] - 1)) - 1
        qvalue = rng.integers(-limit, limit + 1, (int(np.prod(shape[:-1])), shape[-1]))
        tensors[path] = {"qvalue": qvalue.astype(np.int8), "scale": np.ones(shape[-1], np.float32)}
        if flag:
            tensors[path]["colsum"] = qvalue.sum(axis=0).astype(np.int32)
        if bias:
            tensors[path]["bias"] = flat[f"{path}/bias"]
    steps = Table(jnp.zeros(rows, jnp.int32), jnp.ones((rows, 3)), jnp.zeros((rows, 3), jnp.int8))
    plan = Plan(
        model={"hash": "h"},
        w_bits=bits_of,
        a_bits={path: bits and 8 for path, bits in bits_of.items()},
        mode="step_table",
        groups=(),
        timesteps=(1,),
        system="test",
    )
    params = traverse_util.unflatten_dict(flat, sep="/")
    model = apply.build(None, params, _sites(), plan, tensors, steps)
    return model.bytes, params, plan, tensors, steps


def _total(resource, plan, flags, fixed):
    costs = (
        resource(site, plan.w_bits[site.path] or FLOAT[0], flag)
        for site, flag in zip(_sites(), flags, strict=True)
    )
    return sum(costs) + fixed


WIDTHS = [*((bits,) * 3 for bits in (2, 3, 4, 6, 8)), (4, None, 2), (None, 8, None)]


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("flags", [(False, False, False), (True, False, True), (True,) * 3])
def test_predicted_device_bytes_are_those_of_the_built_model(widths, flags):
    found, params, plan, _, _ = _built(widths, flags)
    fixed = apply.fixed_cost(params, _sites(), rows=3)["bytes"]
    assert _total(device_bytes, plan, flags, fixed) == found


@pytest.mark.parametrize("widths", WIDTHS)
def test_predicted_file_bytes_are_the_payload(widths, tmp_path):
    flags = (True, False, True)
    _, params, plan, tensors, steps = _built(widths, flags)
    left = apply.float_leaves(params, plan.integer(_sites()))
    path = tmp_path / "model.safetensors"
    store.save(path, plan, tensors, left, steps)
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    fixed = apply.fixed_cost(params, _sites(), rows=3)["file_bytes"]
    assert _total(file_bytes, plan, flags, fixed) == len(data) - 8 - header
    # The bound on the header is told before the widths are known.
    draft, _ = _built((8, 8, 8), flags)[2:4]
    bare = apply.float_leaves(params, _sites())
    assert 8 + header <= store.header_bytes(draft, _sites(), bare)


def test_bytes_by_hand():
    site = Site("a", "dense", (7, 5), 35, 5, 35, "a")
    # 4 bit: ceil(7 / 2) rows of 5 bytes, 5 scales, 5 biases; 3 bit takes the same on the device.
    assert device_bytes(site, 4, False) == device_bytes(site, 3, False) == 20 + 20 + 20
    assert device_bytes(site, 4, True) == 20 + 20 + 20 + 20
    assert device_bytes(site, 2, False) == 10 + 40
    assert device_bytes(site, 8, False) == device_bytes(site, 5, False) == 35 + 40
    assert file_bytes(site, 3, True) == 14 + 40
    assert file_bytes(site, 8, True) == 35 + 40
    product = Site("p", "product", (), 0, 0, 99, "p")
    assert device_bytes(product, 8, False) == file_bytes(product, 8, False) == 0
    assert device_bytes(site, 32, True) == file_bytes(site, 32, True) == 4 * (35 + 5)
    assert fixed_bytes(100, 3, 4) == {"bytes": 100 + 60 + 12, "file_bytes": 172}


def test_bitops_by_hand():
    sites = [
        Site("a", "dense", (4, 4), 16, 4, 100, "a"),
        Site("b", "dense", (4, 4), 16, 4, 10, "b"),
        Site("qk", "product", (), 0, 0, 7, "qk"),
        Site("pv", "product", (), 0, 0, 3, "pv"),
    ]
    remainder = [Remainder("elsewhere", 2)]
    w_bits = {"a": 4, "b": None, "qk": None, "pv": None}
    a_bits = {"a": 8, "b": None, "qk": {"lhs": 8, "rhs": 4}, "pv": {"lhs": None, "rhs": None}}
    per_step = 100 * 4 * 8 + 10 * 1024 + 7 * 8 * 4 + 3 * 1024 + 2 * 1024
    assert bitops(sites, remainder, w_bits, a_bits, 5) == 5 * per_step
    floats = 1024 * (100 + 10 + 7 + 3 + 2)
    assert bitops(sites, remainder, dict.fromkeys(w_bits), {}, 1) == floats
    assert site_bitops(sites[0], 4, 8) == 100 * 4 * 8
    assert site_bitops(sites[2], 8, 4) == 7 * 4 * 4  # no weights: both operands are activations


def _problem(offered=((4, 8), (8, 8)), budgets=None, sites=None, flags=(False, True, False)):
    sites = sites or _sites()
    budgets = budgets or {"bytes": 500.0}
    choices, legal = legal_choices(sites, offered)
    names = [name for name in RESOURCES if name != "seconds"]
    tables = {
        name: table(name, sites, choices, asymmetric=flags, evaluations=10, batch=1, measured={})
        for name in names
    }
    fixed = dict.fromkeys(names, 7.0)
    value = np.arange(len(sites) * len(choices), dtype=float).reshape(len(sites), -1)
    return problem(value, sites, choices, legal, budgets=budgets, tables=tables, fixed=fixed)


def test_the_problem_has_each_choice_at_its_cost():
    found = _problem()
    np.testing.assert_array_equal(found.w_bits, [4, 8])
    np.testing.assert_array_equal(found.a_bits, [8, 8])
    assert found.legal.all() and found.names == ("bytes",)
    expected = [
        [device_bytes(site, bits, flag) for bits in (4, 8)]
        for site, flag in zip(_sites(), (False, True, False), strict=True)
    ]
    np.testing.assert_array_equal(found.resources, [expected])
    np.testing.assert_array_equal(found.fixed, [7])
    np.testing.assert_array_equal(found.budgets, [500])
    np.testing.assert_array_equal(found.parameters, [35, 135, 9])
    np.testing.assert_array_equal(found.tie, [0, 1, 2])


def test_several_budgets_are_rows_in_their_order():
    offered = list_choices((4, 8), (4, 8), keep_float=True)
    found = _problem(offered, {"bitops": 1e9, "mean_bits": 5.0})
    assert found.names == ("bitops", "mean_bits")
    np.testing.assert_array_equal(found.w_bits, [4, 4, 8, 8, 32])
    np.testing.assert_array_equal(found.a_bits, [4, 8, 4, 8, 32])
    np.testing.assert_array_equal(
        found.resources[0, 0], [10 * 10 * b for b in (16, 32, 32, 64, 1024)]
    )
    np.testing.assert_allclose(found.resources[1].sum(axis=0), [4, 4, 8, 8, 32])


def test_a_pin_may_hold_a_site_in_float():
    sites = _sites()
    sites[1] = Site(**{**vars(sites[1]), "pin": 32, "tie": sites[0].tie})
    choices, legal = legal_choices(sites, list_choices((4, 8), (8,)))
    assert choices == [(4, 8), (8, 8), (32, 32)]
    np.testing.assert_array_equal(
        legal, [[True, True, False], [False, False, True], [True, True, False]]
    )
    found = _problem(sites=sites, budgets={"file_bytes": 1e9})
    assert found.resources[0, 1, -1] >= 4 * sites[1].parameters


def test_a_pin_leaves_one_choice_and_adds_its_width():
    sites = _sites()
    sites[1] = Site(**{**vars(sites[1]), "pin": 6, "tie": sites[0].tie})
    found = _problem(sites=sites, budgets={"mean_bits": 4.0})
    np.testing.assert_array_equal(found.w_bits, [4, 6, 8])
    np.testing.assert_array_equal(
        found.legal, [[True, False, True], [False, True, False], [True, False, True]]
    )
    assert not found.value[~np.asarray(found.legal)].any()
    np.testing.assert_array_equal(found.tie, [0, 0, 1])
    # The mean is over unpinned weights: 35 and 9.
    np.testing.assert_allclose(found.resources[0].sum(axis=0), [4, 6, 8])
    assert not found.resources[0, 1].any()


def test_a_product_chooses_among_activations_only():
    product = Site("p", "product", (), 0, 0, 99, "p")
    choices, legal = legal_choices([product], list_choices((4, 8), (4, 8), keep_float=True))
    assert [pair for pair, ok in zip(choices, legal[0], strict=True) if ok] == [
        (8, 4),
        (8, 8),
        FLOAT,
    ]


def test_unknown_resources_and_widths_are_refused():
    known = ", ".join(sorted(RESOURCES))
    with pytest.raises(InputError, match=f"'watts'; known: {known}"):
        _problem(budgets={"watts": 1.0})
    with pytest.raises(InputError, match="no budget given"):
        problem(np.zeros((1, 1)), _sites()[:1], [(8, 8)], [[True]], budgets={}, tables={}, fixed={})
    assert list_choices([8, 2, 4], [8]) == ((2, 8), (4, 8), (8, 8))
    for widths in ((), (4, 4), (1, 4), (4, 9)):
        with pytest.raises(InputError, match=r"w_bits.*distinct widths within"):
            list_choices(widths, (8,))
        with pytest.raises(InputError, match=r"a_bits.*distinct widths within"):
            list_choices((8,), widths)
