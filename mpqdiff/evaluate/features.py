"""Feature networks that map uint8 images to features and logits, and the shipped reference.

The one boundary between sampling and metrics: images enter as uint8 only, so that no metric sees
a value that a picture file could not hold. Every metric carries the network's name, for numbers
are comparable on the same network and the same reference alone.
"""

import hashlib
import io
import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
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
from mpqdiff.evaluate import inception, inception_weights
from mpqdiff.evaluate.classifier import ImageClassifier

ZOO = Path(__file__).parents[1] / "weights" / "zoo"
UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)


NETWORKS = {
    "fashion_classifier": ImageClassifier(
        image_shape=(28, 28, 1),
        convolutions=((32, 3, 2), (64, 3, 2), (64, 3, 1)),
        num_features=64,
        num_classes=10,
    )
}


class Features(NamedTuple):
    """What a network says of n images, float32 arrays of n rows."""

    features: Any  # [n,D]
    logits: Any  # [n,classes]
    spatial: Any = None  # [n,S], of sFID; None where the network has none


class FeatureNetwork(NamedTuple):
    """A network with its weights; `apply` compiles once per n (Inception's resize once per size).

    A distance in its features is FID, without a qualifier, where `is_fid` says so; `name` tells
    the network, its way with pixels, and weights that are not the public ones.
    """

    name: str
    hash: str  # sha256 of the weights file, with the way with pixels where it is not the usual one
    apply: Callable[[Any], Features]  # of images uint8 [n,H,W,C]
    image_shape: tuple[int, int, int] | None  # None: any height and width, 1 or 3 channels
    batch: int = 500  # images at a time
    is_fid: bool = False

    def accepts(self, image_shape: Sequence[int]) -> bool:
        """Whether images of this (H, W, C) can be put in."""
        if self.image_shape is not None:
            return tuple(image_shape) == self.image_shape
        return len(image_shape) == 3 and min(image_shape) > 0 and image_shape[2] in (1, 3)


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
def forward(module: nn.Module, params, images) -> tuple[jax.Array, ...]:
    """The outputs of `module` for `images` [n,H,W,C] under `params`; compiled once per n."""
    return cast(Any, module.apply({"params": params}, images))


def load(
    name: str = "fashion_classifier", *, weights: str | Path | None = None, folder: Path = ZOO
) -> FeatureNetwork:
    """The feature network `name`: an embedded one, weights from `folder/name.safetensors`, or an
    Inception-v3 (`inception.CONVENTIONS`) with the public file, or one like it, at `weights`.

    Weights other than the public file's are used under the name `name_unverified`, with a
    warning. Raises InputError on an unknown name, on `weights` missing or not wanted, and on a
    file that is missing, cut short, of other shapes than the network's, or not finite.
    """
    if name in inception.CONVENTIONS:
        return _load_inception(name, weights)
    if name not in NETWORKS:
        raise unknown_name("feature network", name, (*NETWORKS, *inception.CONVENTIONS))
    if weights:
        raise InputError(
            f"weights={str(weights)!r}: {name} has weights of its own; leave them out, or name one "
            f"of {', '.join(inception.CONVENTIONS)}"
        )
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
    return FeatureNetwork(name, digest, partial(_apply, module, params), module.image_shape)


def _apply(module: nn.Module, params, images) -> Features:
    return Features(*forward(module, params, images))


def _apply_inception(params, images, *, convention: str) -> Features:
    return _apply(inception.Inception(), params, inception.prepare(images, convention=convention))


def _load_inception(name: str, weights: str | Path | None) -> FeatureNetwork:
    if not weights:
        raise InputError(
            f"feature network {name!r} ships no weights and downloads none; name "
            "(--features.weights=FILE, config.evaluate.weights) "
            "pt_inception-2015-12-05-6726825d.pth (pytorch-fid's name) or "
            "weights-inception-2015-12-05-6726825d.pth (torch-fidelity's), or of its conversion"
        )
    params, digest, is_fid = inception_weights.read(weights)
    if not is_fid:
        warnings.warn(
            f"{weights} is not the public file of FID (sha256 {digest[:8]}, not "
            f"{inception_weights.FID_SHA256}): its numbers are of {name}_unverified, not FID",
            stacklevel=3,
        )
    return FeatureNetwork(
        name=name if is_fid else f"{name}_unverified",
        hash=digest if name == inception.DEFAULT else f"{digest}-{name}",
        apply=partial(_apply_inception, params, convention=name),
        image_shape=None,
        batch=inception.BATCH,
        is_fid=is_fid,
    )


def stream(
    network: FeatureNetwork, images: np.ndarray, *, batch: int | None = None
) -> Iterator[Features]:
    """Outputs of `images` uint8 [n,H,W,C], `batch` (default: the network's) rows at a time.

    Only one batch is ever held as float; the last is padded, so that the network compiles once.
    Raises InputError on images that are not uint8, not of the network's shape, or none at all.
    """
    batch = network.batch if batch is None else batch
    shape, dtype = np.shape(images), getattr(images, "dtype", type(images).__name__)
    if dtype != np.uint8 or not network.accepts(shape[1:]) or shape[0] == 0 or batch < 1:
        wanted = map(str, network.image_shape or ("H", "W", "1 or 3"))
        raise InputError(
            f"images of shape {shape}, type {dtype}, batch={batch}: {network.name} takes uint8 "
            f"[n, {', '.join(wanted)}] with n and batch at least 1; round samples to uint8 first"
        )
    starts = range(0, shape[0], batch)
    text, single = f"features ({network.name})", len(starts) == 1
    for start in tqdm(starts, desc=text, delay=2.0, disable=single):
        rows = np.asarray(images[start : start + batch])
        padded = np.pad(rows, ((0, batch - len(rows)), (0, 0), (0, 0), (0, 0)))
        outputs = network.apply(padded)
        yield Features(*(None if x is None else np.asarray(x)[: len(rows)] for x in outputs))


def collect(network: FeatureNetwork, images: np.ndarray, *, batch: int | None = None) -> Features:
    """All outputs of `images` at once, as `stream` gives them: some 20 kB an image for Inception.
    Statistics of many images are better taken from `stream`."""
    return Features(*_gather(stream(network, images, batch=batch), len(images)))


def extract(
    network: FeatureNetwork, images: np.ndarray, *, batch: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [n,D] and logits float32 [n,classes] of `images`, as `collect` without the
    spatial ones."""
    outputs = (part._replace(spatial=None) for part in stream(network, images, batch=batch))
    features, logits, _ = _gather(outputs, len(images))
    return features, logits


def _gather(parts: Iterator[Features], n: int) -> list:
    """One array of n rows per field, filled in place: `concatenate` would need twice the room."""
    filled, whole = 0, []
    for part in parts:
        whole = whole or [None if x is None else np.empty((n, *x.shape[1:]), x.dtype) for x in part]
        count = len(part.features)
        for rows, array in zip(part, whole, strict=True):
            if array is not None:
                array[filled : filled + count] = rows
        filled += count
    return whole


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
