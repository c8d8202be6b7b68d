"""Evenly spaced timesteps: the control that every selection is compared with."""

import numpy as np

from mpqdiff.diffusion.steps import uniform_timesteps


def select(alphas_cumprod, num_steps: int) -> np.ndarray:
    """`uniform_timesteps` of the schedule [F]: int32 [S], both ends kept."""
    return uniform_timesteps(len(alphas_cumprod), num_steps)
