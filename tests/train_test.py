"""Training on a problem small enough to see through, and what a kill leaves behind."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff.denoiser import Prediction
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.errors import InputError
from mpqdiff.train import LOSS_WEIGHTS, TARGETS, epoch_order, train

F, CLASSES = 10, 3
ABAR = alphas_cumprod("linear", F)
NULL = CLASSES


def denoise(params, x_t, t, labels):
    """The best linear guess of the noise, for data that is one image per class."""
    return Prediction(params["gain"][t][:, None, None, None] * x_t + params["shift"][labels])


def start():
    return {"gain": jnp.zeros(F), "shift": jnp.zeros((CLASSES + 1, 2, 2, 1))}


def data(count=24):
    labels = np.arange(count) % CLASSES
    images = np.random.default_rng(0).integers(0, 256, (CLASSES, 2, 2, 1), np.uint8)
    return images[labels], labels


def run(folder, *, params=None, model=denoise, images=None, **changes):
    settings = {
        "epochs": 4,
        "batch": 8,
        "learning_rate": 0.05,
        "warmup_steps": 2,
        "checkpoint_every": 4,
        "log_every": 3,
        "seed": 0,
        **changes,
    }
    given, labels = data()
    return train(
        model,
        start() if params is None else params,
        given if images is None else images,
        labels,
        alphas_cumprod=ABAR,
        num_classes=CLASSES,
        folder=folder,
        **settings,
    )


def log(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize(
    ("loss_weight", "dtype"),
    [("uniform", "float32"), ("min_snr", "float32"), ("uniform", "bfloat16")],
)
def test_loss_falls(tmp_path, loss_weight, dtype):
    state = run(
        tmp_path,
        epochs=40,
        log_every=10,
        checkpoint_every=1000,
        loss_weight=loss_weight,
        dtype=dtype,
    )
    losses = [entry["loss"] for entry in log(tmp_path)]
    assert int(state.step) == 120 and len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
    assert all(entry["images_per_second"] > 0 for entry in log(tmp_path))
    # Whatever the arithmetic, parameters and their average are kept in float32.
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {
        jnp.dtype("float32")
    }


def test_bfloat16_reaches_the_network(tmp_path):
    seen = set()

    def spy(params, x_t, t, labels):
        seen.update({params["gain"].dtype, x_t.dtype})
        return denoise(params, x_t, t, labels)

    run(tmp_path, model=spy, epochs=1, dtype="bfloat16")
    assert seen == {jnp.dtype("bfloat16")}


def test_first_loss_is_the_weighted_noise_power(tmp_path):
    """At zero parameters the prediction is 0, so the loss is the mean of w_t eps^2."""
    weighted = {}
    for name in LOSS_WEIGHTS:
        run(tmp_path / name, epochs=1, log_every=1, loss_weight=name)
        weighted[name] = log(tmp_path / name)[0]["loss"]
    key = jax.random.fold_in(jax.random.key(0), 0)
    key_t, key_eps, _ = jax.random.split(key, 3)
    t = np.asarray(jax.random.randint(key_t, (8,), 0, F))
    power = np.mean(np.asarray(jax.random.normal(key_eps, (8, 2, 2, 1))) ** 2, axis=(1, 2, 3))
    signal_to_noise = ABAR[t].astype(np.float64) / (1 - ABAR[t].astype(np.float64))
    weight = np.minimum(signal_to_noise, 5) / signal_to_noise
    assert weighted["uniform"] == pytest.approx(power.mean(), rel=1e-5)
    assert weighted["min_snr"] == pytest.approx((weight * power).mean(), rel=1e-4)
    assert (weight < 1).any() and (weight == 1).any()


def test_every_step_draws_its_own_noise(tmp_path):
    """Parameters that stay at 0 make each loss the power of that step's noise alone."""
    run(tmp_path, learning_rate=0.0, log_every=1, checkpoint_every=1000)
    assert len({entry["loss"] for entry in log(tmp_path)}) == 12


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [("eps", [1.0, 0.5, 5 / 99]), ("x_0", [1.0, 5.0, 5.0]), ("v", [0.5, 5 / 11, 0.05])],
)
def test_min_snr_weights_by_hand(prediction_type, expected):
    weight = LOSS_WEIGHTS["min_snr"](jnp.array([0.5, 10 / 11, 0.99]), prediction_type)
    np.testing.assert_allclose(weight, expected, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["eps", "x_0", "v"])
