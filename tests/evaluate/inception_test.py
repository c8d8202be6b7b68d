"""FID's Inception-v3: agreement with torch-fidelity's and pytorch-fid's, and the weights file.

The weights are random, all of them, running statistics included: the network definitions are
compared, and no public file is needed.
"""

import hashlib
import importlib
import importlib.util
import pickle
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mpqdiff.errors import InputError
from mpqdiff.evaluate import features, inception, inception_weights

SIZES = [(32, 32), (299, 299), (64, 48)]
COUNT = 2


def needs(*packages):
    """Skips where one of `packages` is not installed; imports none."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


with_torch = needs("torch")


def pictures(height, width):
    """Pictures of very different kinds: noise, and a smooth ramp."""
    rng = np.random.default_rng(height)
    noise = rng.integers(0, 256, (height, width, 3))
    ramp = np.linspace(0, 255, height)[:, None, None] * np.linspace(0, 1, width)[:, None]
    return np.stack([noise, ramp * [1.0, 0.6, 0.2]]).astype(np.uint8)


@pytest.fixture(scope="module")
def state():
    """A random state dict under the public names, scaled so that activations neither die nor
    grow."""
    rng, found = np.random.default_rng(0), {}
    for name, shape in inception_weights.torch_shapes().items():
        if len(shape) > 1:
            array = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith(("bn.weight", "running_var")):
            array = rng.uniform(0.5, 1.5, shape)
        else:
            array = 0.1 * rng.standard_normal(shape)
        found[name] = array.astype(np.float32)
    return found


@pytest.fixture(scope="module")
def converted(state, tmp_path_factory):
    """The state dict as safetensors, as a user would save it by hand."""
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def public(state, tmp_path_factory):
    """The state dict as the public file has it: with a counter for each convolution."""
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    for name in state:
        if name.endswith("running_var"):
            tensors[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def params(state):
    return inception_weights.parameters(state, "random")


def ours(params, images, convention):
    """As `features.load` puts it together."""
    return features._apply_inception(params, images, convention=convention)


@pytest.fixture
def torch_fidelity(monkeypatch):
    """torch-fidelity's network file alone: the package's own __init__ wants torchvision."""
    spec: Any = importlib.util.find_spec("torch_fidelity")
    monkeypatch.setitem(sys.modules, "torch_fidelity", importlib.util.module_from_spec(spec))
    return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")


def stand_in(blocks):
    """What pytorch-fid's network file takes from torchvision: constructors of blocks whose forward
    it replaces, and the stem and reductions that it keeps, from torch-fidelity's file."""
    torch = importlib.import_module("torch")

    class Plain(torch.nn.Module):
        def __init__(self, **_):
            super().__init__()
            self.Conv2d_1a_3x3 = blocks.BasicConv2d(3, 32, kernel_size=3, stride=2)
            self.Conv2d_2a_3x3 = blocks.BasicConv2d(32, 32, kernel_size=3)
            self.Conv2d_2b_3x3 = blocks.BasicConv2d(32, 64, kernel_size=3, padding=1)
            self.Conv2d_3b_1x1 = blocks.BasicConv2d(64, 80, kernel_size=1)
            self.Conv2d_4a_3x3 = blocks.BasicConv2d(80, 192, kernel_size=3)
            self.Mixed_6a, self.Mixed_7a = blocks.InceptionB(288), blocks.InceptionD(768)
            self.fc = torch.nn.Linear(2048, 1008)

    torchvision: Any = types.ModuleType("torchvision")
    torchvision.__version__ = "0.20"
    names = {"InceptionA": "InceptionA", "InceptionC": "InceptionC", "InceptionE": "InceptionE_1"}
    taken = {name: getattr(blocks, source) for name, source in names.items()}
    torchvision.models = types.SimpleNamespace(
        inception=types.SimpleNamespace(**taken), inception_v3=Plain
    )
    return torchvision


