"""Feature networks that map uint8 images to features and logits, and the shipped reference.

The one boundary between sampling and metrics: images enter as uint8 only, so that no metric sees
a value that a picture file could not hold. Every metric carries the network's name, for numbers
are comparable on the same network and the same reference alone.
"""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from tqdm import tqdm

from mpqdiff.errors import InputError, unknown_name

ZOO = Path(__file__).parents[1] / "weights" / "zoo"
UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)


class ImageClassifier(nn.Module):
    """Convolutions with max pooling, a linear layer of `num_features`, a linear head over it.

    The penultimate layer has no activation of its own: its covariance then has full rank, where
    rectified units that never fire would make it singular. Products run at the highest
    precision, so that features agree between CPU, GPU and TPU.
    """

    image_shape: tuple[int, int, int]
    convolutions: tuple[tuple[int, int, int], ...]  # (width, window, pool size)
    num_features: int
    num_classes: int

    @nn.compact
    def __call__(self, images):
        """`images` uint8 [n,H,W,C] -> (features float32 [n,D], logits float32 [n,classes])."""
        x = images.astype(jnp.float32) / 127.5 - 1.0
        for width, window, pool in self.convolutions:
            x = nn.Conv(width, (window, window), use_bias=False, precision="highest")(x)
            n, height, breadth, _ = x.shape
            x = x.reshape(n, height // pool, pool, breadth // pool, pool, width).max((2, 4))
            x = nn.relu(nn.GroupNorm(8)(x))
        x = x.reshape(x.shape[0], -1)
        features = nn.Dense(self.num_features, precision="highest", name="features")(x)
        logits = nn.Dense(self.num_classes, precision="highest", name="logits")(features)
        return features, logits


NETWORKS = {
    "fashion_classifier": ImageClassifier(
        image_shape=(28, 28, 1),
        convolutions=((32, 3, 2), (64, 3, 2), (64, 3, 1)),
        num_features=64,
        num_classes=10,
    )
}


class FeatureNetwork(NamedTuple):
    """`apply(images uint8 [n,H,W,C]) -> (features [n,D], logits [n,classes])`, compiled once per
    n; `hash` is the sha256 of the weights file, by which references are matched."""

    name: str
    hash: str
    apply: Callable[[Any], tuple[jax.Array, jax.Array]]
    image_shape: tuple[int, int, int]


class Reference(NamedTuple):
    """Feature statistics of the real images, float64, and a random sample of their features.

    Covariances are unbiased (divided by n - 1) over all `num_train` or `num_test` images; the
    samples, drawn without replacement, are float16 values held as float32.
    """

    train_mean: np.ndarray  # float64 [D]
    train_cov: np.ndarray  # float64 [D,D]
    test_mean: np.ndarray
    test_cov: np.ndarray
    train_features: np.ndarray  # float32 [n,D]
    test_features: np.ndarray
    train_labels: np.ndarray  # int32 [n], of the sampled images
    test_labels: np.ndarray
    train_indices: np.ndarray  # int32 [n], their places in the data set
    test_indices: np.ndarray
    network: str
    network_hash: str
    num_train: int
    num_test: int


@partial(jax.jit, static_argnums=0)
def forward(module: ImageClassifier, params, images) -> tuple[jax.Array, jax.Array]:
    """Features and logits of `images` uint8 [n,H,W,C] under `params`; compiled once per n."""
    return cast(Any, module.apply({"params": params}, images))


def load(name: str = "fashion_classifier", *, folder: Path = ZOO) -> FeatureNetwork:
    """The shipped feature network `name`, weights from `folder/name.safetensors`.

    Raises InputError on an unknown name, and on weights that are missing, cut short, of other
    shapes than the network's, or not finite.
    """
    if name not in NETWORKS:
        raise unknown_name("feature network", name, NETWORKS)
    module = NETWORKS[name]
    path = Path(folder) / f"{name}.safetensors"
    payload = _read(path)
    try:
        found = load_tensors(payload)
    except (SafetensorError, ValueError) as error:
        raise _unusable(path, f"not a complete safetensors file: {error}") from error
    images = jax.ShapeDtypeStruct((1, *module.image_shape), jnp.uint8)
    variables: Any = jax.eval_shape(module.init, jax.random.key(0), images)
    expected = jax.tree.map(lambda leaf: leaf.shape, variables["params"])
    shapes = {key: tensor.shape for key, tensor in found.items()}
    if shapes != flatten_dict(expected, sep="/"):
        raise _unusable(path, f"tensors {shapes}, expected those of network {name!r}")
    bad = [key for key, tensor in found.items() if not np.isfinite(tensor).all()]
    if bad:
        raise _unusable(path, f"values that are not finite in {', '.join(bad)}")
    params = unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in found.items()}, sep="/")
    digest = hashlib.sha256(payload).hexdigest()
    return FeatureNetwork(name, digest, partial(forward, module, params), module.image_shape)


