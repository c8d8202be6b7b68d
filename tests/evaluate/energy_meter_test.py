"""Energy: measured by a counter, else modelled, never mixed; NVML through a stand-in."""

import ctypes
import shutil
import subprocess
import time
from types import SimpleNamespace

import pytest

from mpqdiff.costs.energy import PICOJOULES, float_joules, site_joules
from mpqdiff.errors import InputError
from mpqdiff.evaluate import energy_meter
from mpqdiff.evaluate.energy_meter import MEASURED, MODELLED, Counter, Energy, joules_per_image
from mpqdiff.sites import Remainder, Site

GPU = SimpleNamespace(platform="gpu", local_hardware_id=0)
SECOND_GPU = SimpleNamespace(platform="gpu", local_hardware_id=1)


class Nvml:
    """NVML of GPUs 0..2, whose counters advance by 2500 mJ x (number + 1) at every reading."""

    uuids = (b"GPU-a", b"GPU-b", b"GPU-c")

    def __init__(self, **failures):
        self.failures, self.readings = failures, dict.fromkeys(range(3), 0)

    def nvmlInit_v2(self):
        return self.failures.get("init", 0)

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = 100 + index.value
        return 0 if index.value < 3 else 6

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        if uuid not in self.uuids:
            return 6
        handle._obj.value = 100 + self.uuids.index(uuid)
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, value):
        number = handle.value - 100
        self.readings[number] += 1
        value._obj.value = 2500 * (number + 1) * self.readings[number]
        return self.failures.get("energy", 0)


def test_joules_are_the_counters_difference_over_all_images():
    used = {"joules": 1000.0, "runs": 0}

    def run():
        used["joules"] += 6.0
        used["runs"] += 1
        time.sleep(0.005)

    counter = Counter(lambda: used["joules"], "a counter")
    found = joules_per_image(run, images=4, modelled=9.0, counter=counter, seconds=0.05)
    assert found.joules == pytest.approx(1.5)
    assert found.label == MEASURED == "measured"
    assert used["runs"] > 2
    assert found.source.startswith("a counter, over 0.")
    assert f"{used['runs']} runs of 4 images" in found.source


def test_without_a_counter_the_model_speaks_and_says_so():
    def run():
        raise AssertionError("nothing is measured, so nothing need run")

    found = joules_per_image(run, images=4, modelled=0.25, counter=None)
    assert (found.joules, found.label) == (0.25, MODELLED)
    assert MODELLED == "modelled"
    assert "45 nm" in found.source


def test_a_counter_that_stands_still_is_not_a_measurement():
    still = Counter(lambda: 7.0, "still")
    with pytest.warns(UserWarning, match="did not advance"):
        found = joules_per_image(list, images=1, modelled=2.0, counter=still, seconds=0.0)
    assert (found.joules, found.label) == (2.0, MODELLED)
    with pytest.raises(InputError, match="images=0"):
        joules_per_image(list, images=0, modelled=2.0, counter=still)


def test_measured_and_modelled_do_not_compare():
    a, b = Energy(3.0, MEASURED, ""), Energy(2.0, MODELLED, "")
    assert energy_meter.ratio(a, a._replace(joules=2.0)) == 1.5
    with pytest.raises(InputError, match="3 J measured and 2 J modelled"):
        energy_meter.ratio(a, b)


@pytest.mark.parametrize(
    ("visible", "device", "number"),
    [
        (None, GPU, 0),
        (None, SECOND_GPU, 1),
        ("2,1", GPU, 2),
        ("2, 1", SECOND_GPU, 1),
        ("GPU-c,GPU-b", GPU, 2),
    ],
)
def test_the_counter_is_of_the_gpu_that_jax_uses(monkeypatch, visible, device, number):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    counter = energy_meter.find_counter([device], library=Nvml())
    assert counter is not None
    before = counter.read()
    assert counter.read() - before == pytest.approx(2.5 * (number + 1))


def test_the_counter_sums_over_devices(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    counter = energy_meter.find_counter([GPU, SECOND_GPU], library=Nvml())
    assert counter is not None
    assert "2 GPU" in counter.source
    before = counter.read()
    assert counter.read() - before == pytest.approx(2.5 + 5.0)


@pytest.mark.parametrize(
    ("visible", "device", "library"),
    [
        ("", SimpleNamespace(platform="cpu", local_hardware_id=0), Nvml()),
        ("", GPU, Nvml(init=9)),
        ("", GPU, Nvml(energy=3)),  # not supported, as before Volta
        ("", SimpleNamespace(platform="gpu", local_hardware_id=7), Nvml()),
        ("0", SECOND_GPU, Nvml()),
        ("MIG-x", GPU, Nvml()),
        ("", GPU, SimpleNamespace(nvmlInit_v2=lambda: 0)),
    ],
)
def test_devices_without_a_counter(monkeypatch, visible, device, library):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert energy_meter.find_counter([device], library=library) is None


def test_the_cpu_of_this_process_has_none():
    assert energy_meter.find_counter() is None


def test_a_counter_that_fails_later_is_an_error(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    library = Nvml()
    counter = energy_meter.find_counter([GPU], library=library)
    assert counter is not None
    library.failures["energy"] = 15
    with pytest.raises(InputError, match="NVML status 15"):
        counter.read()


LIBRARY = """
static unsigned long long used = 1ull << 40;  /* needs more than 32 bits */
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)(0x7f0000000000ull + index); return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *value) {
    *value = used += (unsigned long long)handle == 0x7f0000000001ull ? 1500 : 0; return 0; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_calls_pass_through_c(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvml.c").write_text(LIBRARY)
    target = tmp_path / "nvml.so"
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "nvml.c", "-o", target], check=True)
    counter = energy_meter.find_counter([SECOND_GPU], library=ctypes.CDLL(str(target)))
    assert counter is not None
    before = counter.read()
    assert before > 1e9
    assert counter.read() - before == pytest.approx(1.5)


SITES = [
    Site("a", "dense", (8, 4), 32, 4, 320, "a"),
    Site("b", "product", (), 0, 0, 1000, "b"),
    Site("c", "dense", (8, 4), 32, 0, 320, "c"),
]


def test_the_model_sums_sites_and_remainder():
    remainder = [Remainder("loose", 5000)]
    found = energy_meter.modelled_joules(
        SITES, remainder, {"a": 4, "b": None, "c": None}, {"a": 8, "b": {"lhs": 4, "rhs": 8}},
        evaluations=20, batch=16,
    )  # fmt: skip
    expected = (
        float_joules(SITES[2:], remainder, batch=16)
        + site_joules(SITES[0], 4, 8, batch=16)
        + site_joules(SITES[1], 8, 8, batch=16)
    )
    assert found == pytest.approx(20 * expected)
    by_hand = 5000 * 4.6 + 320 * 4.6 + 320 * 0.2 + 1000 * 0.3
    by_hand += (32 * 4 + 16 + 4 * 4 + 4 * 4) * PICOJOULES["dram_byte"] / 16
    assert found == pytest.approx(20e-12 * by_hand)


def test_a_product_half_in_float_is_in_float():
    one = SITES[1:2]
    half, whole = ({"b": {"lhs": 8, "rhs": None}}, {"b": None})
    found = [
        energy_meter.modelled_joules(one, [], {}, a_bits, evaluations=1, batch=1)
        for a_bits in (half, whole)
    ]
    assert found[0] == found[1] == pytest.approx(1000 * 4.6e-12)
