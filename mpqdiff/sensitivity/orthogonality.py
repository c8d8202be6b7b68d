"""Network orthogonality metric (ORM): how much of a site's output other sites already carry.

For sites X [N,p] and Y [N,q] (outputs for the same N inputs, flattened) with Grams K and G,

    ORM(X, Y) = ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) = <K, G>_F / (||K||_F ||G||_F)

(OMPQ, arXiv 2109.07865; on centred features it is linear CKA, arXiv 1905.00414). A site that is
orthogonal to the others is the more important one; MPQ-Diff (arXiv 2412.00144) reads this at
every timestep. Everything below is written for one timestep; `score` is where T enters.

It reads what outputs share, not what the network's output depends on: it cannot rank first the
sites that matter. It ranks first the outputs that no other site carries, used or not, and a site
of constant output (redundancy 0) before all.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.records import Scores, Statistics

TEMPORAL_POLICIES = ("pooled", "pin")
# Below this share of the raw trace, what is left after centring is float32 rounding.
CONSTANT = 1e-8


def _centered(gram, row_sums):
    """The biased estimator: the Gram of centred features as it stands, [L,N,N]."""
    size = gram.shape[-1]
    trace = jnp.trace(gram, axis1=-2, axis2=-1)
    mean = 0.0 if row_sums is None else row_sums.sum(-1) / size
    constant = trace <= CONSTANT * (trace + mean)
    return jnp.where(constant[:, None, None], 0.0, gram)


def _uncentered(gram, row_sums):
    """The raw Gram K + r 1' + 1 r' + c, from the centred one and the raw row sums."""
    if row_sums is None:
        raise InputError("estimator 'uncentered' got row_sums=None: pass the raw Gram's row sums")
    size = gram.shape[-1]
    level = row_sums.sum(-1) / size**2
    shift = row_sums / size - level[:, None]
    return gram + shift[:, :, None] + shift[:, None, :] + level[:, None, None]


def _debiased(gram, row_sums):
    """U-centred Gram (Song et al. 2012; Szekely and Rizzo 2014): zero diagonal, zero row sums.

    Additive terms r_i + r_j drop out, so the centred Gram gives the same result as the raw one.
    """
    size = gram.shape[-1]
    if size < 4:
        raise InputError(f"estimator 'debiased' got {size} samples, expected at least 4")
    off = 1.0 - jnp.eye(size, dtype=gram.dtype)
    hollow = _centered(gram, row_sums) * off
    rows = hollow.sum(-1) / (size - 2)
    total = hollow.sum((-2, -1)) / ((size - 1) * (size - 2))
    u = (hollow - rows[:, :, None] - rows[:, None, :] + total[:, None, None]) * off
    # Self-HSIC that is zero but for rounding would turn noise into a direction.
    noise = jnp.linalg.norm(u, axis=(-2, -1)) <= 1e-6 * jnp.linalg.norm(gram, axis=(-2, -1))
    return jnp.where(noise[:, None, None], 0.0, u)


ESTIMATORS = {"centered": _centered, "uncentered": _uncentered, "debiased": _debiased}


def normalised_grams(gram, *, estimator: str = "centered", row_sums=None):
    """Grams of unit Frobenius norm at one timestep; all-zero for a site of constant output.

    gram [L,N,N] of centred features; row_sums [L,N] of the raw Gram (as in `Statistics`).
    Raises InputError on an unknown estimator, on "uncentered" without row sums and on "debiased"
    with fewer than 4 samples.
    """
    if estimator not in ESTIMATORS:
        raise unknown_name("estimator", estimator, ESTIMATORS)
    kernel = ESTIMATORS[estimator](gram, row_sums)
    # Squares of Gram entries leave the float32 range long before the entries do.
    peak = jnp.abs(kernel).max((-2, -1), keepdims=True)
    kernel = kernel / jnp.where(peak > 0, peak, 1.0)
    norm = jnp.sqrt((kernel**2).sum((-2, -1), keepdims=True))
    return kernel / jnp.where(norm > 0, norm, 1.0)


def orm(gram, estimator: str = "centered", row_sums=None):
    """The metric between all sites of one timestep, [L,L]; arguments as `normalised_grams`.

    Symmetric; diagonal 1, or 0 (with its row and column) for a site of constant output. Centred
    and uncentred values lie in [0,1]; debiased ones in [-1,1].
    """
    unit = normalised_grams(gram, estimator=estimator, row_sums=row_sums)
    flat = unit.reshape(unit.shape[0], -1)
    cosines = jnp.matmul(flat, flat.T, precision=Precision.HIGHEST)
    alive = jnp.any(flat != 0, axis=-1)
    return jnp.where(jnp.diag(alive), 1.0, (cosines + cosines.T) / 2)


def mean_redundancy(matrix, member):
    """Mean metric of each site with the other `member` sites, [L], in [0,1].

    matrix [L,L] as `orm` gives it; member bool [L]. Sites of constant output count neither as a
    site to compare with nor in the number of them; their own value is 0 (nothing else carries
    them). Negative debiased values count as 0.
    """
    alive = jnp.diagonal(matrix) > 0
    others = jnp.outer(alive, alive & member) & ~jnp.eye(len(alive), dtype=bool)
    total = jnp.where(others, jnp.clip(matrix, 0.0, 1.0), 0.0).sum(-1)
    return total / jnp.maximum(others.sum(-1), 1)


@partial(jax.jit, static_argnames=("estimator", "temporal_policy"))
def _score(
    gram, row_sums, pooled_gram, pooled_row_sums, time_only, counted, *, estimator, temporal_policy
):
    """`score` on arrays: value [T,L], matrix [T,L,L]."""
    matrix = jax.vmap(lambda k, r: orm(k, estimator, r))(gram, row_sums)  # T enters here
    value = jax.vmap(mean_redundancy, in_axes=(0, None))(matrix, counted & ~time_only)
    fixed = jnp.zeros_like(value[0])
    if temporal_policy == "pooled":
        pooled = orm(pooled_gram, estimator, pooled_row_sums)
        fixed = mean_redundancy(pooled, counted)
    return jnp.where(time_only, fixed, value), matrix


def score(
    stats: Statistics,
    *,
    estimator: str = "centered",
    temporal_policy: str = "pooled",
    member: Sequence[bool] | None = None,
) -> Scores:
    """Mean off-diagonal metric by timestep and site: redundancy [T,L], matrix [T,L,L].

    Sites fed only by (t, label) do not vary at one timestep as the others do, so they enter no
    other site's mean. "pooled" scores them on rows drawn over all (t, label) pairs, the same at
    every timestep; "pin" gives them 0 and leaves it to the caller to pin their bits. `member`
    [L] says which sites count among the others of a mean (all, when None): pinned sites need not.
    Raises InputError on NaN or infinity in the Grams and on an unknown estimator or policy.
    """
    if temporal_policy not in TEMPORAL_POLICIES:
        raise unknown_name("temporal policy", temporal_policy, TEMPORAL_POLICIES)
    arrays = {
        "gram": stats.gram,
        "row_sums": stats.row_sums,
        "pooled_gram": stats.pooled_gram,
        "pooled_row_sums": stats.pooled_row_sums,
    }
    for name, array in arrays.items():
        bad = ~jnp.isfinite(array)
        if bool(bad.any()):
            where = jnp.unravel_index(bad.argmax(), bad.shape)
            raise InputError(
                f"statistics: {name} is not finite at {[int(i) for i in where]}, "
                f"{int(bad.sum())} of {bad.size} entries; check the weights and record again"
            )
    value, matrix = _score(
        **{name: jnp.asarray(array) for name, array in arrays.items()},
        time_only=jnp.asarray(stats.time_only),
        counted=jnp.asarray(np.ones(len(stats.time_only), bool) if member is None else member),
        estimator=estimator,
        temporal_policy=temporal_policy,
    )
    return Scores(value=value, kind="redundancy", name="orthogonality", matrix=matrix)


def null_bias(p, q, samples):
    """Expected centred metric of independent Gaussian features, widths p and q, N samples.

    E[R] ~ sqrt(p q / ((N + p)(N + q))), from Wishart moments: with features much wider than N
    the biased estimator nears 1 whatever the features say, and ranks sites by width.
    """
    return (p * q / ((samples + p) * (samples + q))) ** 0.5
