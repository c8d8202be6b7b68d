"""From scores by timestep to one number per site, [T,L] -> [L] (or [T,L,K] -> [L,K]).

With w on the simplex over timesteps and gamma the redundancy in [0,1],

    exp_mean  theta_l = sum_t w_t exp(-beta gamma_tl)
    mean_exp  theta_l = exp(-beta sum_t w_t gamma_tl)
    mean      theta_l = 1 - sum_t w_t gamma_tl

(the weighted exponential aggregation of MPQ-Diff, arXiv 2412.00144; mean_exp with T = 1 is
OMPQ's exp(-beta gamma), arXiv 2109.07865). beta is on the *mean* over other sites: on OMPQ's sum
over L - 1 of them it is beta / (L - 1), and there theta underflows. Only ratios of theta matter
to the planner, so theta is kept as a logarithm and scaled to a maximum of 1 at the end.
Host float64 throughout: these are a few hundred numbers.
"""

import numpy as np

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.records import FLOAT_BITS, Scores

# exp(-LARGEST_SPREAD) is still a normal float64.
LARGEST_SPREAD = 700.0


def timestep_weights(timesteps, num_timesteps: int, lam: float) -> np.ndarray:
    """w_t proportional to exp(-lam t / F), summing to 1, [T]; lam > 0 favours the clean end."""
    exponent = -lam * np.asarray(timesteps, np.float64) / num_timesteps
    weight = np.exp(exponent - exponent.max())
    return weight / weight.sum()


def exp_mean(gamma, weights, beta: float) -> np.ndarray:
    """log sum_t w_t exp(-beta gamma_tl), [L], by log-sum-exp; gamma [T,L], weights [T]."""
    exponent = -beta * gamma
    peak = exponent.max(axis=0)
    return peak + np.log(weights @ np.exp(exponent - peak))


def mean_exp(gamma, weights, beta: float) -> np.ndarray:
    """log exp(-beta sum_t w_t gamma_tl), [L]."""
    return -beta * (weights @ gamma)


def mean(gamma, weights, beta: float) -> np.ndarray:
    """log(1 - sum_t w_t gamma_tl), [L]; beta plays no part. -inf for a wholly redundant site."""
    del beta
    left = np.maximum(1.0 - weights @ gamma, 0.0)
    return np.log(left, where=left > 0, out=np.full_like(left, -np.inf))


AGGREGATIONS = {"exp_mean": exp_mean, "mean_exp": mean_exp, "mean": mean}


def suffix_mean(theta: np.ndarray) -> np.ndarray:
    """Mean of theta over this and all later sites, [L]: how OMPQ weighs a site by its depth."""
    return np.cumsum(theta[::-1])[::-1] / np.arange(len(theta), 0, -1)


def aggregate(
    scores: Scores,
    *,
    timesteps,
    num_timesteps: int,
    method: str = "exp_mean",
    lam: float = 0.0,
    beta: float = 10.0,
    suffix: bool = False,
) -> np.ndarray:
    """Importance theta [L], largest 1, of redundancy scores; mean damage [L,K] of damage scores.

    timesteps [T] are those the scores were recorded at, out of `num_timesteps` (F). `method`,
    `beta` and `suffix` (see `suffix_mean`) concern redundancy only; damage is a loss already and
    is averaged with the same weights. Scores with T = 1 hold at every timestep.
    Raises InputError on an unknown method, scores that are not finite, timesteps that do not
    match them, and a beta so large that importances leave the float64 range.
    """
    if method not in AGGREGATIONS:
        raise unknown_name("aggregation", method, AGGREGATIONS)
    value = np.asarray(scores.value, np.float64)
    if not np.isfinite(value).all():
        raise InputError(f"scores {scores.name!r} are not finite: check the statistics")
    if not (np.isfinite(lam) and np.isfinite(beta) and beta > 0):
        raise InputError(f"lam={lam}, beta={beta}: expected a finite lam and a finite beta > 0")
    weights = np.ones(1)
    if len(value) > 1:
        timesteps = np.asarray(timesteps)
        if timesteps.shape != value.shape[:1]:
            raise InputError(f"{len(value)} timesteps of scores, timesteps of {timesteps.shape}")
        if timesteps.min() < 0 or timesteps.max() >= num_timesteps:
            raise InputError(
                f"timesteps {timesteps.min()}..{timesteps.max()}, expected 0..{num_timesteps - 1}"
            )
        weights = timestep_weights(timesteps, num_timesteps, lam)
    if scores.kind == "damage":
        return np.tensordot(weights, value, axes=1)
    log_theta = AGGREGATIONS[method](value, weights, beta)
    finite = log_theta[np.isfinite(log_theta)]
    if len(finite) and finite.max() - finite.min() > LARGEST_SPREAD:
        raise InputError(
            f"beta={beta} spreads importance over exp({finite.max() - finite.min():.0f}), more "
            f"than exp({LARGEST_SPREAD:.0f}): lower beta (it multiplies a mean in [0,1])"
        )
    theta = np.exp(log_theta - (finite.max() if len(finite) else 0.0))
    return suffix_mean(theta) if suffix else theta


def lift(theta, choices) -> np.ndarray:
    """The linear objective as damage, [L,K]: theta_l times the bits a choice lacks of the widest.

    theta [L]; choices: K pairs (w_bits, a_bits), whose bits add up; a site kept in float lacks
    none. With one activation width its minimum is OMPQ's and MPQ-Diff's maximum of
    sum_l theta_l b_l.
    """
    bits = np.array([[np.nan if b == FLOAT_BITS else b for b in pair] for pair in choices])
    lacking = np.nan_to_num(np.nanmax(bits, axis=0) - bits).sum(axis=1)
    return np.asarray(theta, np.float64)[:, None] * lacking
