"""Activation scales from recorded ranges: one row per group of timesteps, one column per operand.

`step_table`: a row for every recorded timestep, looked up inside the sampling scan by nearest
timestep; or, with `groups`, at most so many, each with the range over the recorded timesteps that
are nearest to it. `ema`: the same with a range that falls slowly along the sampling order,
r_t = max(r_t, beta r_prev) at each end: a step never finds a scale much below the one before.
`static`: one row, the range over all timesteps. `online`: no table; the scale is each token's
absolute maximum, taken when the product runs (each image's, where two activations are multiplied).

DiffPro's dynamic activation quantisation (arXiv 2511.11446) is `step_table`, `online` or `ema`. A
schedule of fewer steps looks up fewer rows: none is made anew.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.plan import MODES
from mpqdiff.quantize.numerics import activation_scale, is_lopsided
from mpqdiff.records import Statistics
from mpqdiff.sites import Site, module_path


class Table(NamedTuple):
    """Scales [G,A] float32 and zero points [G,A] int8 of A operand columns in G groups.

    `timesteps` [G] int32 is where each row was measured. A zero point of 0 is symmetric.
    """

    timesteps: jax.Array
    scale: jax.Array
    zero_point: jax.Array


def lopsided(stats: Statistics, sites: Sequence[Site]) -> list[bool]:
    """[L]: whether a site's activation has a range that is better served asymmetrically.

    One answer for all timesteps, from the range over all of them, and for all calls of a module,
    from any of them: they share column sums of weights. Never of a product, see `lopsided_left`.
    """
    low, high = np.min(stats.input_min[..., 0], 0), np.max(stats.input_max[..., 0], 0)
    found = {
        module_path(site.path)
        for i, site in enumerate(sites)
        if site.kind != "product" and bool(is_lopsided(low[i], high[i]))
    }
    return [module_path(site.path) in found for site in sites]


def lopsided_left(stats: Statistics, sites: Sequence[Site]) -> list[bool]:
    """[L]: whether a site is a product whose left operand has a lopsided range, over all timesteps:
    softmax outputs, which are never negative. They take a zero point, which costs one column sum
    of the right operand as the product runs. The right operand stays symmetric: a second zero point
    would cost a reduction of the left one, which is the large one where there is a softmax.
    """
    low, high = np.min(stats.input_min[..., 0], 0), np.max(stats.input_max[..., 0], 0)
    pairs = zip(sites, is_lopsided(low, high), strict=True)
    return [site.kind == "product" and bool(flag) for site, flag in pairs]


def columns(sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    """Table columns of each site: one for a weight product, two (lhs, rhs) for a product."""
    taken, found = 0, {}
    for site in sites:
        width = 2 if site.kind == "product" else 1
        found[site.path] = tuple(range(taken, taken + width))
        taken += width
    return found


def check_readings(groups: int, beta: float) -> None:
    """Raises InputError on a negative number of rows, and unless 0 <= beta < 1."""
    if groups < 0:
        raise InputError(f"quantize.groups={groups}: expected rows, or 0 for every timestep")
    if not 0 <= beta < 1:
        raise InputError(f"quantize.beta={beta}: expected a share of the row before, 0 to below 1")


def rows(recorded, mode: str, groups: int = 0) -> np.ndarray:
    """The timesteps int32 [G] of the table's rows, of those `recorded` [T], descending.

    `groups`: at most so many rows, evenly among the recorded ones; 0 keeps all. Raises InputError
    on an unknown mode.
    """
    recorded = np.asarray(recorded, np.int32)
    if mode not in MODES:
        raise unknown_name("activation mode", mode, MODES)
    if mode == "static":
        return recorded[:1]
    if not groups or groups >= len(recorded):
        return recorded
    width = len(recorded) / groups
    return recorded[np.floor(width * (np.arange(groups) + 0.5)).astype(int)]


def ranges(stats: Statistics, mode: str, groups: int = 0, beta: float = 0.9):
    """(timesteps [G], low [G,L,2], high [G,L,2]) of the rows of `mode`; low <= 0 <= high.

    Raises InputError as `rows` and `check_readings` do.
    """
    check_readings(groups, beta)
    recorded, kept = np.asarray(stats.timesteps), rows(stats.timesteps, mode, groups)
    nearest = np.abs(kept - recorded[:, None]).argmin(axis=-1)
    served = [nearest == row for row in range(len(kept))]
    low = np.stack([np.asarray(stats.input_min)[own].min(axis=0) for own in served])
    high = np.stack([np.asarray(stats.input_max)[own].max(axis=0) for own in served])
    if mode == "ema":
        for i in range(1, len(kept)):
            low[i] = np.minimum(low[i], beta * low[i - 1])
            high[i] = np.maximum(high[i], beta * high[i - 1])
    return kept, low, high


def table(
    stats: Statistics,
    sites: Sequence[Site],
    *,
    mode: str,
    a_bits: dict[str, Any],
    groups: int = 0,
    beta: float = 0.9,
) -> Table:
    """The table of `mode` for `sites`, in the order of `stats`. `online` has zero rows.

    `a_bits` by site path, as in a Plan; a site left in float keeps its columns, unused. `groups`
    and `beta` as `ranges` takes them. Raises InputError as `ranges` does.
    """
    timesteps, low, high = ranges(stats, mode, groups, beta)
    count = 0 if mode == "online" else len(timesteps)
    # At most one of the two is set: that of a site with weights or that of a product.
    flags = zip(lopsided(stats, sites), lopsided_left(stats, sites), strict=True)
    scales, zeros = [], []
    for index, (site, pair) in enumerate(zip(sites, flags, strict=True)):
        entry = a_bits[site.path]
        widths = [entry["lhs"], entry["rhs"]] if isinstance(entry, dict) else [entry]
        for operand, bits in enumerate(widths):
            scale, zero = activation_scale(
                low[:, index, operand],
                high[:, index, operand],
                bits or 8,
                asymmetric=any(pair) and operand == 0,
            )
            scales.append(scale)
            zeros.append(zero)
    return Table(
        jnp.asarray(timesteps[:count], jnp.int32),
        jnp.stack(scales, axis=1)[:count].astype(jnp.float32),
        jnp.stack(zeros, axis=1)[:count].astype(jnp.int8),
    )


def row(steps: Table, t):
    """(scale, zero point) [..., A] of the row measured nearest to t ([] or [B])."""
    index = jnp.argmin(jnp.abs(steps.timesteps - jnp.asarray(t)[..., None]), axis=-1)
    return steps.scale[index], steps.zero_point[index]


def groups(recorded, timesteps, mode: str) -> tuple[tuple[int, int], ...]:
    """The [t_hi, t_lo] range of sampler steps that each table row serves (for `plan.json`).

    `recorded` [T] are the rows' timesteps, `timesteps` [S] the sampler's, both descending. A row
    that serves no step is left out.
    """
    steps = np.asarray(timesteps)
    if mode in ("static", "online"):
        return ((int(steps[0]), int(steps[-1])),)
    nearest = np.abs(np.asarray(recorded) - steps[:, None]).argmin(axis=-1)
    served = [steps[nearest == row] for row in range(len(recorded))]
    return tuple((int(own[0]), int(own[-1])) for own in served if len(own))