def test_a_perfect_network_of_each_prediction_type_has_no_loss(tmp_path, prediction_type):
    """Images are all grey 0.0039, so x_0 is known, and eps and v follow from x_t."""
    x_0 = 128 / 127.5 - 1.0

    def perfect(params, x_t, t, labels):
        abar = jnp.asarray(ABAR)[t][:, None, None, None]
        eps = (x_t - jnp.sqrt(abar) * x_0) / jnp.sqrt(1 - abar)
        v = jnp.sqrt(abar) * eps - jnp.sqrt(1 - abar) * x_0
        given = {"eps": eps, "x_0": jnp.full_like(x_t, x_0), "v": v}[prediction_type]
        return Prediction(given + 0.0 * params["gain"].sum())

    grey = np.full((24, 2, 2, 1), 128, np.uint8)
    for asked in TARGETS:
        folder = tmp_path / asked
        run(folder, model=perfect, images=grey, epochs=1, log_every=1, prediction_type=asked)
        assert (log(folder)[0]["loss"] < 1e-6) == (asked == prediction_type)


@pytest.mark.parametrize(("dropout", "moved"), [(0.0, [1, 1, 1, 0]), (1.0, [0, 0, 0, 1])])
def test_dropped_labels_become_the_null_class(tmp_path, dropout, moved):
    shift = run(tmp_path, label_dropout=dropout).params["shift"]
    np.testing.assert_array_equal(np.asarray(shift).any(axis=(1, 2, 3)), np.array(moved, bool))


def test_the_average_follows_quickly_at_first(tmp_path):
    """Step i has decay min(ema_decay, (1 + i) / (10 + i)); the first rate of the warm-up is 0."""
    before = run(tmp_path / "a", epochs=1, warmup_steps=1)  # 3 steps: rates 0, full, less
    assert not np.allclose(before.ema["gain"], before.params["gain"])
    frozen = run(tmp_path / "b", epochs=1, warmup_steps=1, ema_decay=0.0)
    assert_same(frozen.ema, frozen.params)
    assert_same(before.params, frozen.params)


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own():
    orders = [epoch_order(3, epoch, 20) for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(20))
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[2], epoch_order(3, 2, 20))
    assert not np.array_equal(orders[0], epoch_order(4, 0, 20))


def test_the_callers_parameters_stay_usable(tmp_path):
    params = start()
    run(tmp_path, params=params)
    assert_same(params, start())


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import train_test
from mpqdiff import train
write = train._Log.write

def kill_at_nine(self, *, step, **scalars):
    write(self, step=step, **scalars)
    if step == 9:
        os.kill(os.getpid(), signal.SIGKILL)

train._Log.write = kill_at_nine
train_test.run(Path(sys.argv[1]))
"""


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path, request):
    whole = run(tmp_path / "whole")
    folder = tmp_path / "killed"
    here = str(request.path.parent)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, folder, here], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = log(folder)
    assert [entry["step"] for entry in before] == [3, 6, 9]
    resumed = run(folder)
    assert_same(resumed, whole)
    # It went on from a checkpoint (after step 4 or 8), not from the start.
    assert log(folder)[len(before)]["step"] in (6, 9)
    assert log(folder)[-1]["step"] == log(tmp_path / "whole")[-1]["step"] == 12


def test_a_finished_run_is_not_trained_again(tmp_path):
    done = run(tmp_path)
    lines = log(tmp_path)
    assert_same(run(tmp_path), done)
    assert log(tmp_path) == lines


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path):
    params = {**start(), "gain": jnp.full(F, jnp.nan)}
    with pytest.raises(InputError, match="loss is nan at step 3: lower learning_rate"):
        run(tmp_path, params=params)


def test_a_diverged_state_is_never_checkpointed(tmp_path):
    params = {**start(), "gain": jnp.full(F, jnp.inf)}
    with pytest.raises(InputError, match="at step 1:"):
        run(tmp_path, params=params, checkpoint_every=1, log_every=100)
    assert run(tmp_path).step == 12  # nothing was left to resume from


@pytest.mark.parametrize("damage", ["another model", "cut files"])
def test_a_checkpoint_of_another_model_or_a_damaged_one(tmp_path, damage):
    run(tmp_path)
    width = F + 1 if damage == "another model" else F
    if damage == "cut files":
        for file in (tmp_path / "checkpoints" / "12").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[:20])
    # In a process of its own: Orbax leaves reads in flight when it refuses, and they would report
    # to its closed event loop during some later test.
    again = f"""
import pathlib, train_test
start = {{**train_test.start(), "gain": train_test.jnp.zeros({width})}}
train_test.run(pathlib.Path({str(tmp_path)!r}), params=start)
"""
    ran = subprocess.run(
        [sys.executable, "-c", again], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert ran.returncode != 0
    assert "checkpoints/12 is damaged or of another model" in ran.stderr
    assert "InputError" in ran.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_weight": "snr"}, "unknown loss weight 'snr'; known: min_snr, uniform"),
        ({"dtype": "float16"}, "unknown training dtype 'float16'; known: bfloat16, float32"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch": -1}, "batch=-1"),
        ({"batch": 25}, "at most the 24 training images"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
        ({"log_every": 0}, "log_every=0"),
    ],
)
def test_unusable_settings(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()
