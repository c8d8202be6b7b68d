"""How far a quantised student leaves the float teacher, at every candidate step.

Both begin with the same noise and condition; the teacher runs every candidate, the student those
kept, holding its eps in between (see `trajectory`). DiffPro (arXiv 2511.11446) selects steps by
"teacher-student drift" and does not say of what; the readings are

    state         E |x_t^student - x_t^teacher| / E |x_t^teacher|, each along its own way
    teacher_eps   E |eps_student - eps_teacher| / E |eps_teacher|, both at the teacher's x_t
    student_eps   the same, both at the student's x_t

`state` accumulates from the noisy end to the clean one; the other two are of one step alone.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.denoiser import Denoise
from mpqdiff.diffusion.steps import signals
from mpqdiff.errors import InputError, unknown_name
from mpqdiff.timesteps.candidates import candidates_of, positions_of
from mpqdiff.timesteps.trajectory import advance, effective_eps

READINGS = ("state", "teacher_eps", "student_eps")


@partial(jax.jit, static_argnames=("teacher", "student", "reading", "clip"))
def _follow(teacher, student, params, x_T, cond, steps, kept, *, reading: str, clip: bool):
    """(mean |difference|, mean |teacher's|), each [F]; kept bool [F] is traced: one compile."""

    def step(carry, at):
        x_a, x_b, held = carry
        (t, abar_t, abar_s), keep = at
        eps_a = effective_eps(teacher, params[0], x_a, t, cond, abar_t, clip=clip)

        def ask():
            return effective_eps(student, params[1], x_b, t, cond, abar_t, clip=clip)

        eps_b = jax.lax.cond(keep, ask, lambda: held)
        a, b = (x_a, x_b) if reading == "state" else (eps_a, eps_b)
        x_a_next = advance(x_a, eps_b if reading == "student_eps" else eps_a, abar_t, abar_s)
        x_b_next = advance(x_b, eps_a if reading == "teacher_eps" else eps_b, abar_t, abar_s)
        return (x_a_next, x_b_next, eps_b), (_mean_norm(b - a), _mean_norm(a))

    return jax.lax.scan(step, (x_T, x_T, jnp.zeros_like(x_T)), (steps, kept))[1]


def _mean_norm(x):
    return jnp.linalg.norm(x.reshape(len(x), -1), axis=1).mean()


def measure(
    teacher: Denoise,
    teacher_params,
    student: Denoise,
    student_params,
    x_T,
    cond,
    *,
    alphas_cumprod,
    candidates=None,
    timesteps=None,
    reading: str = "state",
    clip: bool = True,
) -> np.ndarray:
    """Drift float64 [F'] at every candidate, in sampling order, of x_T [N,...] and cond [N,...].

    `candidates` int32 [F'], descending, default the whole schedule [F]; `timesteps` those that the
    student runs, default all. Another choice of them compiles nothing anew. Raises InputError on
    an unknown reading, timesteps that are not candidates or leave out the first, and, naming the
    timestep, where the drift is not finite: the student diverged.
    """
    if reading not in READINGS:
        raise unknown_name("reading of drift", reading, READINGS)
    candidates = candidates_of(alphas_cumprod, candidates)
    kept = np.zeros(len(candidates), bool)
    kept[positions_of(candidates if timesteps is None else timesteps, candidates)] = True
    t, abar_t, abar_s = signals(candidates, alphas_cumprod)
    steps = (t, abar_t.astype(np.float32), abar_s.astype(np.float32))
    params = (teacher_params, student_params)
    out = _follow(teacher, student, params, x_T, cond, steps, kept, reading=reading, clip=clip)
    off, size = (np.asarray(each, np.float64) for each in out)
    with np.errstate(divide="ignore", invalid="ignore"):
        return check_drift(off / size, candidates)


def check_drift(drift, candidates: np.ndarray) -> np.ndarray:
    """`drift` as float64 [F'], one per candidate; InputError unless finite and not negative."""
    drift = np.asarray(drift, np.float64)
    if drift.shape != candidates.shape:
        raise InputError(f"got drift {drift.shape} for {len(candidates)} candidate steps")
    bad = ~(np.isfinite(drift) & (drift >= 0))
    if bad.any():
        first = bad.argmax()
        raise InputError(
            f"drift {drift[first]} at timestep {candidates[first]}, first of {bad.sum()} that are "
            "not finite or below 0: the student (or the teacher) diverged; give it more bits, "
            "clip x_0, or check its activation scales"
        )
    return drift


def total(drift, *, weight: float = 0.25) -> float:
    """Drift of a whole schedule, d_last + weight max_u d_u, from its drift at the steps [S].

    A reading of DiffPro's criterion, for the choice between one more step and one more bit.
    """
    drift = np.asarray(drift, np.float64)
    return float(drift[-1] + weight * drift.max())
