"""The Gram of a teacher's eps over the candidate steps, from one trajectory of each sample.

    K_pq = mean over samples and elements of eps_p eps_q

with eps_p what DDIM over all candidates uses at the p-th of them (`effective_eps`). It is all that
the edge costs (`edges`) need of the network: F evaluations per sample, once, for every S.
"""

from functools import partial

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


@partial(jax.jit, static_argnames=("denoise", "clip"))
def _follow(denoise: Denoise, params, x_T, cond, steps, *, clip: bool):
    """eps [F,n,...] of DDIM from x_T over `steps` = (t, abar_t, abar_s), each [F]."""

    def step(x_t, at):
        t, abar_t, abar_s = at
        eps = effective_eps(denoise, params, x_t, t, cond, abar_t, clip=clip)
        return advance(x_t, eps, abar_t, abar_s), eps

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
    steps = tuple(
        jnp.asarray(each, dtype)
        for each, dtype in zip(
            signals(candidates, alphas_cumprod), (jnp.int32, jnp.float32, jnp.float32), strict=True
        )
    )
    total = len(x_T)
    if not total:
        raise InputError("x_T holds no samples: a Gram needs at least one")
    count = -(-total // samples_per_chunk(len(candidates), x_T[0].size, memory_gb))
    size = -(-total // count)

    def compute(index):
        # The last chunk is padded by repetition, so that every chunk has the compiled shape.
        rows = np.minimum(np.arange(index * size, (index + 1) * size), total - 1)
        taken = jax.tree.map(lambda each: each[rows], (x_T, cond))
        eps = np.asarray(_follow(denoise, params, *taken, steps, clip=clip))
        return {"gram": _products(eps[:, : total - index * size], candidates)}

    parts = chunks(-(-total // size), compute)
    return sum(part["gram"] for part in parts) / x_T.size


def _products(eps: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """eps [F,n,...] -> sum of eps_p eps_q over samples and elements, float64 [F,F]."""
    rows = eps.reshape(len(eps), -1)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise InputError(
            f"the teacher's eps is not finite from timestep {candidates[finite.argmin()]} on: "
            "check the weights, the schedule and x_T"
        )
    gram = np.zeros((len(rows), len(rows)))
    for start in range(0, rows.shape[1], SLICE):
        part = rows[:, start : start + SLICE].astype(np.float64)
        gram += part @ part.T
    return gram
