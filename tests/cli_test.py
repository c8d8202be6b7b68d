"""The command line: exit code 2 with a clear message and nothing half-written, for every misuse."""

import errno
import itertools
import json
import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mpqdiff import artifacts, decisions, models, plan, weights
from mpqdiff.cli import VERBS, main

MODEL = {"image_size": 8, "channels": 1, "patch": 4, "width": 16, "depth": 1, "num_heads": 2,
         "num_classes": 3}  # fmt: skip
CONFIG = """
from mpqdiff.config import base, smoke
def get_config(arg=""):
    config = smoke(base())
    config.calibration.update(samples=4, timesteps=2)
    config.diffusion.num_steps = 2
    config.sample.update(num_images=4, batch=4)
    config.weights = {weights!r}
    {line}
    return config
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One compilation cache for the session, not the user's."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    yield
    patch.undo()


def _params():
    module = models.build("dit", **MODEL)
    shapes = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape), shapes)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(folder with weights and config.py, a workdir with a plan)."""
    folder = tmp_path_factory.mktemp("cli")
    path = folder / "tiny.safetensors"
    weights.save(path, _params(), model={"name": "dit", "kwargs": MODEL})
    _config(folder, path)
    assert main(["plan", f"--config={folder}/config.py", f"--workdir={folder}/work"]) == 0
    return folder


def _config(folder: Path, weights_path, line="pass") -> Path:
    path = folder / "config.py"
    path.write_text(CONFIG.format(weights=str(weights_path), line=line))
    return path


@pytest.fixture
def refused(good, tmp_path, capsys):
    """`refused(*arguments)`: the message of a command that exits with 2; `--workdir` is new."""

    def run(verb="run", *arguments, config=True, workdir=True, **overrides):
        command = [verb]
        command += [f"--config={good}/config.py"] if config is True else []
        command += [f"--workdir={tmp_path}/work"] if workdir else []
        command += [f"--config.{name.replace('__', '.')}={v}" for name, v in overrides.items()]
        assert main([*command, *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("mpqdiff: ")
        assert "Traceback" not in captured.err
        return captured.err

    return run


def _empty(folder: Path) -> bool:
    return not folder.exists() or not any(path.is_file() for path in folder.rglob("*"))


def test_a_plan_is_written_with_its_config(good):
    work = good / "work"
    plan = json.loads((work / "plan.json").read_text())
    assert plan["schema"] == 1
    assert json.loads((work / "config.json").read_text())["weights"] == f"{good}/tiny.safetensors"
    assert not list(work.rglob("*.partial*"))


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"], ["run", "--help"]])
def test_help_lists_the_verbs(arguments, capsys):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in VERBS)


def test_no_verb_shows_the_usage_and_fails(capsys):
    assert main([]) == 2
    assert "verbs:" in capsys.readouterr().out


def test_an_unknown_verb_lists_the_known_ones(refused):
    message = refused("pln")
    assert "unknown verb 'pln'" in message
    assert all(verb in message for verb in VERBS)


def test_missing_config_and_workdir_are_told(refused, tmp_path):
    assert "needs --config=FILE" in refused("run", config=False)
    assert "needs --config=FILE" in refused("run", config=False, workdir=False)
    assert "needs --workdir=DIR" in refused("run", workdir=False)
    assert "absent.py" in refused("run", f"--config={tmp_path}/absent.py", config=False)
    assert _empty(tmp_path / "work")


def test_unknown_flags_and_words_are_told(refused, tmp_path):
    assert "pareta" in refused("run", "--pareta=3")
    assert "unexpected arguments ['more']" in refused("run", "more")
    assert _empty(tmp_path / "work")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("raise RuntimeError('broken on purpose')", "RuntimeError: broken on purpose"),
        ("raise ValueError('odd argument')", "odd argument"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import nonexistent_module", "nonexistent_module"),
        ("return {'seed': 1}", "dict"),
        ("return None", "NoneType"),
        ("config.plan.ration = 2.0", "unknown key config.plan.ration; did you mean 'ratio'"),
        ("del config.sample", "config.sample is missing"),
        ("config.sample.num_images = 'many'", "num_images"),
        ("def broken(:", "invalid syntax"),
        ("open('absent.txt')", "absent.txt"),
    ],
)
def test_an_unusable_config_file_is_told(line, message, tmp_path, refused):
    config = _config(tmp_path, "random", line)
    assert message in refused("run", f"--config={config}", config=False)
    assert _empty(tmp_path / "work")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sed": 1}, "sed"),
        ({"plan__ration": 1}, "ration"),
        ({"sample__batch": "four"}, "four"),
        (
            {"score__name": "fisher"},
            "unknown score 'fisher'; known: eps_error, manifold, orthogonality",
        ),
        ({"plan__solver": "annealing"}, "unknown solver 'annealing'; known: evolution, greedy, lp"),
        ({"diffusion__schedule": "sine"}, "unknown noise schedule 'sine'; known: cosine"),
        ({"diffusion__sampler": "euler"}, "unknown sampler 'euler'; known: ddim"),
        ({"quantize__backend": "cuda"}, "unknown back end 'cuda'; known: aqt, kernels"),
        ({"quantize__mode": "tdq"}, "unknown activation mode 'tdq'; known: ema, online, static"),
        ({"aggregate__name": "median"}, "unknown aggregation 'median'; known: exp_mean"),
        ({"weights": "fashion"}, "weights 'fashion': no such file"),
        ({"sample__num_images": 0}, "config.sample.num_images=0: expected a positive"),
        ({"sample__batch": -4}, "config.sample.batch=-4: expected a positive"),
        ({"calibration__samples": 0}, "config.calibration.samples=0: expected a positive"),
        ({"diffusion__num_steps": -1}, "config.diffusion.num_steps=-1: expected a positive"),
        ({"diffusion__num_steps": 5000}, "num_steps=5000: expected 1 to 1000"),
        ({"plan__budget__bytes": -5.0}, "config.plan.budget.bytes=-5.0: expected"),
        ({"plan__ratio": 0.0}, "config.plan.ratio=0.0: expected a positive"),
        ({"plan__a_bits": (16,)}, "a_bits (16,): expected distinct widths within 2..8"),
    ],
)
def test_an_unusable_value_is_told(overrides, message, refused, tmp_path):
    assert message in refused("run", **overrides)
    assert _empty(tmp_path / "work")


