"""Measured seconds: what is timed, that it is kept, and that the fit finds what is planted."""

import json
import time

import jax
import numpy as np
import pytest

from mpqdiff.artifacts import digest
from mpqdiff.costs import calibration, latency
from mpqdiff.costs.legality import FLOATS, Convolution, Einsum, Operation, executions
from mpqdiff.errors import InputError
from mpqdiff.quantize.pack import unpack
from mpqdiff.records import FLOAT_BITS

FLOAT = (FLOAT_BITS, FLOAT_BITS)
CHOICES = [(2, 8), (3, 8), (4, 4), (8, 8), FLOAT]
DENSE = Operation("dense", 6, 8, 4, bias=True, asymmetric=True)
ONLINE = Operation("dense", 6, 8, 4, online=True)
PRODUCT = Operation("product", 12, 5, 3, geometry=Einsum("bpk,bqk->bpq", (3, 4, 5), (3, 3, 5)))
CONV = Operation(
    "conv", 18, 36, 8, True, geometry=Convolution((2, 6, 6, 4), (3, 3), 2, "SAME", 1, 1, 1)
)
GROUPED = Operation(
    "conv", 72, 18, 8, geometry=Convolution((2, 6, 6, 4), (3, 3), 1, "SAME", 1, 1, 2)
)
OPERATIONS = [DENSE, ONLINE, PRODUCT, CONV, GROUPED]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "CALL", 1e-4)


@pytest.fixture
def timed(monkeypatch):
    """The operations that were timed, in order; how long each took is invented."""
    found = []

    def invented(operations, rounds):
        found.extend(operations)
        median = 1e-3 * len(found)
        entry = latency.Timing(median, 0.9 * median, 1.2 * median)
        return {one: dict.fromkeys(executions(one), entry) for one in operations}

    monkeypatch.setattr(latency, "time_all", invented)
    return found


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.kind)
def test_what_is_timed_multiplies_in_the_type_it_is_named_for(operation):
    inputs = latency.example_inputs(operation)
    first = jax.tree.map(lambda a: a[0], inputs)
    types = {"float32": "f32", "bf16": "bf16"}
    for name in executions(operation):
        step, held = latency.program(operation, name)
        text = str(jax.make_jaxpr(step)(first, held))
        lines = [
            line for line in text.splitlines() if "dot_general[" in line or "conv_general" in line
        ]
        assert lines  # one, or the rows of a kernel, or a column sum beside it
        out = jax.eval_shape(step, first, held)
        assert out.dtype == "float32"
        assert out.size == operation.rows * operation.outputs
        kind = "i32" if name.startswith("int") else types[name]
        assert all(f":{kind}[" in line for line in lines)


def test_the_loop_needs_every_output_of_every_input():
    step, held = latency.program(CONV, "int4")
    inputs = latency.example_inputs(CONV)
    assert len(inputs["scale"]) == latency.INPUTS
    mean = 0.0
    for index in range(6):
        at = jax.tree.map(lambda a, i=index: a[i % latency.INPUTS], inputs)
        mean = 0.5 * mean + np.asarray(step(at, held))
    found = jax.jit(latency._loop, static_argnums=0)(step, 6, inputs, held)
    np.testing.assert_allclose(found, mean, rtol=1e-4, atol=1e-5)


def test_integer_forms_agree_with_the_weights_they_hold():
    """The same weights in every container: `program` must pack what the product unpacks."""
    first = jax.tree.map(lambda a: a[2], latency.example_inputs(DENSE))
    assert first["zero"][0] > 0
    for name, bits in {"int8": 8, "int4": 4, "int2": 2}.items():
        step, held = latency.program(DENSE, name)
        qvalue = np.asarray(unpack(held["qvalue"], bits, (8, 4)), np.float64)
        scale, zero = float(first["scale"][0]), float(first["zero"][0])
        x = np.asarray(first["args"][0], np.float64)
        x = scale * (np.clip(np.rint(x / scale) + zero, -128, 127) - zero)
        expected = x @ qvalue * 0.01 + np.asarray(held["bias"])
        np.testing.assert_allclose(step(first, held), expected, rtol=1e-4, atol=1e-4)


def test_a_real_measurement():
    found = latency.time_all([DENSE, GROUPED], rounds=3)
    assert list(found) == [DENSE, GROUPED]
    for operation, entries in found.items():
        assert tuple(entries) == executions(operation)
        assert all(0 < entry.low <= entry.median <= entry.high < 1 for entry in entries.values())


def test_measurements_are_made_once_and_kept(timed):
    first = latency.measure([DENSE, DENSE, PRODUCT])
    assert timed == [DENSE, PRODUCT]
    assert tuple(first.seconds[PRODUCT]) == executions(PRODUCT)
    again = latency.measure([PRODUCT, DENSE])
    assert timed == [DENSE, PRODUCT]
    assert again.seconds == first.seconds and again.digest == first.digest
    more = latency.measure([ONLINE, DENSE])
    assert timed == [DENSE, PRODUCT, ONLINE]
    assert more.seconds[DENSE] == first.seconds[DENSE]
    (file,) = latency.cache_folder().glob("*.json")
    assert file.stem == digest(latency.device())
    stored = json.loads(file.read_text())
    assert stored["device"] == latency.device() and len(stored["entries"]) == 3


