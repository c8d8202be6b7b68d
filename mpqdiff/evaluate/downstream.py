"""What FID alone hides: are the images still good for something, and still of the same class?

Downstream accuracy (classification accuracy score, Ravuri and Vinyals 2019): of a classifier that
saw generated images and their labels only, on real ones. The same classifier, from the same initial
weights and with the same order of rows, is trained on the float model's samples; the difference is
what the plan did. Class agreement needs no real image: the share of seeds on which the shipped
classifier gives the float and the planned sample the same class.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from mpqdiff import data
from mpqdiff.errors import InputError
from mpqdiff.evaluate.classifier import ImageClassifier
from mpqdiff.evaluate.features import forward
from mpqdiff.evaluate.intervals import NORMAL_95, proportion_interval, t_quantile
from mpqdiff.evaluate.statistics import finite_features
from mpqdiff.evaluate.train_features import shifted

# Smaller than the shipped network, for it is trained several times over.
CONVOLUTIONS = ((16, 3, 2), (32, 3, 2))
POOLED = 4  # how many times smaller a side is behind them
FEATURES = 64
BATCH = 50
_TX = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.05))
_RATE, _WARMUP = 2e-3, 0.1  # at its peak; share of the steps before that


class Real(NamedTuple):
    """Images uint8 [n,H,W,C] and labels int32 [n] that none of the models was trained on."""

    images: np.ndarray
    labels: np.ndarray


def real_images(
    name: str, *, directory: str | Path | None = None, cache: str | Path | None = None
) -> Real | None:
    """The test split of data set `name` from archives in `directory/<name>/`, or as prepared
    earlier in `cache`; None where there is neither. Never downloads.

    Raises InputError on archives or a cache that are damaged.
    """
    if name not in data.DATASETS:
        return None
    prepared = data.default_cache() if cache is None else Path(cache)
    folder = None if directory is None else Path(directory)
    if folder and (folder / name).is_dir():
        return Real(*data.load(name, directory=folder, cache=prepared, split="test"))
    for source, folder in (("local", Path()), ("download", None)):
        version = prepared / name / source / data.DATASETS[name].version
        arrays = version.with_name(f"{version.name}-test.npz")
        if arrays.exists() or (version / "dataset_info.json").exists():
            return Real(*data.load(name, directory=folder, cache=prepared, split="test"))
    return None


def correct(
    images, labels, real: Real, *, num_classes: int, seeds: Sequence[int] = (0, 1, 2), epochs=10
) -> np.ndarray:
    """Which of the `real` images a classifier trained on generated ones gets right: bool [S,n].

    One classifier per seed, from that seed's weights and order of rows: equal seeds pair arms.
    `images` uint8 [m,H,W,C] with `labels` [m]. Raises InputError on arrays that do not fit each
    other or `real`, labels outside `num_classes`, fewer than 50 images, sides that 4 does not
    divide, no seed, and a loss that is not finite.
    """
    images, labels = _checked(images, labels, num_classes, "generated")
    tests, answers = _checked(real.images, real.labels, num_classes, "real")
    if images.shape[1:] != tests.shape[1:] or len(images) < BATCH or not len(seeds) or epochs < 1:
        raise InputError(
            f"got {len(images)} images of shape {images.shape[1:]} for real ones of "
            f"{tests.shape[1:]}, {len(seeds)} seeds, {epochs} epochs; expected equal shapes, at "
            f"least {BATCH} images, a seed and an epoch"
        )
    module = ImageClassifier(images.shape[1:], CONVOLUTIONS, FEATURES, num_classes)
    rows = []
    for seed in tqdm(seeds, desc="downstream classifiers", delay=2.0):
        params = _fit(module, images, labels, seed=seed, epochs=epochs)
        rows.append(_classes(module, params, tests) == answers)
    return np.stack(rows)


def downstream(right, float_right) -> dict[str, Any]:
    """The numbers of two arms' `correct` [S,n] on shared seeds and the same real images.

    `downstream_accuracy`, `downstream_accuracy_float`, `downstream_delta` (the first minus the
    second) and `downstream_delta_ci`, 95 %: t over the seeds' differences and normal over the
    images', added in quadrature. It holds for these samples: others of the same models would add
    their own scatter. With one seed the interval is None; with no real images (None for either)
    all are.
    """
    names = ("accuracy", "accuracy_float", "delta", "delta_ci")
    numbers: dict[str, Any] = {f"downstream_{name}": None for name in names}
    if right is None or float_right is None:
        return numbers
    right, float_right = np.asarray(right, np.float64), np.asarray(float_right, np.float64)
    if right.shape != float_right.shape or right.ndim != 2 or right.shape[1] < 2:
        raise InputError(
            f"got {right.shape} and {float_right.shape} answers, expected equal [seeds, images]: "
            "train both arms' classifiers with the same seeds and test them on the same images"
        )
    numbers["downstream_accuracy"] = float(right.mean())
    numbers["downstream_accuracy_float"] = float(float_right.mean())
    difference = right - float_right
    numbers["downstream_delta"] = delta = float(difference.mean())
    if len(difference) > 1:
        by_seed, by_image = difference.mean(axis=1), difference.mean(axis=0)
        errors = [_standard_error(by_seed), _standard_error(by_image)]
        half = float(np.hypot(t_quantile(len(by_seed) - 1) * errors[0], NORMAL_95 * errors[1]))
        numbers["downstream_delta_ci"] = [delta - half, delta + half]
    return numbers


def class_agreement(logits, float_logits) -> dict[str, Any]:
    """`class_agreement`, the share of rows of `logits` and `float_logits` [n,classes] with the
    same largest entry, and `class_agreement_ci`, its 95 % Wilson interval.

    Raises InputError on other or different shapes, no row, or values that are not finite.
    """
    a, b = finite_features(logits, "logits"), finite_features(float_logits, "float logits")
    if a.shape != b.shape or not len(a):
        raise InputError(
            f"got logits {a.shape} and {b.shape}, expected equal [n,classes] with n >= 1: pass the "
            "images of the seeds that both arms have"
        )
    found = proportion_interval(int(np.count_nonzero(a.argmax(1) == b.argmax(1))), len(a))
    return {"class_agreement": found.value, "class_agreement_ci": found.ends}


def _fit(module: ImageClassifier, images, labels, *, seed: int, epochs: int):
    """Parameters after `epochs`: AdamW, warm-up and cosine, shifts of a pixel."""
    params: Any = module.init(jax.random.key(seed), jnp.asarray(images[:1]))["params"]
    opt_state = _TX.init(params)
    per_epoch = len(images) // BATCH
    total = epochs * per_epoch
    rates = optax.warmup_cosine_decay_schedule(0.0, _RATE, max(1, int(_WARMUP * total)), total)
    loss = jnp.zeros(())
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(images))[: per_epoch * BATCH].reshape(per_epoch, BATCH)
        for step, rows in enumerate(order, epoch * per_epoch):
            moved = shifted(images[rows], rng)
            params, opt_state, loss = _step(
                module, params, opt_state, moved, labels[rows], rates(step)
            )
    if not np.isfinite(float(loss)):
        raise InputError(f"the downstream classifier's loss is {float(loss)} (seed {seed})")
    return params


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _step(module, params, opt_state, images, labels, rate):
    def loss_fn(params):
        _, logits = forward(module, params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = _TX.update(grads, opt_state, params)
    updates = jax.tree.map(lambda update: -rate * update, updates)
    return optax.apply_updates(params, updates), opt_state, loss


def _classes(module: ImageClassifier, params, images, *, batch: int = 500) -> np.ndarray:
    found = []
    for start in range(0, len(images), batch):
        rows = images[start : start + batch]
        padded = np.pad(rows, ((0, batch - len(rows)), (0, 0), (0, 0), (0, 0)))
        found.append(np.asarray(forward(module, params, padded)[1])[: len(rows)].argmax(1))
    return np.concatenate(found)


def _checked(images, labels, num_classes: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.asarray(images), np.asarray(labels)
    whole = images.ndim == 4 and len(images) and not any(s % POOLED for s in images.shape[1:3])
    if images.dtype != np.uint8 or not whole:
        raise InputError(
            f"got {kind} images {images.dtype} of shape {images.shape}, expected uint8 [n,H,W,C] "
            f"with sides that {POOLED} divides"
        )
    in_range = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
    if not in_range or labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"got {kind} labels {labels.dtype} of shape {labels.shape} for {len(images)} images; "
            f"expected one integer each, from 0 to {num_classes - 1}"
        )
    return images, labels.astype(np.int32)


def _standard_error(values) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))