@pytest.mark.parametrize("name", ["solver", "mode"])
def test_a_dry_run_refuses_what_a_run_would(name, refused, tmp_path):
    group = {"solver": "plan", "mode": "quantize"}[name]
    message = refused("run", "--dry_run", workdir=False, **{f"{group}__{name}": "nonsense"})
    assert "'nonsense'; known: " in message


def test_a_dry_run_prints_config_sites_and_cost_and_writes_nothing(good, tmp_path, capsys):
    work = tmp_path / "work"
    command = ["run", f"--config={good}/config.py", f"--workdir={work}", "--dry_run"]
    assert main([*command, "--config.sample.num_images=12"]) == 0
    text = capsys.readouterr().out
    assert "num_images: 12" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "dense" in rows["block_0/mlp/fc1"]
    assert rows["block_0/mlp/fc1"].endswith("4/8")
    assert rows["patch_embed"].endswith(" 8")
    assert "float: " in rows["block_0/attn/qk"]
    sampled = (2 + 3) * 12 * 2  # float, plan and the controls; images; steps
    assert f"{sampled} evaluations" in rows["sample"]
    assert "MiB of float32 weights" in text
    assert not work.exists()
    # The flag is of that call alone.
    assert main(["sample", f"--workdir={tmp_path}/absent"]) == 2
    assert "needs --config=FILE" in capsys.readouterr().err


@pytest.mark.parametrize(("budget", "words"), [(10.0, "nearest "), (1e9, "above the maximum ")])
def test_an_impossible_budget_states_the_bound(budget, words, refused, tmp_path):
    message = refused("plan", plan__budget__bytes=budget)
    assert words in message
    bound = float(message.split(words)[1].split()[0].rstrip(",)"))
    assert 1e3 < bound < 1e5
    work = tmp_path / "work"
    assert not (work / "plan.json").exists()
    assert not list(work.rglob("*.partial*"))


def _workdir(good, tmp_path) -> Path:
    return Path(shutil.copytree(good / "work", tmp_path / "work"))


def _edit(work: Path, change) -> None:
    path = work / "plan.json"
    plan = json.loads(path.read_text())
    change(plan)
    path.write_text(json.dumps(plan))


def _rename(plan):
    plan["sites"]["ghost"] = plan["sites"].pop("final")


