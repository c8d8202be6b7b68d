"""Rows of features at every site, streamed: float and quantised outputs, and their moments.

The float denoiser runs a timestep at a time; a reduction sees each site's call and what comes back
to the host is small. Moments are centred in float32 on the device and joined over timesteps in
float64 on the host; where a site has fewer rows than features the rows themselves are kept, and no
covariance is formed. Features are the last axis and rows all others.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpqdiff import intercept
from mpqdiff.denoiser import Denoise
from mpqdiff.errors import InputError
from mpqdiff.moments import Moments
from mpqdiff.quantize.simulate import Choice, site_product, step_rows
from mpqdiff.record import per_sample
from mpqdiff.sensitivity.subspace import CONSTANT, Principal, principal, principal_of_rows
from mpqdiff.sites import Site

# (net, given, t, index of the site, module, args, out) -> pytree
Reduce = Callable[[Any, Any, Any, int, Any, tuple, Any], Any]


class Setting(NamedTuple):
    """What every pass goes over, and how many positions of an image it reads."""

    denoise: Denoise
    net: Any  # `simulate.supernet` of `choices`
    sites: Sequence[Site]
    choices: Sequence[Choice]
    x_ts: Any  # [T,N,H,W,C]
    steps: np.ndarray  # int32 [T]
    cond: Any
    positions: int


def program(setting: Setting, taken: dict, reduce: Reduce) -> Callable:
    """`(net, given, x_t, t, cond) -> {site: reduction}` of the float model, jitted."""
    index = {setting.sites[i].path: i for i in taken}

    @jax.jit
    def run(net, given, x_t, t, cond):
        def at(path, module, kind, args, out):
            if path not in index:
                return None
            return reduce(net, given, t, index[path], module, args, out)

        _, found = intercept.observe(setting.denoise, at)(net["float"], x_t, t, cond)
        missing = sorted(index.keys() - found.keys())
        if missing:
            raise InputError(f"sites never called by this model: {missing}")
        return {index[path]: value for path, value in found.items()}

    return run


def at_timestep(setting: Setting, run: Callable, given, row: int) -> dict:
    """`run` at timestep `row`, on the host."""
    arguments = setting.net, given, setting.x_ts[row], setting.steps[row], setting.cond
    return jax.device_get(run(*arguments))


def sampled(setting: Setting, value, path: str):
    """value [N,...,D] at some positions of each image, float32 [N,P,D]; the same ones for arrays of
    the same size."""
    value = per_sample(jnp.atleast_2d(value), setting.x_ts.shape[1], path)
    value = value.reshape(len(value), -1, value.shape[-1]).astype(jnp.float32)
    total, kept = value.shape[1], setting.positions
    if total <= kept:
        return value
    rng = np.random.default_rng(0)
    index = np.stack([np.sort(rng.permutation(total)[:kept]) for _ in range(len(value))])
    return jnp.take_along_axis(value, jnp.asarray(index, jnp.int32)[..., None], axis=1)


def flat(setting: Setting, value, path: str):
    """`sampled` as rows [N P,D]."""
    rows = sampled(setting, value, path)
    return rows.reshape(-1, rows.shape[-1])


def quantised(setting: Setting, net, t, site: Site, module, args) -> Callable:
    """`choice -> y' [N P,D]`: the integer product of one call, at the positions that are read."""
    product, rows = site_product(setting.sites, setting.choices), step_rows(net, t)
    if site.kind == "dense":  # rows do not mix: only those that are read are multiplied
        args = (sampled(setting, args[0], site.path),)
    return lambda choice: flat(setting, product(net, rows, site, module, args, choice), site.path)


def reduced(setting: Setting, rows):
    """rows [n,D] of a timestep: count, mean [D] and sum of outer products about it [D,D]; or as
    they are, where those of all timesteps are fewer than D."""
    if len(rows) * len(setting.steps) < rows.shape[1]:
        return {"rows": rows}
    mean = rows.mean(axis=0)
    centred = rows - mean
    return {"count": len(rows), "mean": mean, "m2": dot(centred.T, centred)}


def dot(a, b):
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def accumulated(setting: Setting, run: Callable, given) -> dict[int, dict]:
    """{site: {side: Moments, or rows by timestep}} over all timesteps."""
    held: dict[int, dict] = {}
    for row in range(len(setting.steps)):
        for i, sides in at_timestep(setting, run, given, row).items():
            own = held.setdefault(i, {})
            for side, new in sides.items():
                if "rows" in new:
                    own.setdefault(side, []).append(new["rows"])
                    continue
                mean, m2 = new["mean"].astype(np.float64), new["m2"].astype(np.float64)
                found = Moments(int(new["count"]), mean, m2)
                own[side] = own[side].merge(found) if side in own else found
    return held


def directions(held, name: str) -> Principal:
    """The directions of Moments, or of rows."""
    if isinstance(held, Moments):
        return principal(held.mean, held.m2 / held.count, name=name)
    return principal_of_rows(np.concatenate(held), name=name)


def varies(held) -> bool:
    """Whether any feature of Moments, or of rows, is not constant but for rounding."""
    if isinstance(held, Moments):
        return bool(np.any(np.diagonal(held.m2) > CONSTANT * held.count * held.mean**2))
    rows = np.concatenate(held)
    return bool(np.any(rows.var(axis=0, dtype=np.float64) > CONSTANT * rows.mean(axis=0) ** 2))


def count_of(held) -> int:
    return held.count if isinstance(held, Moments) else sum(map(len, held))
