"""Manifold sensitivity: how activations fill their features, and how quantisation moves them.

A reading of DiffPro (arXiv 2511.11446), whose equations are not public beyond its figures: what
the paper leaves open is an argument here. With y the float outputs of a site (mean m, covariance
C, principal directions V of 95 % of the variance), y' the quantised ones and x its inputs,

    energy         e = log10 E ||x||^2
    dimension      rho = k95 / D, in the notation of `subspace`; of the inputs
    leak           p = E ||V^T (y' - y)||^2 / E ||V^T (y - m)||^2
    rotate         p = ||V V^T - V' V'^T||_F / sqrt(2 k95)
    concentration  p = 1 - H(v / sum v) / log D,  v the eigenvalues of C
    growth         g = max(0, off(y') - off(y)),  off(y) = 1 - E ||V^T (y - m)||^2 / E ||y - m||^2

of which `ranking` makes one score; `manifold_record` measures them in a model. All is written
for one timestep and one choice of widths, but for the growth. Moments (mean [D], covariance [D,D])
are divided by the number of rows. NumPy float64 throughout.
"""

import numpy as np

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.sensitivity.subspace import (
    ROUNDING,
    Principal,
    basis,
    check_moments,
    intrinsic_dimension,
    pooled,
    principal,
)

MANIFOLDS = ("timestep", "pooled")
# Rounding of a float32 sum of products, by the norms of the two factors.
FLOAT32_SUMS = 1e-6


def energy(mean, cov) -> float:
    """log10 E ||x||^2 of features of `mean` [D] and covariance `cov` [D,D].

    Raises InputError like `subspace.check_moments`, and where the features are all 0.
    """
    mean, cov = check_moments(mean, cov)
    total = float(mean @ mean + np.trace(cov))
    if total <= 0:
        raise InputError(f"energy of features with E ||x||^2 = {total}: expected one above 0")
    return float(np.log10(total))


def power(own: Principal) -> float:
    """E ||x||^2 of features with the moments of `own`."""
    return float(own.mean @ own.mean + own.values.sum())


def dimension(own: Principal, *, share: float = 0.95) -> float:
    """k / D in (0,1]: how many directions of the features hold `share` of the variance."""
    return intrinsic_dimension(own.values, share=share) / own.mean.size


def _same_features(own: Principal, size: int) -> None:
    """Raises InputError unless `size` is the number of features of `own`."""
    if size != own.mean.size:
        raise InputError(f"got {size} features beside {own.mean.size}, expected those of one site")


def pca_leak(own: Principal, error, *, share: float = 0.95) -> float:
    """Quantisation error inside the principal subspace, by the variance there; 0 without error.

    error [D,D] = E (y' - y)(y' - y)^T, not centred. It cannot see error that is small beside the
    largest direction: an outlier weight on a loud input makes one, and the leak falls. Raises
    InputError like `check_moments`, and on another D.
    """
    _, error = check_moments(np.zeros(np.shape(error)[:1]), error, "quantisation error")
    _same_features(own, len(error))
    directions = basis(own, share=share)
    inside = float(np.sum(directions * (error @ directions)))
    return max(inside, 0.0) / float(own.values[: directions.shape[1]].sum())


def pca_rotate(own: Principal, quantised: Principal, *, share: float = 0.95) -> float:
    """Distance of the two principal subspaces of the float outputs' k, in [0,1].

    0 where they are the same, 1 where they are orthogonal. Raises InputError on another D, and
    where the quantised outputs vary in fewer than k directions.
    """
    _same_features(own, quantised.mean.size)
    mine = basis(own, share=share)
    k = mine.shape[1]
    if quantised.vectors.shape[1] < k:
        raise InputError(
            f"{quantised.vectors.shape[1]} directions of quantised outputs, expected at least "
            f"{k}: record more rows"
        )
    return apart(mine, quantised.vectors[:, :k])


def apart(mine, theirs) -> float:
    """`pca_rotate` of the directions mine [D,k] and theirs [D,r], r <= k: those that theirs lack
    count as lost, so that it is 1 with r = 0."""
    # ||VV' - WW'||_F^2 = 2 ||(I - WW') V||_F^2 with r = k, without the cancellation of
    # 2k - 2 ||V'W||_F^2.
    lost = mine - theirs @ (theirs.T @ mine)
    return min(float(np.linalg.norm(lost)) / float(np.sqrt(mine.shape[1])), 1.0)


