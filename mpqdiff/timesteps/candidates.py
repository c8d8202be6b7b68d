"""The candidate steps of a selection, which of them are protected, and how many may be kept.

Candidates are timesteps in the order in which a sampler runs them: descending, position 0 the
noisy end. Every array of this package that has an axis of candidates follows that order.
"""

from collections.abc import Sequence

import numpy as np

from mpqdiff.diffusion.steps import check_timesteps
from mpqdiff.errors import InputError


def candidates_of(alphas_cumprod, candidates: Sequence[int] | np.ndarray | None = None):
    """`candidates` int32 [F'], descending; the whole schedule of `alphas_cumprod` [F] for None.

    Raises InputError as `check_timesteps` does.
    """
    length = len(alphas_cumprod)
    if candidates is None:
        candidates = np.arange(length)[::-1]
    return check_timesteps(candidates, length)


def positions_of(timesteps, candidates: np.ndarray) -> np.ndarray:
    """Positions int [S] of descending `timesteps` [S] among `candidates`, the first of them 0.

    Raises InputError on a timestep that is no candidate, and unless the noisy end is kept: the
    noise that a sampler begins with belongs to it.
    """
    steps = np.asarray(timesteps, np.int64)
    found = np.searchsorted(-candidates, -steps)
    missing = candidates[np.minimum(found, len(candidates) - 1)] != steps
    if steps.ndim != 1 or missing.any() or not steps.size or np.any(np.diff(steps) >= 0):
        raise InputError(
            f"timesteps {steps.tolist()}: expected some of the {len(candidates)} candidates "
            f"{candidates[0]}..{candidates[-1]}, descending"
        )
    if found[0]:
        raise InputError(
            f"timesteps begin at {steps[0]}, the candidates at {candidates[0]}: keep the first one"
        )
    return found


def protected(candidates: np.ndarray, length: int, tail: float) -> np.ndarray:
    """bool [F']: the candidates that stay, whatever they cost: the first, and t < tail F.

    DiffPro (arXiv 2511.11446) protects the last executed steps; that they are a share of the full
    schedule is a reading of it. Raises InputError unless 0 <= tail <= 1.
    """
    if not 0.0 <= tail <= 1.0:
        raise InputError(f"tail={tail}: expected a share of the schedule, 0 to 1")
    keep = candidates < tail * length
    keep[0] = True
    return keep


def check_count(num_steps: int, keep: np.ndarray, tail: float) -> None:
    """InputError unless `num_steps` of the candidates can be kept with those of `keep` [F']."""
    if not 1 <= num_steps <= len(keep):
        raise InputError(f"num_steps={num_steps}: expected 1 to {len(keep)}, the candidate steps")
    if num_steps < keep.sum():
        raise InputError(
            f"tail={tail} and the first step protect {keep.sum()} steps, more than the "
            f"num_steps={num_steps} to keep: take a shorter tail or more steps"
        )
