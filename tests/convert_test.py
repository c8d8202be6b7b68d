"""Converting: what is damaged, foreign or dangerous is refused by name, with nothing written."""

import json
import os
import shutil
import struct
import sys
import types

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")

from mpqdiff import cli, models, weights  # noqa: E402
from mpqdiff.errors import InputError  # noqa: E402
from mpqdiff.weights import convert as converting  # noqa: E402
from mpqdiff.weights import diffusers_dit, facebook_dit  # noqa: E402
from mpqdiff.weights.convert import convert  # noqa: E402
from mpqdiff.weights.source import open_source  # noqa: E402

CONFIG = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "sample_size": 4,
    "num_embeds_ada_norm": 3,
}
POISONED = "transformer_blocks.0.ff.net.2.weight"


@pytest.fixture(scope="module")
def tensors():
    """A state dict for CONFIG in diffusers' layout, made by walking our entries backwards."""
    module = models.build("dit", **diffusers_dit.module_kwargs(CONFIG))
    made = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    shapes = {k: v.shape for k, v in traverse_util.flatten_dict(made, sep="/").items()}
    rng, state = np.random.default_rng(0), {}
    for entry in diffusers_dit.entries(CONFIG):
        shape = shapes[entry.target]
        if len(entry.sources) == 3:  # q, k and v
            shape = (*shape[:-1], shape[-1] // 3)
        order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), (0,))
        if entry.target.endswith("embedding"):
            order = (0, 1)
        for key in entry.sources:
            state[key] = np.ascontiguousarray(
                rng.normal(size=shape).astype(np.float32).transpose(order)
            )
    return state


OUTS = {"file": "out/w.safetensors", "Orbax": "out/w/"}