def pca_concentration(own: Principal) -> float:
    """1 - H / log D in [0,1]: 0 for equal variance in all directions, 1 for a single direction.

    It reads the float outputs alone. A site of one feature has 1.
    """
    if own.mean.size == 1:
        return 1.0
    part = own.values[own.values > 0] / own.values.sum()
    entropy = -float(np.sum(part * np.log(part)))
    return min(max(1.0 - entropy / float(np.log(own.mean.size)), 0.0), 1.0)


def off_manifold(own: Principal, mean, cov, *, share: float = 0.95) -> float:
    """Share of E ||y - m||^2 outside the principal subspace, in [0,1]; m is the mean of `own`.

    mean [D], cov [D,D] of y, quantised or not. Raises InputError like `check_moments`, and on
    another D.
    """
    mean, cov = check_moments(mean, cov)
    _same_features(own, mean.size)
    shift = mean - own.mean
    directions = basis(own, share=share)
    total = float(np.trace(cov) + shift @ shift)
    inside = np.sum(directions * (cov @ directions)) + np.sum((shift @ directions) ** 2)
    # Outputs that are all at the mean lie on the manifold.
    return min(max(1.0 - float(inside) / total, 0.0), 1.0) if total > 0 else 0.0


def growth(
    means, covs, quantised_means, quantised_covs, *, share: float = 0.95, manifold: str = "timestep"
) -> np.ndarray:
    """By how much quantisation raises `off_manifold` at each timestep, float64 [T], at least 0.

    means [T,D] and covs [T,D,D] of float and quantised outputs. `manifold` "timestep": the float
    outputs' own directions at each timestep; "pooled": those over all timesteps. Raises InputError
    on an unknown manifold, shapes that do not fit, and like `principal`.
    """
    if manifold not in MANIFOLDS:
        raise unknown_name("manifold", manifold, MANIFOLDS)
    whole = principal(*pooled(means, covs)) if manifold == "pooled" else None
    pooled(quantised_means, quantised_covs)  # for its checks of the shapes
    if np.shape(means) != np.shape(quantised_means):
        raise InputError(
            f"means of {np.shape(means)} and quantised ones of {np.shape(quantised_means)}: "
            "expected the same [T,D]"
        )
    found = []
    for mean, cov, other, spread in zip(means, covs, quantised_means, quantised_covs, strict=True):
        own = principal(mean, cov) if whole is None else whole
        rise = off_manifold(own, other, spread, share=share)
        rise -= off_manifold(own, mean, cov, share=share)
        # A difference of two shares that is rounding would be ranked like any other.
        found.append(rise if rise > ROUNDING else 0.0)
    return np.array(found)


def relative_error(mean, cov, error) -> float:
    """q = E ||y' - y||^2 / E ||y||^2; moments of y, and error [D,D] as in `pca_leak`."""
    _, error = check_moments(mean, error, "quantisation error")
    return float(np.trace(error) / 10 ** energy(mean, cov))


def of_sums(sums, power) -> tuple[float, float, float]:
    """(leak, growth, relative error) from sums over the rows of a site.

    With e = y' - y, c = y - m and V the principal directions, `sums` are those of |e|^2, |V'e|^2,
    c.e and (V'c).(V'e); `power` those of |V'c|^2, |c|^2 - |V'c|^2 and |y|^2. As in

        |(I - VV')(y' - m)|^2 = |(I - VV')c|^2 + 2 (c.e - V'c.V'e) + |e|^2 - |V'e|^2

    the growth is a difference of sums of e alone, that the much larger ones of y do not blur. What
    is left within float32's rounding of those counts as none.
    """
    error, leaked, along, along_inside = (float(value) for value in sums)
    inside, outside, total = (float(value) for value in power)
    moved = 2 * along + error  # sum |y' - m|^2 - |c|^2
    risen = 2 * (along - along_inside) + error - leaked
    spread = inside + outside
    rise = risen * spread - outside * moved
    blur = FLOAT32_SUMS * spread * (2 * np.sqrt(spread * error) + error)
    grown = rise / (spread * (spread + moved)) if rise > blur else 0.0
    return leaked / inside, grown, error / total