@pytest.fixture
def pytorch_fid(monkeypatch, torch_fidelity):
    """pytorch-fid's network file alone."""
    if importlib.util.find_spec("torchvision") is None:
        monkeypatch.setitem(sys.modules, "torchvision", stand_in(torch_fidelity))
    spec: Any = importlib.util.find_spec("pytorch_fid.inception")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def close(found, expected):
    """To 1e-4, where the two pictures differ by far more."""
    expected = expected.detach().numpy()
    found = np.asarray(found)
    assert found.shape == expected.shape
    assert np.abs(expected[0] - expected[1]).max() > 0.05, "the comparison would see nothing"
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@with_torch
@needs("torch_fidelity")
def test_agreement_with_torch_fidelity(torch_fidelity, public, params):
    torch = importlib.import_module("torch")
    wanted = ["2048", "logits_unbiased", "logits"]
    # Its loading is strict: the names and shapes are those that the public file must have.
    network = torch_fidelity.FeatureExtractorInceptionV3("inception", wanted, str(public))
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *io: spatial.append(io[-1]))
    for size in SIZES:
        images = pictures(*size)
        with torch.no_grad():
            theirs = network(torch.from_numpy(images).permute(0, 3, 1, 2))
        found = ours(params, images, "inception")
        close(found.features, theirs[0])
        close(found.logits, theirs[1])
        biased = inception.Head(biased=True).apply({"params": params["fc"]}, found.features)
        close(biased, theirs[2])
        first = spatial.pop()[:, :7].permute(0, 2, 3, 1)
        assert first.shape == (COUNT, 17, 17, 7)
        close(found.spatial, first.reshape(COUNT, 2023))


@with_torch
@needs("torch_fidelity", "pytorch_fid")
def test_agreement_with_pytorch_fid(pytorch_fid, public, params, monkeypatch):
    torch = importlib.import_module("torch")
    stored = torch.load(public, weights_only=True)
    monkeypatch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: stored)
    network = pytorch_fid.InceptionV3(output_blocks=(3,)).eval()
    spatial = []
    network.blocks[2][6].branch1x1.register_forward_hook(lambda *io: spatial.append(io[-1]))
    for size in SIZES:
        images = pictures(*size)
        with torch.no_grad():
            (theirs,) = network(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
        found = ours(params, images, "inception_pytorch_fid")
        close(found.features, theirs[..., 0, 0])
        close(found.spatial, spatial.pop()[:, :7].permute(0, 2, 3, 1).reshape(COUNT, 2023))
        if size == (32, 32):
            other = ours(params, images, "inception").features
            assert np.abs(other - found.features).max() > 1e-2, "the two ways with pixels are one"


@with_torch
@needs("torch_fidelity")
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (28, 28), (299, 299), (300, 411), (640, 598)])
def test_resize_agrees_with_both(torch_fidelity, size):
    torch = importlib.import_module("torch")
    images = pictures(*size)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    resize = torch_fidelity.interpolate_bilinear_2d_like_tensorflow1x
    theirs = {
        False: resize(pixels, (299, 299), align_corners=False),
        True: torch.nn.functional.interpolate(pixels, (299, 299), mode="bilinear"),
    }
    for half_pixel, wanted in theirs.items():
        found = inception.resize(jnp.asarray(images), half_pixel=half_pixel)
        np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1), atol=2e-3)  # of 255


def test_resize_by_hand():
    images = np.random.default_rng(0).integers(0, 256, (1, 598, 299, 1), np.uint8)
    skipped = inception.resize(jnp.asarray(images), half_pixel=False)
    np.testing.assert_array_equal(skipped, images[:, ::2])  # no antialias: every other row is lost
    halves = inception.resize(jnp.asarray(images), half_pixel=True)
    np.testing.assert_allclose(halves, images.reshape(1, 299, 2, 299, 1).mean(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "ends"), [("inception", (-1, 127 / 128)), ("inception_pytorch_fid", (-1, 1))]
)
def test_black_and_white_enter_as_the_references_have_it(name, ends):
    images = np.zeros((1, 4, 4, 1), np.uint8)
    for level, wanted in zip((0, 255), ends, strict=True):
        pixels = inception.prepare(images + np.uint8(level), convention=name)
        assert pixels.shape == (1, 299, 299, 3)
        np.testing.assert_array_equal(pixels, np.float32(wanted))


