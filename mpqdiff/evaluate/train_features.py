"""Trains the shipped feature network on Fashion-MNIST and writes its reference statistics.

    python -m mpqdiff.evaluate.train_features --data_dir=DATA --out=mpqdiff/weights/zoo

writes `fashion_classifier.safetensors`, its model card and `fashion_reference.npz` into OUT.
AdamW on the cross entropy with a cosine schedule; the only augmentation is a shift.
"""

import io
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax.traverse_util import flatten_dict
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from tqdm import tqdm

from mpqdiff import data
from mpqdiff.errors import InputError
from mpqdiff.evaluate import features

NAME, REFERENCE = "fashion_classifier", "fashion_reference"
MAX_SHIFT = 1  # pixel
SAMPLE = {"train": 4000, "test": 5000}  # features kept, per split


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`images` [n,H,W,C], each moved by up to MAX_SHIFT pixels a side, filled with zeros."""
    n, height, width, _ = images.shape
    pad = (MAX_SHIFT, MAX_SHIFT)
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(images, ((0, 0), pad, pad, (0, 0))), (height, width), axis=(1, 2)
    )
    rows, columns = rng.integers(0, 2 * MAX_SHIFT + 1, (2, n))
    return np.moveaxis(windows[np.arange(n), rows, columns], 1, -1)


def train(images, labels, *, epochs, batch, learning_rate, weight_decay, seed):
    """Parameters of the network after `epochs` over `images` uint8 [n,28,28,1], `labels` [n]."""
    if len(images) < batch:
        raise InputError(f"--batch={batch} exceeds the {len(images)} training images: lower it")
    module = features.NETWORKS[NAME]
    params = module.init(jax.random.key(seed), jnp.asarray(images[:1]))["params"]
    per_epoch = len(images) // batch
    total = epochs * per_epoch
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(200, total // 2), total)
    tx = optax.adamw(rate, weight_decay=weight_decay)
    opt_state = tx.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step_fn(params, opt_state, images, labels):
        def loss_fn(params):
            _, logits = features.forward(module, params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    with tqdm(total=total, desc="train", unit="step", mininterval=2.0) as bar:
        for epoch in range(epochs):
            rng = np.random.default_rng([seed, epoch])
            order, losses = rng.permutation(len(images)), []
            for rows in order[: per_epoch * batch].reshape(per_epoch, batch):
                params, opt_state, loss = step_fn(
                    params, opt_state, shifted(images[rows], rng), labels[rows]
                )
                losses.append(loss)
                bar.update()
            mean = float(jnp.mean(jnp.stack(losses)))
            if not np.isfinite(mean):
                raise InputError(f"loss is {mean} in epoch {epoch}: lower --learning_rate")
            bar.write(f"epoch {epoch + 1}: mean loss {mean:.4f}")
    return params


def statistics(network, images, labels, *, split, seed) -> dict:
    """The entries of one split in the reference file (see `features.Reference`)."""
    values, _ = features.extract(network, images)
    count = min(SAMPLE[split], len(images))
    rng = np.random.default_rng([seed, len(images)])
    rows = np.sort(rng.choice(len(images), count, replace=False)).astype(np.int32)
    return {
        f"{split}_mean": values.mean(0, dtype=np.float64),
        f"{split}_cov": np.cov(values.astype(np.float64), rowvar=False),
        f"{split}_features": values[rows].astype(np.float16),
        f"{split}_labels": labels[rows].astype(np.int32),
        f"{split}_indices": rows,
    }


def write_reference(out: Path, network, sets, *, seed) -> None:
    """Write `fashion_reference.npz` into `out`; `sets` has (images, labels) by split."""
    header = {"network": network.name, "network_hash": network.hash}
    arrays = {}
    for split, (images, labels) in sets.items():
        header[f"num_{split}"] = len(images)
        arrays |= statistics(network, images, labels, split=split, seed=seed)
    stream = io.BytesIO()
    np.savez_compressed(stream, header=np.asarray(json.dumps(header)), **arrays)
    write_bytes(out / f"{REFERENCE}.npz", stream.getvalue())


def write_bytes(path: Path, payload: bytes) -> None:
    """Write `payload` as `path`, complete or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(payload)
    os.replace(temporary, path)


