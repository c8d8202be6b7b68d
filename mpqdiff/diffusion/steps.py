"""What every sampler needs: the timesteps it keeps, their signal, the noise of each image."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.errors import InputError


def uniform_timesteps(num_timesteps: int, num_steps: int) -> np.ndarray:
    """`num_steps` timesteps from F-1 down to 0, evenly spaced and rounded: int32 [S].

    Raises InputError unless 1 <= S <= F.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise InputError(
            f"num_steps={num_steps}: expected 1 to {num_timesteps}, the schedule's length"
        )
    if num_steps == 1:
        return np.array([num_timesteps - 1], np.int32)
    return np.rint(np.linspace(num_timesteps - 1, 0, num_steps)).astype(np.int32)


def log_snr_timesteps(alphas_cumprod: np.ndarray, num_steps: int) -> np.ndarray:
    """`num_steps` timesteps from F-1, evenly spaced in log-SNR and rounded: int32 [S].

    The signal's log abar / (1 - abar) is divided into S even parts and the clean end dropped: the
    spacing for `dpm_solver`, whose extrapolation is poor over the long last step in log-SNR of
    even timesteps. Where two would fall together they move apart by one. Raises InputError as
    `uniform_timesteps` does.
    """
    length = len(alphas_cumprod)
    uniform_timesteps(length, num_steps)
    abar = np.asarray(alphas_cumprod, np.float64)
    log_snr = np.log(abar / (1.0 - abar))
    wanted = np.linspace(log_snr[-1], log_snr[0], num_steps + 1)[:-1]
    steps = np.rint(np.interp(-wanted, -log_snr, np.arange(length)))
    place = np.arange(num_steps)
    steps = np.clip(steps, num_steps - 1 - place, length - 1 - place) + place
    return (np.maximum.accumulate(steps[::-1])[::-1] - place).astype(np.int32)


def check_timesteps(timesteps: Sequence[int] | np.ndarray, num_timesteps: int) -> np.ndarray:
    """`timesteps` as int32 [S]; InputError unless strictly descending inside the schedule."""
    steps = np.asarray(timesteps, np.int32)
    if steps.ndim != 1 or not steps.size or np.any(np.diff(steps) >= 0):
        raise InputError(f"timesteps {list(timesteps)}: expected a strictly descending list")
    if steps[0] >= num_timesteps or steps[-1] < 0:
        raise InputError(f"timesteps {list(timesteps)}: expected values in 0..{num_timesteps - 1}")
    return steps


def signals(timesteps, alphas_cumprod) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(timesteps int32 [S], abar_t [S], abar_s [S]) of the steps t -> s, float64 on the host.

    `abar_s` is the signal at the next kept timestep, and 1 after the last. Raises InputError as
    `check_timesteps` does, and unless 1 > abar > 0 falls with the timestep.
    """
    timesteps = check_timesteps(timesteps, len(alphas_cumprod))
    abar_t = np.asarray(alphas_cumprod, np.float64)[timesteps]
    abar_s = np.append(abar_t[1:], 1.0)
    if not (abar_t[0] > 0 and np.all(abar_t < abar_s)):
        raise InputError(
            f"alphas_cumprod {abar_t.tolist()} at timesteps {timesteps.tolist()}: expected values "
            "between 0 and 1, neither included, that rise towards the clean end"
        )
    return timesteps, abar_t, abar_s


def noise_keys(seed: int, start: int, count: int):
    """Keys [count] of images start..start+count-1: functions of (seed, image index) alone.

    Arms with the same seed therefore share noise image by image, whatever their batch size.
    """
    fold = partial(jax.random.fold_in, jax.random.key(seed))
    return jax.vmap(fold)(jnp.arange(start, start + count))


def initial_noise(seed: int, start: int, count: int, image_shape):
    """Noise x_T [count,H,W,C] of images start..start+count-1, from their `noise_keys`."""
    draw = partial(jax.random.normal, shape=tuple(image_shape))
    return jax.vmap(draw)(noise_keys(seed, start, count))


def step_keys(seed: int, start: int, count: int):
    """Keys [count] for the noise of the steps: apart from those that drew x_T."""
    return jax.vmap(lambda key: jax.random.fold_in(key, 2**31 - 1))(noise_keys(seed, start, count))


def step_noise(keys, index, x_t):
    """Noise like x_t [B,H,W,C] of step `index` []; `keys` [B] are the images' `step_keys`."""

    def draw(key):
        return jax.random.normal(jax.random.fold_in(key, index), x_t.shape[1:], x_t.dtype)

    return jax.vmap(draw)(keys)