PLANS = {
    "unknown and missing": (_rename, "the model lacks: ['ghost']; sites without a decision: "
                                     "['final']"),
    "missing": (lambda plan: plan["sites"].pop("final"), "without a decision: ['final']"),
    "another model": (lambda plan: plan["model"].update(hash="0123"), "made for model 0123"),
    "schema": (lambda plan: plan.update(schema=9), "schema 9, expected 1"),
    "width": (lambda plan: plan["sites"]["final"].update(w_bits=12), "'final' has w_bits 12"),
    "pin": (lambda plan: plan["sites"]["final"].update(w_bits=4), "pinned at 8"),
    "timesteps": (lambda plan: plan.update(timesteps=[4000, 0]), "0..999"),
    "product": (
        lambda plan: plan["sites"]["block_0/attn/qk"].update(a_bits={"lhs": 8, "rhs": 8}),
        "quantize.products=True",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("verb", ["sample", "verify"])
def test_a_plan_that_does_not_fit_is_told(kind, verb, good, tmp_path, refused):
    work = _workdir(good, tmp_path)
    change, message = PLANS[kind]
    _edit(work, change)
    assert message in refused(verb, config=False)
    assert not (work / "samples").exists()


@pytest.mark.parametrize("verb", ["sample", "verify"])
def test_a_truncated_or_missing_plan_is_told(verb, good, tmp_path, refused):
    work = _workdir(good, tmp_path)
    path = work / "plan.json"
    path.write_text(path.read_text()[:100])
    assert "plan.json: not valid JSON" in refused(verb, config=False)
    path.unlink()
    assert "plan.json: no such file" in refused(verb, config=False)


def test_a_truncated_stored_config_is_told(good, tmp_path, refused):
    work = _workdir(good, tmp_path)
    (work / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refused("sample", config=False)


@pytest.mark.parametrize("kept", [0, 5, 200, -3])
def test_truncated_weights_are_told(kept, good, tmp_path, refused):
    data = (good / "tiny.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data[:kept])
    assert "cut.safetensors: cut short or damaged" in refused("run", weights=path)
    assert _empty(tmp_path / "work")


def test_weights_with_nan_are_told(tmp_path, refused):
    from flax import traverse_util
    from safetensors.numpy import save_file

    flat = traverse_util.flatten_dict(_params(), sep="/")
    flat = {name: leaf.astype(np.float32) for name, leaf in flat.items()}
    flat["final/kernel"][0, 0] = np.nan
    model = json.dumps({"name": "dit", "kwargs": MODEL})
    save_file(flat, tmp_path / "nan.safetensors", metadata={"model": model})
    message = refused("run", weights=tmp_path / "nan.safetensors")
    assert "final/kernel holds NaN or infinity" in message
    assert _empty(tmp_path / "work")


def test_a_corrupted_artifact_is_told_by_name(good, tmp_path, refused):
    work = _workdir(good, tmp_path)
    (path,) = work.glob("artifacts/record/*/statistics.npz")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    message = refused("plan", config=False)
    assert f"{path}: content hash" in message
    assert "Delete" in message


@pytest.mark.parametrize("verb", ["run", "plan", "sample", "train"])
def test_a_workdir_below_a_file_is_told(verb, good, tmp_path, refused, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr("mpqdiff.training.data.load", _small_data)
    message = refused(verb, f"--workdir={tmp_path}/taken/work", workdir=False)
    assert "taken" in message
    assert "--workdir" in message
    assert (tmp_path / "taken").read_text() == ""


def _small_data(*args, **kwargs):
    return np.zeros((8, 28, 28, 1), np.float32), np.zeros(8, np.int32)


def test_a_full_workdir_is_told_and_nothing_is_half_written(good, tmp_path, refused, monkeypatch):
    work = _workdir(good, tmp_path)
    before = (work / "plan.json").read_bytes()

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(artifacts, "write_atomically", full)
    message = refused("plan", plan__ratio=1.4)
    assert "No space left on device; choose another --workdir or free some space" in message
    assert (work / "plan.json").read_bytes() == before


def test_a_stored_config_serves_where_none_is_named(good, tmp_path, capsys):
    work = _workdir(good, tmp_path)
    assert main(["plan", f"--workdir={work}"]) == 0
    stored = json.loads((work / "config.json").read_text())
    assert stored == json.loads((good / "work" / "config.json").read_text())
    assert main(["plan", f"--workdir={work}", "--config.plan.ratio=1.5"]) == 0
    assert json.loads((work / "config.json").read_text())["plan"]["ratio"] == 1.5
    assert "written: " in capsys.readouterr().out


def test_sample_and_verify_run_the_plan_of_the_workdir(good, tmp_path, capsys):
    work = _workdir(good, tmp_path)
    assert main(["sample", f"--workdir={work}"]) == 0
    assert (work / "samples" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert main(["verify", f"--workdir={work}"]) == 0
    assert "verified: 10 sites" in capsys.readouterr().out
    row = {"arm": "plan", "resident_bytes": 7}
    (work / "results.json").write_text(json.dumps({"arms": [row]}))
    assert main(["verify", f"--workdir={work}"]) == 1
    assert "recorded resident_bytes 7" in capsys.readouterr().err


def test_verify_names_a_site_whose_bytes_differ_from_the_plan(good, tmp_path, capsys):
    work = _workdir(good, tmp_path)
    _edit(work, lambda plan: plan["predicted"].update(bytes=plan["predicted"]["bytes"] + 8))
    assert main(["verify", f"--workdir={work}"]) == 1
    assert "promised by the plan" in capsys.readouterr().err


def test_an_error_that_is_not_the_inputs_is_not_hidden(good, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr(decisions, "plan_only", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["plan", f"--config={good}/config.py", f"--workdir={tmp_path}/work"])


def test_a_new_budget_on_a_workdir_only_solves(good, tmp_path, capsys):
    work = _workdir(good, tmp_path)
    old = json.loads((work / "plan.json").read_text())
    command = ["plan", f"--workdir={work}"]
    start = time.perf_counter()
    assert main([*command, f"--config.plan.budget.bytes={old['predicted']['bytes'] + 300}"]) == 0
    assert time.perf_counter() - start < 5
    new = json.loads((work / "plan.json").read_text())
    assert new["budgets"] == {"bytes": old["predicted"]["bytes"] + 300}
    assert new["predicted"]["bytes"] <= new["budgets"]["bytes"]
    stages = {path.parent.name for path in (work / "artifacts").glob("*/*")}
    counts = {stage: len(list((work / "artifacts" / stage).iterdir())) for stage in stages}
    assert counts["plan"] == 2
    assert counts["score"] == counts["record"] == counts["calibrate"] == 1
    assert "optimal" in capsys.readouterr().out or new["gap"] > 0


def test_a_front_is_written_as_data_and_page(good, tmp_path, capsys):
    work = _workdir(good, tmp_path)
    assert main(["plan", f"--workdir={work}", "--pareto=8"]) == 0
    front = json.loads((work / "pareto.json").read_text())
    assert front["resources"] == ["bytes"] and len(front["points"]) == 8
    spent = [point["predicted"]["bytes"] for point in front["points"]]
    assert all(p["predicted"]["bytes"] <= p["budgets"]["bytes"] for p in front["points"])
    assert spent[0] < spent[-1]
    bounds = [point["bound"] for point in front["points"]]
    assert all(a >= b for a, b in itertools.pairwise(bounds))
    assert (work / "pareto.html").read_text().count("plotly") > 0
    assert "8 of 8 budgets have a plan" in capsys.readouterr().out


def test_each_site_is_explained(good, tmp_path, capsys, refused):
    work = _workdir(good, tmp_path)
    assert main(["plan", f"--workdir={work}", "--explain=block_0/mlp/.*"]) == 0
    text = capsys.readouterr().out
    assert "block_0/mlp/fc1" in text and "block_0/mlp/fc2" in text
    assert "final" not in text
    assert "nowhere" in refused("plan", "--explain=nowhere", config=False)


@pytest.mark.parametrize("form", ["modelopt", "qwix"])
def test_a_plan_is_exported(form, good, tmp_path, refused):
    work = _workdir(good, tmp_path)
    assert main(["plan", f"--workdir={work}", f"--export={form}"]) == 0
    assert (work / f"plan.{form}.json").exists()
    if form == "modelopt":
        kept = plan.load(work / "plan.json")
        sites = [site for site, bits in kept.w_bits.items() if bits]
        assert json.loads((work / "plan.modelopt.json").read_text())
        assert sites
    assert "unknown export form 'onnx'" in refused("plan", "--export=onnx", config=False)


def test_images_are_evaluated_without_a_model(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", arr_0=rng.integers(0, 256, (80, 28, 28, 1), np.uint8))
    command = ["evaluate", f"--images={tmp_path}/a.npz", "--reference=fashion_reference"]
    assert main([*command, f"--out={tmp_path}/s.npz"]) == 0
    assert "fid" in capsys.readouterr().out.lower()
    with np.load(tmp_path / "s.npz") as kept:
        assert kept["mu"].shape == (64,) and kept["sigma"].shape == (64, 64)
    assert (
        main(["evaluate", f"--images={tmp_path}/absent.npz", "--reference=fashion_reference"]) == 2
    )