def test_the_average_leaves_the_padding_out():
    np.testing.assert_array_equal(inception.average_pool(jnp.ones((1, 5, 4, 2))), 1)
    row = jnp.arange(1.0, 4.0).reshape(1, 1, 3, 1)
    np.testing.assert_allclose(inception.average_pool(row).ravel(), [1.5, 2, 2.5])


def test_grey_is_the_same_as_red_green_and_blue_alike():
    grey = pictures(16, 16)[..., :1]
    np.testing.assert_array_equal(
        inception.prepare(grey), inception.prepare(grey.repeat(3, axis=-1))
    )


def test_outputs_and_names_are_those_of_the_public_file():
    pixels = jax.ShapeDtypeStruct((5, 299, 299, 3), jnp.float32)
    outputs, _ = jax.eval_shape(inception.Inception().init_with_output, jax.random.key(0), pixels)
    assert [out.shape for out in outputs] == [(5, 2048), (5, 1008), (5, 2023)]
    shapes = inception_weights.torch_shapes()
    convolutions = [name for name in shapes if name.endswith("conv.weight")]
    assert len(convolutions) == 94
    assert len(shapes) + len(convolutions) == 566  # with the counters
    assert sum(int(np.prod(shape)) for shape in shapes.values()) + 94 == 23_885_486
    assert shapes["Mixed_6d.branch7x7_2.conv.weight"] == (160, 160, 1, 7)
    assert shapes["fc.weight"] == (1008, 2048)


@with_torch
def test_a_conversion_is_the_original(public, state, tmp_path):
    path = inception_weights.convert(public, tmp_path / "mine.safetensors")
    assert inception_weights.convert(path, tmp_path / "twice.safetensors").exists()
    digest = hashlib.sha256(public.read_bytes()).hexdigest()
    original = inception_weights.read(public)
    for name in ("mine", "twice"):
        again = inception_weights.read(tmp_path / f"{name}.safetensors")
        assert again.hash == original.hash == digest
        assert not again.is_fid
        jax.tree.map(np.testing.assert_array_equal, again.params, original.params)
    kernel = original.params["Mixed_6d"]["branch7x7_2"]["kernel"]
    np.testing.assert_array_equal(
        kernel[0, 3, 5, 9], state["Mixed_6d.branch7x7_2.conv.weight"][9, 5, 0, 3]
    )
    with pytest.raises(InputError, match="both source and destination"):
        inception_weights.convert(path)
    assert not list(tmp_path.glob(".*")), "temporary files are left"


@with_torch
def test_a_conversion_that_was_changed_is_refused(public, tmp_path):
    path = inception_weights.convert(public, tmp_path / "mine.safetensors")
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.write_bytes(payload)
    with pytest.raises(InputError, match="not those it was converted with"):
        inception_weights.read(path)
    path.write_bytes(payload[:-5000])
    with pytest.raises(InputError, match="not complete safetensors"):
        inception_weights.read(path)


@with_torch
def test_only_the_public_file_is_called_fid(public, tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="are of inception_unverified, not FID"):
        network = features.load("inception", weights=public)
    assert (network.name, network.is_fid) == ("inception_unverified", False)
    monkeypatch.setattr(inception_weights, "FID_SHA256", network.hash[:8])
    path = inception_weights.convert(public, tmp_path / "mine.safetensors")
    for source in (public, path):
        found = features.load("inception", weights=source)
        assert (found.name, found.is_fid, found.hash) == ("inception", True, network.hash)
    other = features.load("inception_pytorch_fid", weights=str(path))
    assert (other.name, other.is_fid) == ("inception_pytorch_fid", True)
    assert other.hash != network.hash, "statistics of one way with pixels would pass as the other's"
    # The same tensors without the word of the conversion.
    save_file(load_file(path), path)
    with pytest.warns(UserWarning, match="not the public file"):
        assert features.load("inception", weights=path).name == "inception_unverified"