def test_the_digest_is_of_the_entries_used_and_their_device(timed):
    del timed
    both = latency.measure([DENSE, PRODUCT])
    one = latency.measure([DENSE])
    assert one.digest != both.digest
    assert one.digest != one._replace(device=one.device | {"cpus": -1}).digest
    slower = {
        name: entry._replace(median=2 * entry.median) for name, entry in one.seconds[DENSE].items()
    }
    assert one.digest != one._replace(seconds={DENSE: slower}).digest


def test_another_device_has_a_file_of_its_own(timed, monkeypatch):
    latency.measure([DENSE])
    other = latency.device() | {"jax": "0.0"}
    monkeypatch.setattr(latency, "device", lambda: other)
    latency.measure([DENSE])
    assert timed == [DENSE, DENSE]
    assert len(list(latency.cache_folder().glob("*.json"))) == 2


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"entries": {"a": {"float32": [1]}}}', '{"entries": {"a": {}}}']
)
def test_a_damaged_cache_is_refused(text, timed):
    del timed
    folder = latency.cache_folder()
    folder.mkdir(parents=True)
    (folder / f"{digest(latency.device())}.json").write_text(text)
    with pytest.raises(InputError, match="delete it and run again"):
        latency.measure([DENSE])


def test_a_cache_that_cannot_be_written_is_an_input_error(tmp_path, timed):
    del timed
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        latency.measure([DENSE], folder=tmp_path / "file" / "below")


def _timings(*seconds):
    names = (*FLOATS, "int8", "int4", "int2")[: len(seconds)]
    return {name: latency.Timing(s, s, s) for name, s in zip(names, seconds, strict=True)}


def test_the_table_has_each_site_at_each_choice():
    found = latency.Latencies(
        {}, {DENSE: _timings(5, 4, 3, 2, 1), PRODUCT: _timings(9, 8, 7), GROUPED: _timings(6, 6)}
    )
    operations = {"a": DENSE, "b": PRODUCT, "c": DENSE, "d": GROUPED}
    row, none = [1, 2, 2, 3, 5], [np.inf] * 4
    expected = [row, [7, 7, 7, 7, 9], row, [*none, 6]]
    np.testing.assert_array_equal(latency.table(found, operations, CHOICES), expected)


def test_random_plans_go_from_float_to_integers_and_stay_legal():
    legal = np.ones((20, 5), bool)
    legal[3] = [False, False, False, True, False]  # a pin
    legal[4, 4] = False
    legal[5, :4] = False
    plans = calibration.random_plans(7, legal, CHOICES, 40)
    assert plans.shape == (40, 20) and plans.dtype == np.int32
    assert legal[np.arange(20), plans].all()
    free = np.delete(plans, [3, 4, 5], axis=1)
    share = (free != 4).mean(axis=1)
    np.testing.assert_allclose(share, np.linspace(0, 1, 40), atol=0.2)
    assert share[0] == 0 and share[-1] == 1
    assert set(free[-1]) == {0, 1, 2, 3}
    np.testing.assert_array_equal(plans, calibration.random_plans(7, legal, CHOICES, 40))
    assert (plans != calibration.random_plans(8, legal, CHOICES, 40)).any()


def test_tied_sites_choose_alike():
    legal = np.ones((6, 5), bool)
    legal[2, :3] = False
    plans = calibration.random_plans(0, legal, CHOICES, 30, ties=[0, 1, 0, 2, 1, 3])
    np.testing.assert_array_equal(plans[:, 0], plans[:, 2])
    np.testing.assert_array_equal(plans[:, 1], plans[:, 4])
    assert set(plans[:, 0]) == {3, 4}


def test_the_fit_finds_what_is_planted():
    rng = np.random.default_rng(0)
    sums = np.linspace(1.0, 2.0, 20)
    exact = 0.3 + 0.8 * sums
    found = calibration.fit(sums, exact)
    assert (found.alpha, found.beta, found.r2) == pytest.approx((0.3, 0.8, 1.0))
    noisy = exact * (1 + 0.02 * rng.standard_normal(20))
    noisy[[1, 2]] *= 2.5  # something else ran
    found = calibration.fit(sums, noisy)
    assert found.alpha + found.beta * 1.5 == pytest.approx(1.5, rel=0.02)
    assert found.beta == pytest.approx(0.8, rel=0.1)
    held = np.array([1.1, 1.9])
    assert calibration.errors(found, held, 0.3 + 0.8 * held).max() < 0.03
    np.testing.assert_allclose(
        calibration.errors(calibration.Fit(0, 1, 1), [1, 2], [2, 1]), [0.5, 1]
    )


