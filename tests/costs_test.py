"""What the planner counts: bytes of a model that is really built, and BitOPs by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mpqdiff.costs import RESOURCES, check_choices, problem
from mpqdiff.costs.bitops import bitops
from mpqdiff.costs.bytes import device_bytes, file_bytes, fixed_bytes, total
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


def _built(bits, flags, rows=3):
    """(bytes of the built model, params, plan, tensors, table) with random integers."""
    rng = np.random.default_rng(bits)
    tensors, flat = {}, {"norm/scale": np.ones(11, np.float32)}
    for (path, (shape, bias)), flag in zip(LAYERS.items(), flags, strict=True):
        limit = (1 << (bits - 1)) - 1
        qvalue = rng.integers(-limit, limit + 1, (int(np.prod(shape[:-1])), shape[-1]))
        tensors[path] = {"qvalue": qvalue.astype(np.int8), "scale": np.ones(shape[-1], np.float32)}
        flat[f"{path}/kernel"] = np.zeros(shape, np.float32)
        if flag:
            tensors[path]["colsum"] = qvalue.sum(axis=0).astype(np.int32)
        if bias:
            tensors[path]["bias"] = flat[f"{path}/bias"] = np.zeros(shape[-1], np.float32)
    table = Table(jnp.zeros(rows, jnp.int32), jnp.ones((rows, 3)), jnp.zeros((rows, 3), jnp.int8))
    plan = Plan(
        model={"hash": "h"},
        w_bits=dict.fromkeys(LAYERS, bits),
        a_bits=dict.fromkeys(LAYERS, 8),
        mode="step_table",
        groups=(),
        timesteps=(1,),
        system="test",
    )
    params = traverse_util.unflatten_dict(flat, sep="/")
    model = apply.build(None, params, _sites(), plan, tensors, table)
    return model.bytes, params, plan, tensors, table


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("flags", [(False, False, False), (True, False, True), (True,) * 3])
def test_predicted_device_bytes_are_those_of_the_built_model(bits, flags):
    found, params, plan, _, _ = _built(bits, flags)
    fixed = apply.fixed_cost(params, _sites(), rows=3)["bytes"]
    assert total(_sites(), plan.w_bits, flags, fixed, device_bytes) == found


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_predicted_file_bytes_are_the_payload(bits, tmp_path):
    flags = (True, False, True)
    _, params, plan, tensors, table = _built(bits, flags)
    left = apply.float_leaves(params, _sites())
    path = tmp_path / "model.safetensors"
    store.save(path, plan, tensors, left, table)
    data = path.read_bytes()
    payload = len(data) - 8 - int.from_bytes(data[:8], "little")
    fixed = apply.fixed_cost(params, _sites(), rows=3)["file_bytes"]
    assert total(_sites(), plan.w_bits, flags, fixed, file_bytes) == payload


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


def _problem(**changes):
    given = {
        "w_bits": (4, 8),
        "a_bits": 8,
        "budgets": {"bytes": 500.0},
        "fixed": {"bytes": 7.0, "file_bytes": 8.0},
        "asymmetric": [False, True, False],
    }
    sites = changes.pop("sites", _sites())
    return problem(np.arange(6.0).reshape(3, 2), sites, **given | changes)


def test_the_problem_has_each_choice_at_its_cost():
    found = _problem()
    np.testing.assert_array_equal(found.w_bits, [4, 8])
    np.testing.assert_array_equal(found.a_bits, [8, 8])
    assert found.legal.all()
    expected = [
        [device_bytes(site, bits, flag) for bits in (4, 8)]
        for site, flag in zip(_sites(), (False, True, False), strict=True)
    ]
    np.testing.assert_array_equal(found.resources, [expected])
    np.testing.assert_array_equal(found.fixed, [7])
    np.testing.assert_array_equal(found.budgets, [500])
    np.testing.assert_array_equal(found.parameters, [35, 135, 9])
    np.testing.assert_array_equal(found.tie, [0, 1, 2])


def test_a_pin_leaves_one_choice_and_adds_its_width():
    sites = _sites()
    sites[1] = Site(**{**vars(sites[1]), "pin": 6, "tie": sites[0].tie})
    found = _problem(sites=sites)
    np.testing.assert_array_equal(found.w_bits, [4, 6, 8])
    np.testing.assert_array_equal(
        found.legal, [[True, False, True], [False, True, False], [True, False, True]]
    )
    np.testing.assert_array_equal(found.value[:, [0, 2]], np.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(found.tie, [0, 0, 1])


def test_unknown_resources_and_widths_are_refused():
    with pytest.raises(InputError, match=r"'joules'; known: bytes, file_bytes"):
        _problem(budgets={"joules": 1.0})
    assert check_choices([8, 2, 4]) == (2, 4, 8)
    for widths in ((), (4, 4), (1, 4), (4, 9)):
        with pytest.raises(InputError, match="distinct widths within"):
            check_choices(widths)
    assert set(RESOURCES) == {"bytes", "file_bytes"}