def extract(
    network: FeatureNetwork, images: np.ndarray, *, batch: int = 500
) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [n,D] and logits float32 [n,classes] of `images` uint8 [n,H,W,C].

    Works in batches of `batch`, the last one padded, so that the network compiles once. Raises
    InputError on images that are not uint8, not of the network's shape, or none at all.
    """
    shape, dtype = np.shape(images), getattr(images, "dtype", type(images).__name__)
    if dtype != np.uint8 or shape[1:] != network.image_shape or shape[0] == 0 or batch < 1:
        raise InputError(
            f"images of shape {shape}, type {dtype}, batch={batch}: {network.name} takes uint8 "
            f"[n, {', '.join(map(str, network.image_shape))}] with n and batch at least 1; round "
            "samples to uint8 first"
        )
    outputs = []
    for start in tqdm(range(0, shape[0], batch), desc=f"features ({network.name})", delay=2.0):
        rows = np.asarray(images[start : start + batch])
        padded = np.pad(rows, ((0, batch - len(rows)), (0, 0), (0, 0), (0, 0)))
        outputs.append([np.asarray(out)[: len(rows)] for out in network.apply(padded)])
    features, logits = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
    return features, logits


def load_reference(
    name: str = "fashion_reference", *, network: FeatureNetwork | None = None, folder: Path = ZOO
) -> Reference:
    """The reference statistics in `folder/name.npz`, for use with `network` (default: the one
    that they name, from the same folder).

    Raises InputError where the file is missing, corrupted, not finite, or made by other weights
    than `network`'s.
    """
    path = Path(folder) / f"{name}.npz"
    payload = _read(path)
    try:
        with np.load(io.BytesIO(payload), allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        header = json.loads(str(arrays.pop("header")))
        fields = header | {key: _widen(array) for key, array in arrays.items()}
        reference = Reference(**fields)
    except UNREADABLE as error:
        raise _unusable(path, f"not a complete reference file: {error}") from error
    _check_reference(reference, path)
    network = network or load(reference.network, folder=folder)
    if network.hash != reference.network_hash:
        raise InputError(
            f"{path} was made with {reference.network} of hash {reference.network_hash}, the "
            f"network at hand is {network.name} of hash {network.hash}: features of different "
            "weights cannot be compared; use the reference made with these weights"
        )
    return reference


def _widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _check_reference(reference: Reference, path: Path) -> None:
    width = reference.train_mean.shape[:1]
    for split in ("train", "test"):
        mean, cov, features, labels, indices = (
            getattr(reference, f"{split}_{part}")
            for part in ("mean", "cov", "features", "labels", "indices")
        )
        count = features.shape[:1]
        expected = (width, width + width, count + width, count, count)
        if tuple(array.shape for array in (mean, cov, features, labels, indices)) != expected:
            raise _unusable(path, f"shapes of the {split} statistics do not agree")
        if not all(np.isfinite(array).all() for array in (mean, cov, features)):
            raise _unusable(path, f"values that are not finite in the {split} statistics")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error}") from error


def _unusable(path: Path, problem: str) -> InputError:
    return InputError(
        f"{path}: {problem}. Reinstall the package, or make the file again with "
        "python -m mpqdiff.evaluate.train_features"
    )
