"""Latency, memory, ceilings and BitOPs: what is timed, what is counted, and by whom it agrees."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.costs.bitops import bitops
from mpqdiff.errors import InputError
from mpqdiff.evaluate import efficiency
from mpqdiff.evaluate.efficiency import Ceiling, Latency
from mpqdiff.sites import Remainder, Site

SITES = [
    Site("a", "dense", (8, 4), 32, 4, 320, "a"),  # 10 positions of 4 outputs
    Site("b", "dense", (8, 4), 32, 0, 320, "b"),
    Site("attention", "product", (), 0, 0, 1000, "attention"),
    Site("kept", "dense", (2, 3), 6, 0, 60, "kept"),
]
REMAINDER = [Remainder("loose", 500)]
W_BITS = {"a": 4, "b": 3, "attention": None, "kept": None}
A_BITS = {"a": 8, "b": 6, "attention": {"lhs": 8, "rhs": 4}, "kept": None}


def terms(asymmetric=("b",), evaluations=1, a_bits=None):
    return efficiency.bitops_terms(
        SITES, REMAINDER, W_BITS, a_bits or A_BITS, asymmetric=asymmetric, evaluations=evaluations
    )


def test_bitops_by_hand():
    found = terms(evaluations=40)
    expected = {
        "weights": 320 * 4 * 8 + 320 * 3 * 6,
        "attention": 1000 * 8 * 4,
        "zero_points": 10 * 4 * 8 * 32,
        "float": (60 + 500) * 32 * 32,
    }
    executed = (320 + 320 + 1000) * 64 + expected["zero_points"] + expected["float"]
    expected |= {"total": sum(expected.values()), "executed": executed}
    assert found == {name: 40.0 * value for name, value in expected.items()}


@pytest.mark.parametrize(
    "attention", [None, {"lhs": 8, "rhs": 4}, {"lhs": None, "rhs": 8}, {"lhs": 8, "rhs": 8}]
)
def test_bitops_agree_with_the_plans_own_count_but_for_zero_points(attention):
    a_bits = A_BITS | {"attention": attention}
    found = terms(evaluations=20, a_bits=a_bits)
    assert found["total"] - found["zero_points"] == bitops(SITES, REMAINDER, W_BITS, a_bits, 20)
    assert terms((), 20, a_bits)["zero_points"] == 0


def test_a_weight_in_integers_under_a_float_activation():
    found = efficiency.bitops_terms(
        SITES[:1], [], {"a": 4}, {"a": None}, asymmetric=["a"], evaluations=1
    )
    assert found["float"] == found["total"] == bitops(SITES[:1], [], {"a": 4}, {"a": None}, 1)


def test_text_states_shares_and_every_assumption():
    text = efficiency.bitops_text(terms())
    lines = text.splitlines()
    total = terms()["total"]
    assert lines[0].startswith(f"{total:.4g} BitOPs per image (weights {16000 / total:.1%}, atte")
    assert lines[1] == f"{terms()['executed']:.4g} as executed"
    assert tuple(lines[2:]) == efficiency.ASSUMPTIONS


def test_macs_by_type_close():
    found = efficiency.macs_by_type(SITES, REMAINDER, SITES[:2], evaluations=10)
    assert found == {"int8": 6400.0, "float32": 10.0 * (1000 + 60 + 500)}


def test_fraction_of_peak_adds_the_times_of_both_types():
    ceilings = {"int8": Ceiling("int8", 4e9, 512), "float32": Ceiling("float32", 1e9, 512)}
    macs = {"int8": 2e9, "float32": 1e9}
    assert efficiency.fraction_of_peak(macs, 3.0, ceilings) == pytest.approx(0.5)
    only = {"int8": 8e9, "float32": 0.0}
    assert efficiency.fraction_of_peak(only, 2.0, {"int8": ceilings["int8"]}) == pytest.approx(1.0)
    with pytest.raises(InputError, match="got 0 seconds"):
        efficiency.fraction_of_peak(macs, 0, ceilings)


@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_ceilings_are_measured_once_and_no_product_beats_them(monkeypatch, kind):
    monkeypatch.setattr(efficiency, "SIZES", (64, 256))
    efficiency.ceiling.cache_clear()
    found = efficiency.ceiling(kind)
    assert found.kind == kind
    assert found.size in (64, 256)
    assert 1e6 < found.macs_per_second < 1e16
    assert efficiency.ceiling(kind) is found
    x = jnp.ones((256, 256), kind)
    product = jax.jit(efficiency.PRODUCTS[kind])
    product(x, x).block_until_ready()
    start = time.perf_counter()
    product(x, x).block_until_ready()
    share = efficiency.fraction_of_peak({kind: 256.0**3}, time.perf_counter() - start)
    assert 0.0 < share < 10.0  # a noisy machine may be faster now, not by an order of magnitude
    efficiency.ceiling.cache_clear()


def test_an_integer_ceiling_is_of_int8_products_in_int32():
    x = jnp.full((64, 64), 127, jnp.int8)
    found = efficiency.PRODUCTS["int8"](x, x)
    assert found.dtype == jnp.int32
    assert int(found[0, 0]) == 64 * 127 * 127


def test_an_unknown_operand_type():
    with pytest.raises(InputError, match="unknown operand type 'fp8'; known: float32, int8"):
        efficiency.ceiling("fp8")


def test_latency_is_per_image_and_waits_for_the_device():
    order = []

    class Pending:
        """What a call returns at once; the result takes until it is waited for."""

        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds

        def block_until_ready(self):
            order.append(self.name)
            time.sleep(self.seconds)
            return self

    calls = {
        "slow": {1: lambda: Pending("slow1", 0.01), 4: lambda: Pending("slow4", 0.02)},
        "fast": {1: lambda: Pending("fast1", 0.001)},
    }
    found = efficiency.latencies(calls, rounds=6)
    assert order == ["slow1", "slow4", "fast1"] * 7  # in turn, and a first round beside the six
    assert {arm: list(batches) for arm, batches in found.items()} == {"slow": [1, 4], "fast": [1]}
    single, several = found["slow"][1], found["slow"][4]
    assert 10.0 <= single.low <= single.median <= single.high
    assert 5.0 <= several.median < 18.0
    assert found["fast"][1].median < single.median
    assert several.images_per_second == pytest.approx(1e3 / several.median)


def test_latency_as_json():
    assert Latency(4, 2.0, 1.5, 3.0, 9).to_json() == {
        "batch": 4, "median": 2.0, "low": 1.5, "high": 3.0, "n": 9, "iqr": 1.5,
    }  # fmt: skip


@pytest.mark.parametrize(("batch", "rounds"), [(0, 3), (1, 1)])
def test_latency_refuses_counts_that_say_nothing(batch, rounds):
    with pytest.raises(InputError, match="expected at least 2 rounds"):
        efficiency.latencies({"arm": {batch: list}}, rounds=rounds)


def test_peak_memory_of_a_compiled_call():
    x = jax.ShapeDtypeStruct((300, 300), jnp.float32)
    compiled = jax.jit(lambda x: (x @ x).sum(0)).lower(x).compile()
    found = efficiency.peak_memory(compiled)
    assert found["executable"] is not None
    assert found["executable"] >= 4 * (300 * 300 + 300)
    assert found["executable"] < 4 * 300 * 300 * 10
    counted = jax.local_devices()[0].memory_stats()
    assert (found["device"] is None) == (not counted)
    assert np.isfinite(found["executable"])
