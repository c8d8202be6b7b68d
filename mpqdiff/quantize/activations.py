"""Activation scales from recorded ranges: one row per group of timesteps, one column per operand.

`step_table`: a row for every recorded timestep, looked up inside the sampling scan by nearest
timestep. `static`: one row, the range over all timesteps. `online`: no table; the scale is each
token's absolute maximum, taken when the product runs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.errors import unknown_name
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
    from any of them: they share column sums. Products stay symmetric: correcting for two zero
    points would cost two further reductions of activations.
    """
    low, high = np.min(stats.input_min[..., 0], 0), np.max(stats.input_max[..., 0], 0)
    found = {
        module_path(site.path)
        for i, site in enumerate(sites)
        if site.kind != "product" and bool(is_lopsided(low[i], high[i]))
    }
    return [module_path(site.path) in found for site in sites]


def columns(sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    """Table columns of each site: one for a weight product, two (lhs, rhs) for a product."""
    taken, found = 0, {}
    for site in sites:
        width = 2 if site.kind == "product" else 1
        found[site.path] = tuple(range(taken, taken + width))
        taken += width
    return found


def table(stats: Statistics, sites: Sequence[Site], *, mode: str, a_bits: dict[str, Any]) -> Table:
    """The table of `mode` for `sites`, in the order of `stats`. `online` has zero rows.

    `a_bits` by site path, as in a Plan; a site left in float keeps its columns, unused.
    Raises InputError on an unknown mode.
    """
    if mode not in MODES:
        raise unknown_name("activation mode", mode, MODES)
    low, high = np.asarray(stats.input_min), np.asarray(stats.input_max)
    timesteps = np.asarray(stats.timesteps)
    if mode == "static":
        low, high, timesteps = low.min(0)[None], high.max(0)[None], timesteps[:1]
    count = 0 if mode == "online" else len(timesteps)
    flags = lopsided(stats, sites)
    scales, zeros = [], []
    for index, (site, flag) in enumerate(zip(sites, flags, strict=True)):
        entry = a_bits[site.path]
        widths = [entry["lhs"], entry["rhs"]] if isinstance(entry, dict) else [entry]
        for operand, bits in enumerate(widths):
            scale, zero = activation_scale(
                low[:, index, operand], high[:, index, operand], bits or 8, asymmetric=flag
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
    if mode != "step_table":
        return ((int(steps[0]), int(steps[-1])),)
    nearest = np.abs(np.asarray(recorded) - steps[:, None]).argmin(axis=-1)
    served = [steps[nearest == row] for row in range(len(recorded))]
    return tuple((int(own[0]), int(own[-1])) for own in served if len(own))
