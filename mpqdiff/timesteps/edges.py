"""What it costs to leave steps out: an edge for every two candidates, in closed form.

With xbar = x_t / sqrt(abar_t) and sigma = sqrt((1 - abar_t) / abar_t) a DDIM step is an Euler step
in sigma. Number the candidates 0..F-1 in sampling order and let F be the clean end, sigma_F = 0.
The teacher takes every step, so that from its state at p its state at q > p is

    xbar_q = xbar_p - sum_{p<=v<q} (sigma_v - sigma_{v+1}) eps_v .

A sampler that keeps p and q and nothing between holds eps_p for the whole way. Set against the
teacher's state at q, its step is off by

    e(p,q) = sum_{p<=v<q} (sigma_v - sigma_{v+1}) (eps_v - eps_p)
           = sum_{p<v<q} (sigma_v - sigma_q) delta_v,      delta_v = eps_v - eps_{v-1},

by summation by parts. With M_vw = E<delta_v, delta_w>, the second difference of the Gram of eps,

    E |e(p,q)|^2 = sum_{p<v<q} a_v (a_v M_vv + 2 sum_{v<w<q} a_w M_vw),    a_v = sigma_v - sigma_q,

the inner sum of which is, by parts again, sum_{v<u<q} (sigma_u - sigma_{u+1}) sum_{v<w<=u} M_vw:
three cumulative sums give all F^2 edges. They are sums of terms of their own size; prefix sums of
the Gram itself would cancel, sigma reaching 157 at the noisy end of the linear schedule.

An edge costs that error, weighed by what becomes of it: for Gaussian data of standard deviation s
the flow from sigma_q to the clean end shrinks an error in xbar by 1 / sqrt(1 + (sigma_q / s)^2).
s = 1 is the factor sqrt(abar_q), the error in x_q itself; s = inf leaves xbar as it is, the error
in x_0 were the network not to react. Costs add along a path: as errors in norm (`power` 1: no more
than the triangle inequality) or in square (`power` 2: as if independent). Both, and s, are
readings; the additive cost is a model of the error of x_0, not that error.

A quantised student holds eps_p + delta_p instead, and its step is off by

    e(p,q) - (sigma_p - sigma_q) delta_p,

whose mean square needs E<eps_v, delta_p> and E |delta_p|^2 of the same trajectory (`StudentGram`).
That is teacher-student drift in closed form: what a step costs for being long and for being held
by a student who is off there. A step between neighbours then has a cost too.
"""

import numpy as np

from mpqdiff.diffusion.steps import signals
from mpqdiff.errors import InputError
from mpqdiff.timesteps.candidates import candidates_of, positions_of
from mpqdiff.timesteps.gram import StudentGram


def check_reading(data_std: float, power: int) -> None:
    """InputError on arguments of `edge_costs` that no Gram can make usable."""
    if not data_std > 0.0 or power not in (1, 2):
        raise InputError(f"data_std={data_std}, power={power}: expected above 0, and 1 or 2")


def edge_costs(
    gram,
    alphas_cumprod,
    *,
    student: StudentGram | None = None,
    candidates=None,
    data_std: float = 1.0,
    power: int = 1,
) -> np.ndarray:
    """cost[p, j] float64 [F',F']: eps of candidate p held up to candidate j, landing on j + 1.

    gram [F',F'] of `record_gram` over `candidates` (default the whole schedule [F]); `student` of
    `record_student` over the same, for the eps of a student. Root mean square over samples and
    elements (`power` 1) or its square (2); without a student 0 on the diagonal; inf below it.
    Raises InputError on a Gram of another shape or not finite, data_std <= 0, another power, and a
    schedule whose signal does not rise towards the clean end.
    """
    candidates = candidates_of(alphas_cumprod, candidates)
    _, abar, _ = signals(candidates, alphas_cumprod)
    gram = _checked("Gram of eps", gram, 2, candidates)
    check_reading(data_std, power)
    sigma = np.append(np.sqrt((1.0 - abar) / abar), 0.0)
    square = _square_errors(gram, sigma)
    if student is not None:
        cross = _checked("Gram of eps and the student's error", student.cross, 2, candidates)
        own = _checked("square of the student's error", student.square, 1, candidates)
        # Rounding may leave a vanishing edge below 0.
        square = np.maximum(square + _student_errors(cross, own, sigma), 0.0)
    square = square / (1.0 + (sigma[1:] / data_std) ** 2)
    held = np.tri(len(gram), dtype=bool).T
    return np.where(held, np.sqrt(square) if power == 1 else square, np.inf)


def _square_errors(gram: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """E |e(p, j+1)|^2 [F,F] of a Gram [F,F] and sigma [F+1]; 0 on and below the diagonal."""
    changes = np.zeros_like(gram)
    changes[1:, 1:] = np.diff(np.diff(gram, axis=0), axis=1)
    inner = np.cumsum(np.triu(changes, 1), axis=1)
    inner = np.cumsum(inner * (sigma[:-1] - sigma[1:]), axis=1)
    reach = np.triu(sigma[:-1, None] - sigma[None, 1:])
    terms = reach * (reach * np.diag(changes)[:, None] + 2.0 * inner)
    after = np.cumsum(terms[:0:-1], axis=0)[::-1]
    # Rounding may leave a vanishing edge below 0.
    return np.maximum(np.append(after, np.zeros((1, len(gram))), axis=0), 0.0)


def _student_errors(cross: np.ndarray, square: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """What delta_p adds to E |e(p, j+1)|^2, [F,F], of E<eps_v, delta_p> [v,p] and E |delta_p|^2;
    of no meaning below the diagonal."""
    span = sigma[:-1, None] - sigma[None, 1:]
    moved = np.triu(cross.T - np.diag(cross)[:, None], 1)
    along = np.cumsum(moved * (sigma[:-1] - sigma[1:]), axis=1)  # E<e(p, j+1), delta_p>
    return span * (span * square[:, None] - 2.0 * along)


def _checked(name: str, value, axes: int, candidates: np.ndarray) -> np.ndarray:
    value = np.asarray(value, np.float64)
    if value.shape != axes * (len(candidates),):
        raise InputError(f"got a {name} {value.shape} for {len(candidates)} candidate steps")
    if not np.isfinite(value).all():
        raise InputError(
            f"the {name} holds NaN or infinity: the model diverged; check its weights, widths and "
            "activation scales"
        )
    return value


def path_cost(costs: np.ndarray, timesteps, candidates) -> float:
    """Sum of `costs` [F',F'] along descending `timesteps` [S] and to the clean end.

    `candidates` int32 [F'] as `candidates_of` gives them. Raises InputError as `positions_of`.
    """
    places = positions_of(timesteps, candidates)
    return float(costs[places, np.append(places[1:], len(costs)) - 1].sum())


def forbid_skipping(costs: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """`costs` [F',F'] with inf on every edge that would leave out a candidate of `keep` [F']."""
    kept = np.cumsum(keep)
    return np.where(kept[None, :] > kept[:, None], np.inf, costs)