def test_time_outside_the_sites_is_not_negative():
    sums = np.linspace(1.0, 2.0, 10)
    found = calibration.fit(sums, sums**2)
    assert found.alpha == 0
    # least squares of 1 - beta / s, that is beta = sum(1/s) / sum(1/s^2) but for the damping
    assert found.beta == pytest.approx((1 / sums).sum() / (1 / sums**2).sum(), rel=0.05)


@pytest.mark.parametrize(
    ("sums", "measured"),
    [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [1, 0, 3]), ([1, 2, 3], [1, np.nan, 3])],
)
def test_plans_that_cannot_be_fitted_are_refused(sums, measured):
    with pytest.raises(InputError, match="at least three plans of different sums"):
        calibration.fit(sums, measured)


def test_a_table_that_points_the_wrong_way_is_refused():
    with pytest.raises(InputError, match="does not predict"):
        calibration.fit([1, 2, 3, 4], [4, 3, 2, 1])


@pytest.fixture
def clock(monkeypatch):
    """A clock that only runners advance."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_rounds_are_interleaved_after_a_warm_up(clock):
    order = []

    def runner(name, seconds):
        def run():
            clock[0] += seconds * (100 if len(order) < 2 else 1)
            order.append(name)

        return run

    taken = latency.time_plans([runner("a", 1.0), runner("b", 2.0)], 3)
    assert order == ["a", "b"] * 4
    np.testing.assert_allclose(taken, [[1.0] * 3, [2.0] * 3])


def test_a_slow_round_is_slow_for_all_and_does_not_count():
    own = np.array([1.0, 2.0, 3.0, 4.0, 10.0])
    machine = np.array([1.0, 1.0, 1.0, 5.0, 2.0, 1.0, 3.0])
    noise = np.random.default_rng(0).uniform(0.99, 1.01, (5, 7))
    found = latency.steady(own[:, None] * machine * noise)
    np.testing.assert_allclose(found, np.broadcast_to(own[:, None], (5, 7)), rtol=0.03)


def test_calibration_fits_some_plans_and_is_judged_on_others(clock):
    seconds = np.array([[1.0, 1.0, 1.0, 2.0, 4.0]] * 8)
    legal = np.ones((8, 5), bool)
    plans, held_out = (calibration.random_plans(seed, legal, CHOICES, 12) for seed in (0, 1))
    noise = np.random.default_rng(0)
    compiled = []

    def runner(choice):
        compiled.append(choice)
        own = 5 * (3.0 + 0.5 * seconds[np.arange(8), choice].sum())

        def run():  # something else runs half of the time, for a few rounds each time
            busy = clock[0] % 9000 > 4500
            clock[0] += own * (1 + 0.01 * noise.random()) * (1 + busy)

        return run

    found = calibration.calibrate(runner, seconds, plans, held_out, evaluations=5, rounds=9)
    assert len(compiled) == 24
    assert (found.fit.alpha, found.fit.beta) == pytest.approx((3.0, 0.5), rel=0.03)
    assert found.fit.r2 > 0.99
    assert found.errors.shape == (12,) and found.errors.max() < 0.02
    np.testing.assert_allclose(found.held_sums, seconds[np.arange(8), held_out].sum(axis=1))


def test_a_width_takes_the_quickest_of_what_multiplies_it():
    entry = {
        name: latency.Timing(seconds, seconds, seconds)
        for name, seconds in {"float32": 5.0, "bf16": 4.0, "int8": 2.0, "int8@pallas_tpu": 3.0,
                              "int4": 2.0, "int4@pallas_tpu": 1.0, "int2": 9.0}.items()
    }  # fmt: skip
    assert latency.fastest(entry, "int8") == ("kernels", 2.0)
    assert latency.fastest(entry, "int4") == ("pallas_tpu", 1.0)
    assert latency.fastest(entry, "int3") == ("kernels", np.inf)
    found = latency.table(latency.Latencies({}, {DENSE: entry}), {"a": DENSE}, CHOICES)
    np.testing.assert_array_equal(found, [[9.0, 1.0, 1.0, 2.0, 5.0]])


def test_what_a_device_has_beside_xla_is_timed_with_packed_weights(monkeypatch):
    assert latency.ways(DENSE) == executions(DENSE)  # a CPU has nothing beside it
    monkeypatch.setattr(latency, "ALTERNATIVES", {"cpu": ("pallas_interpret",)})
    added = tuple(f"int{bits}@pallas_interpret" for bits in (8, 4, 2))
    assert latency.ways(DENSE) == (*executions(DENSE), *added)
    assert latency.ways(PRODUCT) == executions(PRODUCT)
    at = jax.tree.map(lambda a: a[0], latency.example_inputs(DENSE))
    for name in added:
        step, held = latency.program(DENSE, name)
        assert "pallas_call" in str(jax.make_jaxpr(step)(at, held))
        plain, same = latency.program(DENSE, name.partition("@")[0])
        np.testing.assert_allclose(step(at, held), plain(at, same), rtol=1e-5, atol=1e-5)
