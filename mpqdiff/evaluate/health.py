"""Health of a quantised model's activations: what its scales cut off, and what is not a number.

An integer product saturates values beyond its scale, infinities too, and reads NaN as 0, without a
word. Here one further pass over the arm's own trajectory counts them, at the float inputs of every
site that runs in integers, step by step.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff import intercept
from mpqdiff.denoiser import Denoise
from mpqdiff.errors import InputError
from mpqdiff.plan import Plan
from mpqdiff.quantize import activations
from mpqdiff.quantize.numerics import qmax
from mpqdiff.sites import Site

if TYPE_CHECKING:
    from mpqdiff.arms import Arm

COUNTS = ("values", "clipped", "nan", "inf")


def health(arm: "Arm", *, images: int = 4) -> dict[str, Any]:
    """What `report` says of `images` images of the arm, along its own trajectory.

    Raises InputError on an arm in float, which clips nothing, and on fewer than one image.
    """
    if arm.plan is None:
        raise InputError(f"arm {arm.name!r} is in float: it has no scales; ask a quantised arm")
    if images < 1:
        raise InputError(f"images={images}: expected at least 1")
    experiment, (params, denoise) = arm.experiment, arm.model
    take = experiment.conditions.take if experiment.halves == 1 else experiment.conditions.mixed
    trajectory = arm.trajectory(images), arm.timesteps, take(0, images)
    return report(count(denoise, params, experiment.sites, arm.plan, trajectory))


def count(
    denoise: Denoise, params, sites: Sequence[Site], plan: Plan, trajectory: tuple[Any, Any, Any]
) -> dict[str, np.ndarray]:
    """COUNTS of the inputs of each integer site, int64 [4] by path, summed over a trajectory.

    denoise and params of an integer model (`apply.build`) of `plan`; `trajectory` is
    (x_ts [S,B,H,W,C], timesteps [S], cond). One compilation, one scan over the steps. The two
    operands of a product are counted together.
    """
    watched = {site.path for site in plan.integer(sites)}
    columns = activations.columns(sites)

    def reduce(row, path, module, kind, args, out):
        del module, kind, out
        if path not in watched:
            return None
        bits = plan.a_bits[path]
        widths = tuple(bits.values()) if isinstance(bits, dict) else (bits,)
        return sum(map(partial(_count, row), args, columns[path], widths))

    @jax.jit
    def scan(params, x_ts, timesteps, cond):
        def step(_, at):
            x_t, t = at
            row = activations.row(params["steps"], t) if params["steps"].timesteps.size else None
            observed = intercept.observe(denoise, partial(reduce, row))
            return None, observed(params, x_t, t, cond)[1]

        return jax.lax.scan(step, None, (x_ts, timesteps))[1]

    x_ts, timesteps, cond = trajectory
    found = scan(params, jnp.asarray(x_ts), jnp.asarray(timesteps, jnp.int32), cond)
    paths = [site.path for site in sites if site.path in found]
    return {path: np.asarray(found[path], np.int64).sum(axis=0) for path in paths}


def report(counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`count` for people and JSON: {"clip_rate": {"mean", "max", "site"}, "not_finite", "by_site"}.

    A clip rate is the share of a site's values that are finite and beyond its scale, `mean` that
    over the sites, `site` where it is largest; `not_finite` counts NaN and infinities of all sites.
    Raises InputError on no site.
    """
    by_site = {}
    for path, found in counts.items():
        named = dict(zip(COUNTS, map(int, found), strict=True))
        by_site[path] = {"clip_rate": named["clipped"] / max(named["values"], 1), **named}
    if not by_site:
        raise InputError("no site runs in integers: there is no scale to be beyond")
    rates = {path: entry["clip_rate"] for path, entry in by_site.items()}
    worst = max(rates, key=lambda path: rates[path])
    return {
        "clip_rate": {
            "mean": float(np.mean([*rates.values()])),
            "max": rates[worst],
            "site": worst,
        },
        "not_finite": sum(entry["nan"] + entry["inf"] for entry in by_site.values()),
        "by_site": by_site,
    }


def _count(row, x, column: int, bits: int):
    """COUNTS int32 [4] of x against the scale and zero point in `column` of the step's row; without
    a row scales are taken from x itself, and nothing finite is beyond them."""
    x = x.astype(jnp.float32)
    nan, inf = jnp.isnan(x), jnp.isinf(x)
    if row is None:
        clipped = jnp.zeros((), bool)
    else:
        scale, zero = (jnp.asarray(value[..., column], jnp.float32) for value in row)
        steps = jnp.round(x * (1.0 / scale)) + zero
        limit = qmax(bits)
        clipped = ((steps < -limit - 1) | (steps > limit)) & ~inf
    sums = [jnp.sum(mask, dtype=jnp.int32) for mask in (clipped, nan, inf)]
    return jnp.stack([jnp.int32(x.size), *sums])