def test_a_network_of_the_package_runs_on_any_size(converted, params):
    with pytest.warns(UserWarning, match="not FID"):
        network = features.load("inception", weights=converted)
    assert network.accepts((28, 28, 1)) and network.accepts((640, 480, 3))
    assert not network.accepts((28, 28, 4)) and not network.accepts((28, 28))
    images = np.concatenate([pictures(20, 30), pictures(20, 30)[:1, ::-1]])
    found = features.collect(network, images, batch=COUNT)
    compiled = features.forward._cache_size()
    assert [x.shape for x in found] == [(3, 2048), (3, 1008), (3, 2023)]
    assert all(x.dtype == np.float32 for x in found)
    expected = ours(params, images[:COUNT], "inception")
    for x, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(x[:COUNT], wanted, atol=1e-4)
    features.extract(network, images[:, :10], batch=COUNT)
    assert features.forward._cache_size() == compiled, "another size compiles the network again"
    with pytest.raises(InputError, match=r"takes uint8 \[n, H, W, 1 or 3\]"):
        features.extract(network, images.repeat(2, axis=-1))


def test_names_shapes_and_values_are_checked(state):
    kept = {name: array for name, array in state.items() if not name.startswith("Mixed_7c.br")}
    with pytest.raises(InputError, match=r"missing: Mixed_7c.branch1x1.*and 39 more") as caught:
        inception_weights.parameters(kept, "there")
    assert "weights there" in str(caught.value) and "unexpected" not in str(caught.value)
    extra = {"AuxLogits.fc.bias": np.ones(3), "fc.bn.num_batches_tracked": np.array(1)}
    with pytest.raises(InputError, match=r"unexpected: AuxLogits.fc.bias, fc.bn.num_"):
        inception_weights.parameters(state | extra, "there")
    with pytest.raises(InputError, match=r"another shape: fc.weight \(1000, 2048\) for \(1008"):
        inception_weights.parameters(state | {"fc.weight": np.zeros((1000, 2048))}, "there")
    for name, value in (("fc.bias", np.inf), ("Conv2d_1a_3x3.bn.running_var", -1.0)):
        bad = state[name].copy()
        bad[3] = value
        with pytest.raises(InputError, match=f"not finite, or a negative variance: {name}"):
            inception_weights.parameters(state | {name: bad}, "there")


class Danger:
    def __reduce__(self):
        return exec, ("raise RuntimeError('the file ran code')",)


@with_torch
@pytest.mark.parametrize(
    "payload",
    [b"", b"not weights", pickle.dumps(Danger()), pickle.dumps({"fc.bias": Danger()})],
    ids=["empty", "text", "code", "code inside"],
)
def test_a_file_that_is_no_state_dict(tmp_path, payload):
    path = tmp_path / "weights.pth"
    path.write_bytes(payload)
    with pytest.raises(InputError, match="not a PyTorch state dict") as caught:
        inception_weights.read(path)
    assert "ran code" not in str(caught.value)


@with_torch
def test_a_truncated_public_file(public, tmp_path):
    (tmp_path / "cut.pth").write_bytes(public.read_bytes()[:100_000])
    with pytest.raises(InputError, match="not a PyTorch state dict"):
        inception_weights.read(tmp_path / "cut.pth")


def test_without_torch_a_public_file_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pth").write_bytes(b"anything")
    with pytest.raises(InputError, match="install it, or convert it once where torch is"):
        inception_weights.read(tmp_path / "weights.pth")


def test_reading_safetensors_imports_no_torch(converted):
    with safe_open(converted, framework="numpy") as stored:
        assert stored.metadata() is None
    before = "torch" in sys.modules
    assert not inception_weights.read(converted).is_fid
    assert ("torch" in sys.modules) == before


def test_weights_must_be_named_where_there_are_none(tmp_path):
    with pytest.raises(
        InputError, match=r"downloads none; name .*config\.evaluate\.weights\) pt_inception-2015"
    ):
        features.load("inception")
    with pytest.raises(InputError, match="cannot be read"):
        features.load("inception", weights=tmp_path / "absent.pth")
    with pytest.raises(InputError, match="fashion_classifier has weights of its own"):
        features.load(weights=tmp_path / "absent.pth")
    with pytest.raises(InputError, match="known: fashion_classifier, inception, inception_py"):
        features.load("inception_v3")
