"""Training a denoiser: AdamW, EMA, uniform or min-SNR weight, resume after a kill.

Loss (Ho et al. 2020, eq. 14): E_{x_0, t, eps} w_t ||target - network(x_t, t, c)||^2, the target
being eps, x_0 or v. w = 1, or that of min-SNR-5 (Hang et al. 2023, arXiv 2303.09556): min(SNR_t, 5)
for x_0, over SNR_t for eps, over SNR_t + 1 for v.
Every random draw of step i comes from `fold_in(key, i)` and every epoch's order from
(seed, epoch), so a resumed run repeats an uninterrupted one.
"""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from mpqdiff import checkpoint
from mpqdiff.denoiser import Denoise
from mpqdiff.diffusion.process import q_sample, snr, velocity
from mpqdiff.errors import InputError, unknown_name
from mpqdiff.images import from_uint8

LOSS_WEIGHTS = {
    "uniform": lambda abar, prediction_type: jnp.ones_like(abar),
    "min_snr": lambda abar, prediction_type: (
        jnp.minimum(snr(abar), 5.0) / SNR_SCALE[prediction_type](snr(abar))
    ),
}
SNR_SCALE = {"eps": lambda ratio: ratio, "x_0": jnp.ones_like, "v": lambda ratio: ratio + 1.0}
# What the network is trained to give, of x_0 and eps at t.
TARGETS = {
    "eps": lambda x_0, t, eps, abar: eps,
    "x_0": lambda x_0, t, eps, abar: x_0,
    "v": velocity,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class TrainState(NamedTuple):
    """Everything a resumed run needs: `step` [] int32, parameters, their EMA, optimiser state."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation of `count` examples used in `epoch`."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def make_step(
    denoise: Denoise,
    tx,
    *,
    alphas_cumprod,
    weights,
    dtype,
    ema_decay,
    null,
    dropout,
    prediction_type="eps",
):
    """The jitted update `(state, images [B,H,W,C] uint8, labels [B], key) -> (state, loss)`."""
    abar = jnp.asarray(alphas_cumprod)

    target = TARGETS[prediction_type]

    def loss_fn(params, x_0, labels, key):
        key_t, key_eps, key_drop = jax.random.split(key, 3)
        t = jax.random.randint(key_t, labels.shape, 0, abar.shape[0])
        eps = jax.random.normal(key_eps, x_0.shape)
        labels = jnp.where(jax.random.bernoulli(key_drop, dropout, labels.shape), null, labels)
        x_t = q_sample(x_0, t, eps, abar).astype(dtype)
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        error = denoise(cast, x_t, t, labels).eps.astype(jnp.float32) - target(x_0, t, eps, abar)
        return jnp.mean(weights[t] * jnp.mean(error**2, axis=(1, 2, 3)))

    @partial(jax.jit, donate_argnums=0)
    def step_fn(state: TrainState, images, labels, key):
        x_0 = from_uint8(images)
        key = jax.random.fold_in(key, state.step)
        loss, grads = jax.value_and_grad(loss_fn)(state.params, x_0, labels, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # The average starts quickly: with a fixed decay it would remember the initialisation.
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda a, b: decay * a + (1.0 - decay) * b, state.ema, params)
        return TrainState(state.step + 1, params, ema, opt_state), loss

    return step_fn


def train(
    denoise: Denoise,
    params,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    alphas_cumprod,
    num_classes: int,
    folder: Path,
    seed: int,
    epochs: int = 30,
    batch: int = 128,
    learning_rate: float = 1e-3,
    warmup_steps: int = 500,
    weight_decay: float = 0.0,
    ema_decay: float = 0.999,
    label_dropout: float = 0.1,
    loss_weight: str = "uniform",
    dtype: str = "float32",
    prediction_type: str = "eps",
    checkpoint_every: int = 500,
    log_every: int = 50,
) -> TrainState:
    """Train from `params` on `images` uint8 [n,H,W,C] and `labels` [n]; returns the last state.

    Writes `folder/checkpoints` (Orbax), `folder/train.jsonl` and TensorBoard events (where
    tensorboardX is installed). Continues from the newest checkpoint in `folder`.
    Raises InputError on an unknown loss weight or dtype, non-positive counts, or a loss that is
    not finite (with the step number).
    """
    if loss_weight not in LOSS_WEIGHTS:
        raise unknown_name("loss weight", loss_weight, LOSS_WEIGHTS)
    if prediction_type not in TARGETS:
        raise unknown_name("prediction type", prediction_type, TARGETS)
    if dtype not in DTYPES:
        raise unknown_name("training dtype", dtype, DTYPES)
    if min(epochs, batch, checkpoint_every, log_every) < 1 or len(images) < batch:
        raise InputError(
            f"epochs={epochs}, batch={batch}, checkpoint_every={checkpoint_every}, log_every="
            f"{log_every} must be positive and batch at most the {len(images)} training images"
        )
    per_epoch = len(images) // batch
    total = epochs * per_epoch
    warmup = min(warmup_steps, total // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, total, 0.0)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.99, weight_decay=weight_decay),
    )
    step_fn = make_step(
        denoise,
        tx,
        alphas_cumprod=alphas_cumprod,
        weights=LOSS_WEIGHTS[loss_weight](jnp.asarray(alphas_cumprod), prediction_type),
        dtype=DTYPES[dtype],
        ema_decay=ema_decay,
        null=num_classes,
        dropout=label_dropout,
        prediction_type=prediction_type,
    )
    # Copies, because each step donates its state and the caller may go on using `params`.
    own, ema = (jax.tree.map(jnp.array, params) for _ in range(2))
    state = TrainState(jnp.zeros((), jnp.int32), own, ema, tx.init(own))
    key = jax.random.key(seed)
    folder = Path(folder)
    with checkpoint.manager(folder / "checkpoints") as checkpoints, _Log(folder) as log:
        state = checkpoint.restore_latest(checkpoints, state) or state
        start = int(state.step)
        losses, since = [], time.perf_counter()
        bar = tqdm(range(start, total), initial=start, total=total, desc="train", unit="step")
        for index in bar:
            epoch, position = divmod(index, per_epoch)
            if position == 0 or index == start:
                order = epoch_order(seed, epoch, len(images))
            rows = order[position * batch : (position + 1) * batch]
            state, loss = step_fn(state, images[rows], labels[rows], key)
            losses.append(loss)  # fetched at the next log, so that dispatch stays asynchronous
            done = index + 1
            if done % log_every == 0 or done == total:
                mean = float(jnp.mean(jnp.stack(losses)))
                _check_loss(mean, done)
                elapsed = time.perf_counter() - since
                rate_now = len(losses) * batch / elapsed
                log.write(step=done, loss=mean, images_per_second=rate_now)
                bar.set_postfix(loss=f"{mean:.4f}", images_per_second=f"{rate_now:.0f}")
                losses, since = [], time.perf_counter()
            if done % checkpoint_every == 0 or done == total:
                # Between two logs: a checkpoint of a diverged run would end every resumed one.
                _check_loss(float(loss), done)
                checkpoint.save(checkpoints, done, state)
    return state


def _check_loss(loss: float, step: int) -> None:
    if not np.isfinite(loss):
        raise InputError(
            f"loss is {loss} at step {step}: lower learning_rate, or check images and weights"
        )


class _Log:
    """Scalars by step: one JSON line each, and TensorBoard events where tensorboardX is there."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = (folder / "train.jsonl").open("a")
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            self._events = None
        else:
            self._events = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._lines.close()
        if self._events:
            self._events.close()

    def write(self, *, step: int, **scalars: float) -> None:
        self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
        self._lines.flush()
        if self._events:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)
