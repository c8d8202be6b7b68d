"""FID, KID, IS, precision and recall equal torchmetrics' and torch-fidelity's on equal features.

Their functions that start from features are called, on random features and on those of the shipped
reference; no image passes a network. torch-fidelity's `__init__` asks for torchvision, so the files
with the metrics are loaded without it, and what they import for reading images is left empty.
"""

import importlib
import importlib.util
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest

from mpqdiff.evaluate import features as feature_networks
from mpqdiff.evaluate import frechet
from mpqdiff.evaluate.inception_score import inception_score
from mpqdiff.evaluate.kernel_distance import kernel_distance, subset_kernel_distance
from mpqdiff.evaluate.manifold import precision_recall

FIDELITY = ("torch_fidelity.metric_fid", "torch_fidelity.metric_kid",
            "torch_fidelity.metric_isc", "torch_fidelity.metric_prc")  # fmt: skip
TORCHMETRICS = ("torchmetrics.image.fid", "torchmetrics.image.kid", "torchmetrics.image.inception")


@pytest.fixture(scope="module")
def load():
    """`load(*names) -> modules`; it skips with a reason where one of them is not installed."""
    before = dict(sys.modules)
    found = importlib.util.find_spec("torch_fidelity")
    if found is not None and found.origin is not None:
        shell = types.ModuleType("torch_fidelity")
        shell.__path__ = [str(Path(found.origin).parent)]
        reading = types.ModuleType("torch_fidelity.utils")
        reading.__getattr__ = lambda name: None  # imported, and called for images only
        sys.modules.update({"torch_fidelity": shell, "torch_fidelity.utils": reading})

    def modules(*names):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return [importlib.import_module(name) for name in names]
        except ModuleNotFoundError as error:
            pytest.skip(f"{names[0].split('.')[0]} cannot be used here: {error}")

    modules("torch")
    yield modules
    for name in list(sys.modules):
        if name.split(".")[0] in ("torch_fidelity", "torchmetrics") and name not in before:
            del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(scope="module", params=["random", "shipped"])
def sets(request):
    """(generated [n,D], real [n,D], logits [n,10]), float32."""
    rng = np.random.default_rng(0)
    if request.param == "random":
        mixing = rng.normal(size=(2, 48, 48)) / 7
        generated = rng.normal(0.2, 1.0, (500, 48)) @ mixing[0]
        real = rng.normal(0.0, 1.0, (500, 48)) @ mixing[1]
    else:
        reference = feature_networks.load_reference()
        real = reference.train_features[:1200]
        generated = reference.test_features[:1200] + rng.normal(0.0, 0.3, (1200, 64))
    logits = generated[:, :10] * 2.0
    return tuple(np.asarray(x, np.float32) for x in (generated, real, logits))


def _tensors(load, *arrays, dtype="float64"):
    (torch,) = load("torch")
    return [torch.from_numpy(array.astype(dtype)) for array in arrays]


def _ours(generated, real):
    return frechet.frechet_distance(*frechet.moments(generated), *frechet.moments(real))


def test_fid_equals_torch_fidelitys(load, sets):
    metric, *_ = load(*FIDELITY)
    x, y = _tensors(load, *sets[:2])
    statistics = [metric.fid_features_to_statistics(features) for features in (x, y)]
    theirs = metric.fid_statistics_to_metric(*statistics, verbose=False)
    assert _ours(*sets[:2]) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_fid_equals_torchmetrics(load, sets):
    metric, *_ = load(*TORCHMETRICS)
    moments = [frechet.moments(features) for features in sets[:2]]
    tensors = _tensors(load, *moments[0], *moments[1])
    assert _ours(*sets[:2]) == pytest.approx(float(metric._compute_fid(*tensors)), rel=1e-6)


def test_fid_of_fewer_images_than_dimensions_equals_torch_fidelitys(load, sets):
    """Their eigenvalues of a singular product carry noise whose roots add up: 1e-4 is the bound."""
    metric, *_ = load(*FIDELITY)
    few = sets[0][:30]
    statistics = [metric.fid_features_to_statistics(x) for x in _tensors(load, few, sets[1])]
    theirs = metric.fid_statistics_to_metric(*statistics, verbose=False)
    assert _ours(few, sets[1]) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


def test_kid_of_whole_sets_equals_both(load, sets):
    _, fidelity, *_ = load(*FIDELITY)
    ours = kernel_distance(*sets[:2]).value
    theirs = fidelity.kernel_mmd(*(x.astype(np.float64) for x in sets[:2]))
    assert ours == pytest.approx(theirs, rel=1e-9)
    _, kid, _ = load(*TORCHMETRICS)
    theirs = kid.poly_mmd(*_tensors(load, sets[1], sets[0]))
    assert ours == pytest.approx(float(theirs), rel=1e-9)


def test_kid_over_subsets_equals_torch_fidelitys(load, sets):
    """Also its subsets: the same draws from the same seed."""
    _, metric, *_ = load(*FIDELITY)
    theirs = metric.kid_features_to_metric(
        *_tensors(load, *sets[:2]), kid_subsets=12, kid_subset_size=100, verbose=False
    )
    mean, deviation = subset_kernel_distance(*sets[:2], subset_size=100, num_subsets=12)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


@pytest.mark.parametrize("splits", [1, 7, 10])
def test_inception_score_equals_torch_fidelitys(load, sets, splits):
    """7 does not divide the number of images; their images are shuffled before the split."""
    metric = load(*FIDELITY)[2]
    theirs = metric.isc_features_to_metric(*_tensors(load, sets[2]), splits=splits)
    ours = inception_score(sets[2], splits=splits, shuffle_seed=2020)
    assert ours == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_inception_score_equals_torchmetrics(load, sets):
    """With one split: theirs are cut by another shuffle, from torch's global generator."""
    (torch,) = load("torch")
    metric = load(*TORCHMETRICS)[2]

    class Identity(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on memory, and on the deviation of one split
        score = metric.InceptionScore(feature=Identity(), splits=1)
        score.update(_tensors(load, sets[2], dtype="float32")[0][:, :, None, None])
        theirs = float(score.compute()[0])
    assert inception_score(sets[2]) == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("save_memory", [True, False])
def test_precision_and_recall_equal_torch_fidelitys(load, sets, save_memory):
    metric = load(*FIDELITY)[3]
    theirs = metric.prc_features_to_metric(
        *_tensors(load, *sets[:2]), prc_neighborhood=3, prc_batch_size=400,
        save_cpu_ram=save_memory, verbose=False,
    )  # fmt: skip
    ours = precision_recall(*sets[:2])
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
    assert 0.0 < ours[0] < 1.0
