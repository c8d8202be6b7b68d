"""Quadratic timesteps (Song et al. 2020, arXiv 2010.02502, appendix D.2): dense at the clean end.

    t_i = top (i / (S - 1))^2,   i = 0..S-1,   top = reach (F - 1)

DDIM's code takes reach = 0.8. It then begins with pure noise at a timestep that is none, an error
that more steps do not mend, so the default is the whole schedule.
"""

import numpy as np

from mpqdiff.diffusion.steps import uniform_timesteps
from mpqdiff.errors import InputError


def select(alphas_cumprod, num_steps: int, *, reach: float = 1.0) -> np.ndarray:
    """Timesteps int32 [S] whose square roots are evenly spaced, descending.

    Where two would fall together they move apart by one. Raises InputError as `uniform_timesteps`
    does, and unless 0 < reach <= 1.
    """
    length = len(alphas_cumprod)
    uniform_timesteps(length, num_steps)
    if not 0.0 < reach <= 1.0:
        raise InputError(f"reach={reach}: expected a share of the schedule above 0 and up to 1")
    top = reach * (length - 1)
    if num_steps == 1:
        return np.rint([top]).astype(np.int32)
    place = np.arange(num_steps)
    steps = np.rint(top * (place / (num_steps - 1)) ** 2).astype(np.int64)
    steps = np.minimum(np.maximum.accumulate(steps - place), length - num_steps) + place
    return steps[::-1].astype(np.int32)
