"""One small run from config to report: its files, its repetition, and its end after SIGKILLs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpqdiff import plan as plans
from mpqdiff import sites as site_list
from mpqdiff.config import base, smoke
from mpqdiff.costs.bytes import device_bytes
from mpqdiff.denoiser import from_linen
from mpqdiff.pipeline import load_model

ROOT = Path(__file__).parents[1]
ARGUMENTS = (
    "--config=configs/quickstart.py:smoke",
    "--config.model.kwargs.depth=1",
    "--config.calibration.memory_gb=1e-4",  # a timestep per chunk
    "--config.evaluate.timing_rounds=1",
)
TIMINGS = ("ms_per_image", "speedup", "speedup_same_steps", "fraction_of_peak")
ARM_KEYS = {
    "arm", "system", "avg_w_bits", "bytes", "file_bytes", "compression", "bitops", "steps",
    "ms_per_image", "speedup", "speedup_same_steps", "peak_bytes", "resident_bytes", "energy_j",
    "execution", "backend", "fid", "fid_ci", "delta_fid", "damage", "kid", "kid_ci", "sfid", "is",
    "precision", "recall", "psnr", "psnr_ci", "ssim", "x0_mse", "n_images", "seed",
    "bitops_terms", "ms_per_image_batch_1", "fraction_of_peak", "energy_label", "energy_source",
    "predicted_ms", "predicted_speedup",
}  # fmt: skip
ARMS = ["float", "plan", "plan_aqt", "random_0", "size_only", "uniform", "w8a8"]


def _command(workdir: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "mpqdiff.cli", "run", f"--workdir={workdir}", *arguments]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(workdir, *arguments, kill=None)`: the finished process, in a session-wide cache."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path_factory.getbasetemp() / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(workdir, *arguments, kill=None):
        given = environment | ({"MPQDIFF_KILL_AFTER": kill} if kill else {})
        return subprocess.run(
            _command(workdir, *arguments), cwd=ROOT, env=given, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "work"
    done = run(workdir, *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert "speed-up" in done.stdout
    return workdir


def _results(workdir: Path) -> dict:
    return json.loads((workdir / "results.json").read_text())


def _untimed(workdir: Path) -> dict:
    results = _results(workdir)
    for arm in results["arms"]:
        for key in TIMINGS:
            del arm[key]
    return results


def test_results_have_the_arms_and_keys_of_the_contract(whole):
    results = _results(whole)
    assert results["schema"] == 1
    assert results["protocol"]["publish"] is False
    assert [arm["arm"] for arm in results["arms"]] == ARMS
    for arm in results["arms"]:
        assert set(arm) >= ARM_KEYS
        assert set(arm["ms_per_image"]) == {"median", "iqr", "n", "batch"}
        assert arm["ms_per_image"]["median"] > 0
        assert arm["execution"] == ("float" if arm["arm"] == "float" else "integer")
        assert arm["n_images"] == 8
        assert arm["steps"] == 4
        assert arm["fid"] is None  # random weights publish no metric
    by_name = {arm["arm"]: arm for arm in results["arms"]}
    assert by_name["plan_aqt"]["backend"] == "aqt"
    assert by_name["plan"]["backend"] == "kernels"
    assert by_name["float"]["speedup"] == 1.0
    assert by_name["float"]["avg_w_bits"] == 32
    embedded = 11 * 16 / 10_160  # the share of the label embedding, which stays in float
    assert by_name["w8a8"]["avg_w_bits"] == pytest.approx(8 + 24 * embedded, rel=1e-3)
    assert by_name["plan"]["compression"] > 1.5
    assert by_name["plan"]["bitops"] < by_name["w8a8"]["bitops"] < by_name["float"]["bitops"]


def test_no_arm_is_above_the_budget_and_controls_come_near_it(whole):
    config = smoke(base())
    config.model.kwargs.depth = 1
    module, params, _ = load_model(config)
    example = site_list.example_inputs((28, 28, 1))
    every, _ = site_list.list_sites(from_linen(module), params, *example)
    free = [s for s in site_list.planned(site_list.pin(every, config.plan.pins)) if not s.pin]
    step = max(device_bytes(s, 8, False) - device_bytes(s, 4, False) for s in free)
    plan = plans.load(whole / "plan.json")
    plans.validate(plan, site_list.pin(every, config.plan.pins), plan.model["hash"])
    budget = plan.budgets["bytes"]
    arms = {arm["arm"]: arm["bytes"] for arm in _results(whole)["arms"]}
    assert arms["plan"] == plan.predicted["bytes"]
    for name in ("plan", "uniform", "random_0", "size_only"):
        assert budget - step < arms[name] <= budget
    assert arms["float"] > 3 * arms["plan"]


def test_the_other_files_are_there(whole):
    assert {path.stem for path in (whole / "samples").glob("*.png")} == set(ARMS)
    report = (whole / "report.html").read_text()
    assert report.lstrip().lower().startswith("<!doctype html")
    assert all(name in report for name in ARMS)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert "--config.model.kwargs.depth=1" in manifest["command"]
    assert set(manifest) >= {"command", "environment", "source", "model_hash", "plans",
                             "artifacts", "stages"}  # fmt: skip
    assert set(manifest["plans"]) == set(ARMS) - {"float"}
    assert not list(whole.rglob("*.partial*"))


def test_a_second_run_computes_nothing_and_gives_the_same(run, whole):
    before = _untimed(whole), (whole / "plan.json").read_bytes()
    written = {p: p.stat().st_mtime_ns for p in (whole / "artifacts").rglob("*") if p.is_file()}
    done = run(whole)  # the stored config
    assert done.returncode == 0, done.stderr
    manifest = json.loads((whole / "manifest.json").read_text())
    assert all(entry["cached"] for entry in manifest["artifacts"])
    assert manifest["runs"] == 2
    after = {p: p.stat().st_mtime_ns for p in (whole / "artifacts").rglob("*") if p.is_file()}
    assert after == written
    assert (_untimed(whole), (whole / "plan.json").read_bytes()) == before


def _chunk(workdir: Path, stage: str) -> Path:
    """The only finished chunk of a killed stage."""
    (path,) = workdir.glob(f"artifacts/{stage}/*.partial/{stage}_*.npz")
    return path


def test_a_run_killed_in_every_stage_continues_to_the_same_results(run, whole, tmp_path):
    workdir = tmp_path / "work"
    kept = {}
    for stage in ("calibrate", "record", "sample"):
        done = run(workdir, *ARGUMENTS, kill=stage)
        assert done.returncode == -9, done.stderr
        assert not (workdir / "results.json").exists()
        path = _chunk(workdir, stage)
        assert path.name == f"{stage}_00000.npz"
        finished = path.parent.with_name(path.parent.name.removesuffix(".partial"))
        kept[finished / path.name] = path.stat()
    done = run(workdir, *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    for path, stat in kept.items():
        found = path.stat()
        assert (found.st_ino, found.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns), path
        assert len(list(path.parent.glob(f"{path.parent.parent.name}_*.npz"))) > 1
    assert not list(workdir.rglob("*.partial*"))
    assert _untimed(workdir) == _untimed(whole)
    assert (workdir / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
    for path in workdir.glob("artifacts/sample/*/*.npz"):
        other = whole / path.relative_to(workdir)
        np.testing.assert_array_equal(np.load(path)["x_0"], np.load(other)["x_0"])