CARD = """# {name}

A small convolutional classifier of Fashion-MNIST whose {num_features}-dimensional penultimate
layer is the feature space of metrics that need neither a network nor a data set. It does not
stand in for Inception: a number in this space carries this name, and compares with other numbers
in this space only.

| | |
|---|---|
| input | uint8 [n, {shape}], scaled inside to [-1, 1] |
| convolutions | {convolutions} as (width, window, max pooling), then GroupNorm(8), ReLU |
| linear layers | {num_features} (the features, no activation), {num_classes} (logits) |
| parameters | {parameters:,}, stored as float16 ({size:,} bytes), computed in float32 |
| data | Fashion-MNIST (Zalando SE, MIT licence), {num_train:,} training images |
| command | `python -m mpqdiff.evaluate.train_features --data_dir=DATA --out=OUT {flags}` |
| training | AdamW, cosine schedule after 200 steps of warm-up, shifts of up to {shift} pixel |
| epochs, batch | {epochs}, {batch} |
| learning rate, weight decay | {learning_rate}, {weight_decay} |
| seed | {seed} |
| training time | {seconds:.0f} s on {device} |
| test accuracy | {test_accuracy:.4f} on {num_test:,} images, with the float16 weights |
| training accuracy | {train_accuracy:.4f} |
| versions | jax {jax}, flax {flax}, optax {optax} |
| sha256 | `{sha256}` |

`{reference}.npz` holds, for these weights: mean and covariance (float64, divided by n - 1) of the
features of all {num_train:,} training and {num_test:,} test images, and features (float16), labels
and indices of {sample_train:,} training and {sample_test:,} test images drawn without replacement
with the same seed. The test images played no part in training; 4,000 of them served to choose
between variants of layers, batch and learning rate after half an epoch.
"""


def run(data_dir: str | None, out: Path, settings: dict) -> None:
    """Train, measure and write the three files into `out`. `settings` are those of `train`."""
    out.mkdir(parents=True, exist_ok=True)
    sets = {
        split: data.load("fashion_mnist", directory=data_dir, split=split) for split in data.SPLITS
    }
    start = time.perf_counter()
    params = train(*sets["train"], **settings)
    seconds = time.perf_counter() - start
    tensors = {k: np.asarray(v, np.float16) for k, v in flatten_dict(params, sep="/").items()}
    payload = save_tensors(tensors)
    write_bytes(out / f"{NAME}.safetensors", payload)
    network = features.load(NAME, folder=out)
    accuracy = {}
    for split, (images, labels) in sets.items():
        _, logits = features.extract(network, images)
        accuracy[f"{split}_accuracy"] = float(np.mean(logits.argmax(1) == labels))
    write_reference(out, network, sets, seed=settings["seed"])
    card = model_card(network, payload, sets, settings, accuracy | {"seconds": seconds})
    write_bytes(out / f"{NAME}.md", card.encode())
    print(json.dumps(accuracy | {"sha256": network.hash}))


def model_card(network, payload, sets, settings, measured) -> str:
    """The text of the card; `measured` are the accuracies and the training time, by name."""
    module = features.NETWORKS[NAME]
    return CARD.format(
        name=NAME,
        reference=REFERENCE,
        num_features=module.num_features,
        num_classes=module.num_classes,
        shape=", ".join(map(str, module.image_shape)),
        convolutions=", ".join(map(str, module.convolutions)),
        parameters=sum(tensor.size for tensor in load_tensors(payload).values()),
        size=len(payload),
        flags=" ".join(f"--{name}={value}" for name, value in settings.items()),
        shift=MAX_SHIFT,
        device=f"{jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)",
        jax=jax.__version__,
        flax=flax.__version__,
        optax=optax.__version__,
        sha256=network.hash,
        **{f"num_{split}": len(labels) for split, (_, labels) in sets.items()},
        **{f"sample_{split}": min(SAMPLE[split], len(sets[split][1])) for split in sets},
        **settings,
        **measured,
    )


def main(_) -> int:
    names = ("epochs", "batch", "learning_rate", "weight_decay", "seed")
    settings = {name: getattr(flags.FLAGS, name) for name in names}
    try:
        run(flags.FLAGS.data_dir or None, Path(flags.FLAGS.out), settings)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def define_flags() -> None:
    """Not on import, where the names could meet those of another program."""
    flags.DEFINE_string("data_dir", None, "Folder that holds fashion_mnist/; empty: download.")
    flags.DEFINE_string("out", None, "Folder for the weights, the card and the reference.")
    flags.DEFINE_integer("epochs", 10, "Passes over the 60 000 training images.", lower_bound=1)
    flags.DEFINE_integer("batch", 32, "Images per step.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 2e-3, "Peak learning rate of AdamW.")
    flags.DEFINE_float("weight_decay", 0.05, "Decoupled weight decay of AdamW.")
    flags.DEFINE_integer("seed", 0, "Seed of weights, order, shifts and the kept features.")
    flags.mark_flags_as_required(["data_dir", "out"])


if __name__ == "__main__":
    define_flags()
    app.run(main)
