"""The S steps of least additive edge cost: exactly, and for all S at once.

Keeping S of F candidates cuts the schedule into S runs, each served by the eps of its first step.
With cost[p, j] of the run p..j (`edges`) and best_s[j] the least cost of serving 0..j in s steps,

    best_1[j] = cost[0, j],      best_s[j] = min_p best_{s-1}[p-1] + cost[p, j]:

a min-plus product of a vector and a matrix for each s, so that S_max of them are the front over
all S <= S_max. The answer is the minimum of that cost and of nothing else: it is DDIM's (eta 0);
with another sampler the same timesteps are a heuristic. More steps need not cost less: where eps
swings back, a long step may land nearer than two short ones.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.timesteps.candidates import candidates_of, check_count, protected
from mpqdiff.timesteps.edges import edge_costs, forbid_skipping
from mpqdiff.timesteps.gram import StudentGram


class Front(NamedTuple):
    """The best choices of 1..S_max steps; row s-1 has s of them."""

    cost: np.ndarray  # float64 [S_max], inf where so few cannot keep what is protected
    begin: np.ndarray  # int32 [S_max,F], first step of the last of s runs that end at j


@partial(jax.jit, static_argnames="max_steps")
def _front(costs, max_steps: int):
    def step(best, _):
        before = jnp.concatenate([jnp.full(1, jnp.inf), best[:-1]])

        def through(p, least):
            cost, begin = least
            new = before[p] + costs[p]
            return jnp.where(new < cost, new, cost), jnp.where(new < cost, p, begin)

        # Row by row: a variadic argmin is nine times slower on CPUs.
        nothing = jnp.full_like(best, jnp.inf), jnp.zeros(best.shape, jnp.int32)
        best, begin = jax.lax.fori_loop(jnp.int32(0), len(costs), through, nothing)
        return best, (best[-1], begin)

    _, (cost, begin) = jax.lax.scan(step, costs[0], length=max_steps - 1)
    return (
        jnp.concatenate([costs[0, -1:], cost]),
        jnp.concatenate([jnp.zeros((1, len(costs)), jnp.int32), begin]),
    )


def front(costs: np.ndarray, max_steps: int) -> Front:
    """The least cost of every number of steps up to `max_steps`, for costs float64 [F,F].

    In float64 on the CPU whatever the default back end. Ties go to the noisier step. Raises
    InputError unless 1 <= max_steps <= F, and on costs that are NaN.
    """
    if not 1 <= max_steps <= len(costs):
        raise InputError(f"max_steps={max_steps}: expected 1 to {len(costs)}, the candidate steps")
    if np.isnan(costs).any():
        raise InputError("edge costs hold NaN: the trajectory that they come from diverged")
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        return Front(*map(np.asarray, _front(np.asarray(costs, np.float64), max_steps)))


def positions(found: Front, num_steps: int) -> np.ndarray:
    """Positions int [S] in sampling order of the best `num_steps` steps of a front.

    Raises InputError where the front does not reach so many, or so few are not enough.
    """
    if not 1 <= num_steps <= len(found.cost) or not np.isfinite(found.cost[num_steps - 1]):
        least = int(np.isfinite(found.cost).argmax()) + 1
        raise InputError(f"num_steps={num_steps}: the front has {least} to {len(found.cost)} steps")
    places = np.empty(num_steps, np.int64)
    end = found.begin.shape[1] - 1
    for row in range(num_steps - 1, -1, -1):
        places[row] = found.begin[row, end]
        end = places[row] - 1
    return places


def select(
    alphas_cumprod,
    num_steps: int,
    *,
    gram,
    student: StudentGram | None = None,
    candidates=None,
    tail: float = 0.0,
    data_std: float = 1.0,
    power: int = 1,
) -> np.ndarray:
    """The `num_steps` timesteps of least cost, int32 [S], descending, the first candidate kept.

    gram [F',F'] of `record_gram` over `candidates` (default the whole schedule [F]); `student`,
    `data_std` and `power` as in `edge_costs`, `tail` as in `protected`. Raises InputError as these
    do, on more steps than candidates and on a tail that protects more than `num_steps`.
    """
    steps = candidates_of(alphas_cumprod, candidates)
    keep = protected(steps, len(alphas_cumprod), tail)
    check_count(num_steps, keep, tail)
    readings = {"student": student, "candidates": candidates, "data_std": data_std, "power": power}
    costs = edge_costs(gram, alphas_cumprod, **readings)
    return steps[positions(front(forbid_skipping(costs, keep), num_steps), num_steps)]
