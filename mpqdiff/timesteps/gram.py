"""The Gram of a teacher's eps over the candidate steps, from one trajectory of each sample.

    K_pq = mean over samples and elements of eps_p eps_q

with eps_p what DDIM over all candidates uses at the p-th of them (`effective_eps`). It is all that
the edge costs (`edges`) need of the network: F evaluations per sample, once, for every S. What a
quantised student adds to the costs needs two more sums of the same trajectory (`StudentGram`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.denoiser import Denoise
from mpqdiff.diffusion.steps import signals
from mpqdiff.errors import InputError
from mpqdiff.timesteps.candidates import candidates_of
from mpqdiff.timesteps.trajectory import advance, effective_eps

# Columns turned into float64 at once. The Gram needs it: `edges` takes its second differences,
# which are of the size of float32's rounding where eps changes little from step to step.
SLICE = 4096


class StudentGram(NamedTuple):
    """How a student's eps is off, delta_p = eps_p^student - eps_p, at the teacher's states.

    Both are means over samples and elements, in sampling order.
    """

    cross: np.ndarray  # float64 [F,F]: of eps_v delta_p
    square: np.ndarray  # float64 [F]: of delta_p^2


@partial(jax.jit, static_argnames=("models", "clip"))
def _follow(models: tuple[Denoise, ...], params, x_T, cond, steps, *, clip: bool):
    """eps of each of `models` with its `params` at the states of the first, all [F,n,...]: DDIM
    from x_T over `steps` = (t, abar_t, abar_s), each [F]."""

    def step(x_t, at):
        t, abar_t, abar_s = at
        found = [
            effective_eps(model, own, x_t, t, cond, abar_t, clip=clip)
            for model, own in zip(models, params, strict=True)
        ]
        return advance(x_t, found[0], abar_t, abar_s), found

    return jax.lax.scan(step, x_T, steps)[1]


def samples_per_chunk(candidates: int, elements: int, memory_gb: float) -> int:
    """Trajectories followed at once: float32 [F,n,elements] within the budget, at least one."""
    return max(1, int(memory_gb * 2**30 / (4 * candidates * elements)))


def record_gram(
    denoise: Denoise,
    params,
    x_T,
    cond,
    *,
    alphas_cumprod,
    candidates=None,
    clip: bool = True,
    memory_gb: float = 1.0,
    chunks=lambda count, compute: [compute(i) for i in range(count)],
) -> np.ndarray:
    """K float64 [F',F'] in sampling order, from x_T [N,...] and cond [N,...] (a pytree).

    `candidates` int32 [F'], descending, default the whole schedule; `clip` as in the sampler to be
    used. The samples are followed a chunk at a time, and `chunks(count, compute)` runs
    `compute(i) -> dict of arrays` for each (`record.record`). Raises InputError on no samples, and
    naming the timestep where eps is not finite.
    """
    candidates = candidates_of(alphas_cumprod, candidates)

    def reduce(teacher):
        _check_finite("the teacher's", teacher, candidates, "the weights, the schedule and x_T")
        return {"gram": _products(teacher, teacher)}

    run = partial(_follow, (denoise,), (params,), clip=clip)
    over = x_T, cond, alphas_cumprod, candidates
    return _mean(run, reduce, over, chunks, memory_gb=memory_gb)["gram"]


def record_student(
    denoise: Denoise,
    params,
    student: Denoise,
    student_params,
    x_T,
    cond,
    *,
    alphas_cumprod,
    candidates=None,
    clip: bool = True,
    memory_gb: float = 1.0,
    chunks=lambda count, compute: [compute(i) for i in range(count)],
) -> StudentGram:
    """Of the teacher `denoise` and a `student` asked at its states; arguments as `record_gram`.

    Raises InputError as that does; where the student's eps is not finite: it diverged.
    """
    candidates = candidates_of(alphas_cumprod, candidates)

    def reduce(teacher, other):
        _check_finite("the teacher's", teacher, candidates, "the weights, the schedule and x_T")
        _check_finite("the student's", other, candidates, "its widths and activation scales")
        off = other - teacher
        square = np.einsum("pd,pd->p", off, off, dtype=np.float64)
        return {"cross": _products(teacher, off), "square": square}

    run = partial(_follow, (denoise, student), (params, student_params), clip=clip)
    over = x_T, cond, alphas_cumprod, candidates
    # Three arrays of a chunk are alive: both eps and their difference.
    return StudentGram(**_mean(run, reduce, over, chunks, memory_gb=memory_gb / 3))


def _mean(run, reduce, over: tuple, chunks, *, memory_gb: float) -> dict:
    """Means over samples and elements of the sums that `reduce(eps, ...)` takes of each chunk, eps
    [F,n elements] of every model that `run` follows; `memory_gb` for one such array."""
    x_T, cond, alphas_cumprod, candidates = over
    steps = tuple(
        jnp.asarray(each, dtype)
        for each, dtype in zip(
            signals(candidates, alphas_cumprod), (jnp.int32, jnp.float32, jnp.float32), strict=True
        )
    )
    total = len(x_T)
    if not total:
        raise InputError("x_T holds no samples: a Gram needs at least one")
    held = samples_per_chunk(len(candidates), x_T[0].size, memory_gb)
    size = -(-total // -(-total // held))

    def compute(index):
        # The last chunk is padded by repetition, so that every chunk has the compiled shape.
        rows = np.minimum(np.arange(index * size, (index + 1) * size), total - 1)
        taken = jax.tree.map(lambda each: each[rows], (x_T, cond))
        every = [np.asarray(eps)[:, : total - index * size] for eps in run(*taken, steps)]
        return reduce(*(eps.reshape(len(eps), -1) for eps in every))

    parts = chunks(-(-total // size), compute)
    return {name: sum(part[name] for part in parts) / x_T.size for name in parts[0]}


def _check_finite(whose: str, rows: np.ndarray, candidates: np.ndarray, advice: str) -> None:
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise InputError(
            f"{whose} eps is not finite from timestep {candidates[finite.argmin()]} on: check "
            f"{advice}"
        )


def _products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[F,D], [F,D] -> sum of left_p right_q, float64 [F,F]."""
    found = np.zeros((len(left), len(right)))
    for start in range(0, left.shape[1], SLICE):
        a = left[:, start : start + SLICE].astype(np.float64)
        b = a if right is left else right[:, start : start + SLICE].astype(np.float64)
        found += a @ b.T
    return found