@pytest.fixture
def folder(tmp_path, tensors):
    """A good source folder, and where the output goes."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, source / "diffusion_pytorch_model.safetensors")
    (tmp_path / "out").mkdir()
    return source, tmp_path / "out" / "w.safetensors"


def weights_file(source):
    return source / "diffusion_pytorch_model.safetensors"


def as_torch(state):
    return {key: torch.tensor(value) for key, value in state.items()}


def test_the_file_and_its_description(folder, tensors):
    source, out = folder
    line = convert(str(source), out)
    module, params, model = weights.load(str(out))
    flat = traverse_util.flatten_dict(params, sep="/")
    assert sorted(file.name for file in out.parent.iterdir()) == ["w.json", "w.safetensors"]
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["model"] == model and record["kind"] == "diffusers_dit"
    assert record["tensors_used"] == len(tensors) and record["tensors_left_out"] == []
    assert record["parameters"] == sum(leaf.size for leaf in flat.values())
    assert f"{out}: diffusers_dit, {record['parameters']} parameters" in line
    assert module.timestep_freq_shift == 1
    # Kernels are written in their own order, not in that of the array they are a view of.
    expected = tensors["proj_out_2.weight"].T
    np.testing.assert_array_equal(flat["final/kernel"], expected)
    qkv = [tensors[f"transformer_blocks.0.attn1.to_{part}.weight"].T for part in "qkv"]
    np.testing.assert_array_equal(flat["block_0/attn/qkv/kernel"], np.concatenate(qkv, axis=1))
    with safe_open(out, framework="numpy") as stored:
        assert stored.get_tensor("final/kernel").dtype == np.float32


FORMS = ["shards", "bin", "bin shards", "bfloat16", "half", "compiled", "file", "variant"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_source_gives_the_same(folder, tensors, form):
    source, out = folder
    convert(str(source), out)
    expected, main, given = load_file(out), weights_file(source), source
    first = dict(list(tensors.items())[:7])
    second = {key: value for key, value in tensors.items() if key not in first}
    names = {key: "a" if key in first else "b" for key in tensors}
    tolerance = 0.0
    if form in ("shards", "bin shards"):
        main.unlink()
        end = "safetensors" if form == "shards" else "bin"
        for name, part in (("a", first), ("b", second)):
            if end == "bin":
                torch.save(as_torch(part), source / f"{name}.bin")
            else:
                save_file(part, source / f"{name}.safetensors")
        index = {"weight_map": {key: f"{name}.{end}" for key, name in names.items()}}
        (source / f"model.{end}.index.json").write_text(json.dumps(index))
    elif form == "bin":
        main.unlink()
        torch.save(as_torch(tensors), source / "model.bin")
    elif form in ("bfloat16", "half"):
        from safetensors.torch import save_file as save_torch

        dtype, tolerance = getattr(torch, form), 0.01
        save_torch({key: value.to(dtype) for key, value in as_torch(tensors).items()}, main)
    elif form == "compiled":
        save_file({f"_orig_mod.{key}": value for key, value in tensors.items()}, main)
    elif form == "file":
        given = main
    elif form == "variant":
        save_file(first, source / "diffusion_pytorch_model.fp16.safetensors")
    convert(str(given), out)
    got = load_file(out)
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=tolerance, err_msg=name)


def test_an_orbax_folder_holds_what_the_file_does(folder, tmp_path):
    source, out = folder
    convert(str(source), out)
    line = convert(str(source), f"{tmp_path}/out/w/")
    assert f"{tmp_path}/out/w: diffusers_dit, " in line
    names = ["w", "w.json", "w.safetensors"]
    assert sorted(file.name for file in out.parent.iterdir()) == names
    assert sorted(file.name for file in (tmp_path / "out" / "w").iterdir()) == [
        "model.json",
        "params",
    ]
    assert (tmp_path / "out/w/model.json").read_text() == out.with_suffix(".json").read_text()
    (module, params, model), (other, held, said) = (
        weights.load(str(path)) for path in (out, tmp_path / "out" / "w")
    )
    assert (module, model) == (other, said)
    assert {leaf.dtype for leaf in jax.tree.leaves(held)} == {np.dtype(np.float32)}
    jax.tree.map(np.testing.assert_array_equal, held, params)


def damaged(file, data=None):
    """`file` cut to half, or holding `data`."""
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if data is None else data)


# Orbax leaves the reads behind the first that failed to an event loop that it has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_orbax_folder_that_is_damaged(folder, tmp_path):
    source, _ = folder

    def fresh():
        at = tmp_path / "out" / "w"
        shutil.rmtree(at, ignore_errors=True)
        convert(str(source), f"{at}/")
        return at

    at = fresh()
    (data,) = (at / "params" / "d").iterdir()
    for file in (data, at / "params" / "_METADATA", at / "params" / "manifest.ocdbt"):
        kept = file.read_bytes()
        damaged(file)
        with pytest.raises(InputError, match=f"weights {at}: cut short or damaged"):
            weights.load(str(at))
        file.write_bytes(kept)
    weights.load(str(at))
    damaged(at / "model.json", b"{")
    with pytest.raises(InputError, match="cut short or damaged"):
        weights.load(str(at))
    damaged(at / "model.json", b"[]")
    with pytest.raises(InputError, match=r"model is \[\], expected"):
        weights.load(str(at))
    (at / "model.json").unlink()
    with pytest.raises(InputError, match=r"a folder without model.json; .*--out=FOLDER/"):
        weights.load(str(at))
    with pytest.raises(InputError, match=r"w/ is there already: delete it"):
        convert(str(source), f"{at}/")


def refused(folder, match, given=None, **kwargs):
    """The source is refused, as a file and as a folder, and where they would be stays empty."""
    source, out = folder
    said = []
    for form in OUTS.values():
        with pytest.raises(InputError, match=match) as raised:
            convert(str(given or source), f"{out.parent.parent}/{form}", **kwargs)
        assert list(out.parent.iterdir()) == []
        said.append(str(raised.value))
    assert len(set(said)) == 1
    return said[0]


BAD_SOURCES = {
    "code": "holds more than tensors",
    "another architecture": "keys missing from the source",
    "half overflow": "overflowed in half precision",
    "cut short": "cut short or damaged",
    "NaN": "NaN or infinite",
    "shape": "1 shapes that differ",
}


def spoil(what, source, tensors):
    """The source with one fault; returns what to convert."""
    file = weights_file(source)
    if what == "code":
        file = source / "evil.pt"
        torch.save({**as_torch(tensors), "extra": Dangerous()}, file)
        return file
    if what == "another architecture":
        (source / "config.json").write_text(json.dumps({**CONFIG, "num_layers": 2}))
    elif what == "cut short":
        damaged(file)
    elif what == "half overflow":
        with np.errstate(over="ignore"):
            half = {key: (value * 1e6).astype(np.float16) for key, value in tensors.items()}
        save_file(half, file)
    else:
        bad = tensors[POISONED][1:].copy() if what == "shape" else tensors[POISONED] * np.nan
        save_file({**tensors, POISONED: bad}, file)
    return source


@pytest.mark.parametrize("form", OUTS)
@pytest.mark.parametrize("what", BAD_SOURCES)
def test_the_command_exits_with_2_and_leaves_nothing(
    folder, tensors, what, form, monkeypatch, capsys
):
    monkeypatch.setenv("MPQDIFF_TEST_MARK", str(folder[0].parent / "ran"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    given = spoil(what, folder[0], tensors)
    before = sorted(path.name for path in folder[0].parent.iterdir())
    out = f"{folder[0].parent}/{OUTS[form]}"
    assert cli.main(["convert", f"--source={given}", f"--out={out}"]) == 2
    said = capsys.readouterr()
    assert BAD_SOURCES[what] in said.err and str(given) in said.err and not said.out
    assert sorted(path.name for path in folder[0].parent.iterdir()) == before
    assert list(folder[1].parent.iterdir()) == []


@pytest.mark.parametrize("form", OUTS)
def test_the_command_writes_either_form(folder, form, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    out = f"{folder[0].parent}/{OUTS[form]}"
    assert cli.main(["convert", f"--source={folder[0]}", f"--out={out}"]) == 0
    assert "diffusers_dit" in capsys.readouterr().out
    assert weights.load(out)[2]["name"] == "dit"


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_safetensors_file_cut_short(folder, keep):
    file = weights_file(folder[0])
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(folder, "cut short or damaged")
    assert str(file) in message


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_pickle_cut_short(folder, tensors, keep, legacy):
    file = folder[0] / "cut.pt"
    torch.save(as_torch(tensors), file, _use_new_zipfile_serialization=not legacy)
    convert(str(file), folder[1])  # whole, it is read
    for written in folder[1].parent.iterdir():
        written.unlink()
    file.write_bytes(file.read_bytes()[:keep])
    assert str(file) in refused(folder, "damaged", given=file)


class Dangerous:
    def __reduce__(self):
        return os.mkdir, (os.environ["MPQDIFF_TEST_MARK"],)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_and_not_run(folder, tensors, tmp_path, monkeypatch, legacy):
    mark = tmp_path / "ran"
    monkeypatch.setenv("MPQDIFF_TEST_MARK", str(mark))
    file = folder[0] / "evil.pt"
    saved = {**as_torch(tensors), "extra": Dangerous()}
    torch.save(saved, file, _use_new_zipfile_serialization=not legacy)
    message = refused(folder, "holds more than tensors", given=file)
    assert f"{os.mkdir.__module__}.mkdir in it" in message
    assert "weights_only" not in message and "safe_globals" not in message
    assert not mark.exists()
    torch.load(file, weights_only=False)  # the danger was real
    assert mark.exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(folder, tensors, bad):
    poisoned = tensors[POISONED].copy()
    poisoned[2, 3] = bad
    save_file({**tensors, POISONED: poisoned}, weights_file(folder[0]))
    message = refused(folder, "NaN or infinite; the file is damaged, or overflowed in half")
    assert POISONED in message and str(folder[0]) in message


def test_half_precision_that_overflowed(folder, tensors):
    with np.errstate(over="ignore"):
        half = {key: value.astype(np.float16) for key, value in tensors.items()}
        half[POISONED] = (tensors[POISONED] * 1e6).astype(np.float16)
    save_file(half, weights_file(folder[0]))
    assert POISONED in refused(folder, "overflowed in half precision")


def test_missing_unexpected_and_wrongly_shaped_keys(folder, tensors):
    file = weights_file(folder[0])
    rest = {key: value for key, value in tensors.items() if key != POISONED}
    save_file(rest, file)
    refused(folder, rf"1 keys missing from the source: {POISONED}")
    save_file({**tensors, "head.weight": np.ones(2, np.float32)}, file)
    refused(folder, "1 unexpected source keys: head.weight")
    save_file({**tensors, POISONED: tensors[POISONED][:-1].copy()}, file)
    refused(folder, r"block_0/mlp/fc2/kernel from .*: \(64, 15\), expected \(64, 16\)")


def test_a_layer_under_two_names_at_once(folder, tensors):
    twice = {"transformer_blocks.0.attn1.query.bias": np.ones(16, np.float32)}
    save_file({**tensors, **twice}, weights_file(folder[0]))
    refused(folder, "both older and newer names")


def test_a_source_of_another_architecture(folder):
    source, _ = folder
    (source / "config.json").write_text(json.dumps({**CONFIG, "num_layers": 2}))
    refused(folder, "keys missing from the source: transformer_blocks.1")
    (source / "config.json").write_text(json.dumps({**CONFIG, "_class_name": "FluxTransformer"}))
    refused(folder, r"'FluxTransformer'; known: .*DiTTransformer2DModel")
    (source / "config.json").unlink()
    refused(folder, "cannot tell what this is: no config.json")
    refused(folder, "unknown converter 'dit2'; known: .*facebook_dit", kind="dit2")
    refused(folder, "no state dict of facebookresearch/DiT", kind="facebook_dit")
    refused(folder, "write them to a config.json beside", kind="guided_diffusion")


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_config_that_is_no_json_object(folder, text):
    (folder[0] / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, r"config\.json: ")


def test_an_index_that_does_not_agree_with_its_files(folder, tensors):
    source, _ = folder
    index = source / "model.safetensors.index.json"
    name = weights_file(source).name
    shards = dict.fromkeys(tensors, name)
    index.write_text(json.dumps({"weight_map": {**shards, "more": name}}))
    refused(folder, "does not agree with its files on more")
    index.write_text(json.dumps({"weight_map": {**shards, "more": "gone.safetensors"}}))
    refused(folder, "gone.safetensors is not beside it")
    index.write_text(json.dumps({"weight_map": {**shards, "more": "../out/w.safetensors"}}))
    refused(folder, "is not beside it")
    index.write_text(json.dumps({"weight_map": [name]}))
    refused(folder, "no weight_map")


def test_sources_that_are_none(folder, tmp_path):
    source, _ = folder
    refused(folder, "no such file or folder", given=tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(folder, r"no \.safetensors or \.bin file", given=empty)
    refused(folder, "expected a folder or a file ending in", given=source / "config.json")
    save_file({}, empty / "a.safetensors")
    refused(folder, "holds no tensors", given=empty)
    (empty / "b.safetensors").write_bytes(b"")
    refused(folder, r"several weights \(a.safetensors, b.safetensors\)", given=empty)
    (tmp_path / "model_index.json").write_text("{}")
    refused(folder, "a whole pipeline; name one of its folders: source", given=tmp_path)
    torch.save({"epoch": 3}, source / "count.pt")
    refused(folder, "'epoch' is not a tensor", given=source / "count.pt")
    torch.save([torch.ones(2)], source / "list.pt")
    refused(folder, "'list' is not a tensor", given=source / "list.pt")


def test_outputs_that_cannot_be(folder, tmp_path):
    source, out = folder
    for bad, message in (
        (out.with_suffix(".npz"), "ending in .safetensors"),
        (tmp_path / "none" / "w.safetensors", "there is no folder"),
        (f"{tmp_path}/none/w/", "there is no folder"),
        (out.with_suffix(""), r"or a folder's ending in / \(Orbax\)"),
    ):
        with pytest.raises(InputError, match=message):
            convert(str(source), bad)
    before = weights_file(source).read_bytes()
    with pytest.raises(InputError, match="is the source itself"):
        convert(str(weights_file(source)), weights_file(source))
    assert weights_file(source).read_bytes() == before


def test_tensors_are_written_as_they_are_made(folder, monkeypatch):
    """When the last is made, the others are in the file: memory never holds them all."""
    source, out = folder
    seen, whole = [], converting.mapping.make

    def watched(state, entries, shapes):
        for path, value in whole(state, entries, shapes):
            partial = out.parent / f".{out.name}.partial"
            seen.append(partial.stat().st_size)
            yield path, value

    monkeypatch.setattr(converting.mapping, "make", watched)
    convert(str(source), out)
    assert seen[-1] > 0.5 * out.stat().st_size and sorted(seen)[0] < 0.1 * out.stat().st_size


def test_a_write_that_fails_leaves_what_was_there(folder, monkeypatch):
    source, out = folder
    out.write_text("older")

    def full(path, *_):
        if path.suffix == ".partial" and "safetensors" in path.name:
            path.write_text("half")
        else:
            path.mkdir()
            (path / "params").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(converting.tensors, "write", full)
    monkeypatch.setattr(converting.folder, "save", full)
    for form in (str(out), f"{out.parent}/w/"):
        with pytest.raises(OSError, match="No space"):
            convert(str(source), form)
    assert [file.name for file in out.parent.iterdir()] == ["w.safetensors"]
    assert out.read_text() == "older"


def test_what_a_killed_run_left_is_cleared(folder):
    source, out = folder
    left = out.parent / ".w.partial"
    (left / "params").mkdir(parents=True)
    (left / "params" / "x").write_text("half")
    convert(str(source), f"{out.parent}/w/")
    assert [file.name for file in out.parent.iterdir()] == ["w"]
    weights.load(str(out.parent / "w"))


def test_the_state_is_read_when_asked_for(folder):
    """Data behind the header may be replaced between opening and reading: nothing was read yet."""
    file = weights_file(folder[0])
    state = open_source(folder[0]).state
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    begin, end = json.loads(raw[8 : 8 + length])[POISONED]["data_offsets"]
    with open(file, "r+b") as handle:
        handle.seek(8 + length + begin)
        handle.write(bytes(end - begin))
    assert not state[POISONED].any()


def test_the_hub_is_asked_only_with_the_flag(folder, monkeypatch):
    source, out = folder
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, tuple(allow_patterns)))
        return str(source.parent)

    fake = types.SimpleNamespace(
        snapshot_download=snapshot_download,
        hf_hub_download=lambda repository, name: asked.append((repository, name)) or str(source),
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    convert("someone/model/source", out, hub=True)
    ((repository, patterns),) = asked
    assert repository == "someone/model" and "source/*.safetensors" in patterns
    convert("someone/model/a/b.pt", out, hub=True)
    assert asked[-1] == ("someone/model", "a/b.pt")
    convert(str(source), out)
    assert len(asked) == 2
    with pytest.raises(InputError, match="expected owner/name"):
        convert("alone", out, hub=True)

    def unreachable(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(fake, "snapshot_download", unreachable)
    with pytest.raises(InputError, match=r"--source=someone/model: no route$"):
        convert("someone/model", out, hub=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="--hub needs huggingface_hub"):
        convert("someone/model", out, hub=True)


def test_without_torch_pickles_are_refused_and_safetensors_read(folder, tensors, monkeypatch):
    file = folder[0] / "w.pt"
    torch.save(as_torch(tensors), file)
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(folder, "reading it needs torch", given=file)
    assert "diffusers_dit" in convert(str(folder[0]), folder[1])


def test_both_readings_of_a_dit_are_known_by_their_keys():
    """facebook's keys are told from diffusers' without a config."""
    assert set(converting.SIGNS.values()) <= set(converting.CONVERTERS)
    assert set(converting.CLASSES.values()) <= set(converting.CONVERTERS)
    sources = {key for entry in facebook_dit.entries({"depth": 1}) for key in entry.sources}
    assert set(converting.SIGNS) & sources
