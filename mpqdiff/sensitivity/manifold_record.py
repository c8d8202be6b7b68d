"""What the manifold score reads of a model: each site's principal directions, and its errors.

Two streamed passes over the calibration set, all timesteps pooled (`streamed`). The first has the
moments of every site's inputs and outputs. The second knows the directions: it runs the integer
product of every choice of a site, fed what the float model feeds it, and keeps four sums. Sites are
taken in groups whose moments fit in memory; each group has its own programs.

A product of activations is read by its left operand, a convolution by the channels at each
position.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpqdiff.denoiser import Denoise
from mpqdiff.errors import InputError
from mpqdiff.quantize.simulate import Choice
from mpqdiff.sensitivity import damage, manifold, streamed
from mpqdiff.sensitivity.streamed import Reduce, Setting
from mpqdiff.sensitivity.subspace import basis, intrinsic_dimension
from mpqdiff.sites import Site

# Bytes per entry of a sum of outer products: two in float32, three in float64 while they merge.
BYTES_PER_MOMENT = 32
BYTES_PER_ROW_ENTRY = 20


def record(
    denoise: Denoise,
    net,
    sites: Sequence[Site],
    choices: Sequence[Choice],
    legal,
    x_ts,
    timesteps,
    cond,
    *,
    share: float = 0.95,
    rows: int = 8192,
    rotate: bool = False,
    memory_gb: float = 1.0,
    chunks: Callable = lambda name: damage.in_memory,
) -> dict[str, np.ndarray]:
    """Signals of the M sites at which something is decided, and of the P pairs that are run.

    Of sites: site int32 [M]; of their inputs energy, k (directions with `share` of the variance)
    and features [M], and the spectrum (`spectra` parts it by site); of their outputs concentration
    [M], and with `rotate` that signal at the first pair, [M]. Of pairs: pair int32 [P,2] (site,
    choice), by site, then choice; leak, growth and error (`relative_error`) [P]. All in the
    notation of `manifold`.

    net: `simulate.supernet` of `choices`; x_ts [T,N,H,W,C] at `timesteps` [T], cond [N]. At most
    `rows` rows of a site and timestep are read, but one per image always; `memory_gb` bounds the
    moments of a group. `chunks(name)(count, compute)` runs `compute(i) -> dict of arrays` for
    i < count; the pipeline passes one that keeps what is finished on disk. Raises InputError on
    shapes that do not match, sites that the model never calls and, naming the site, features that
    are constant or not finite.
    """
    damage.check_inputs(x_ts, timesteps)
    if not rows >= 1:
        raise InputError(f"rows={rows}: expected 1 or more")
    pairs = damage.measured(sites, choices, legal)
    taken: dict[int, list[int]] = {}
    for index, k in pairs:
        taken.setdefault(index, []).append(k)
    steps, positions = np.asarray(timesteps, np.int32), max(1, rows // np.shape(x_ts)[1])
    setting = Setting(denoise, net, sites, choices, x_ts, steps, cond, positions)
    parts = [
        _group(setting, group, share, rotate, lambda name, i=i: chunks(f"{name}_{i}"))
        for i, group in enumerate(_groups(setting, taken, memory_gb))
    ]
    found = {"site": np.array(list(taken), np.int32), "pair": np.reshape(pairs, (-1, 2))}
    for name in parts[0] if parts else ():
        found[name] = np.concatenate([part[name] for part in parts])
    return found


def spectra(spectrum, features) -> np.ndarray:
    """Variances along the principal directions of each site's inputs, descending, float64 [M,D]
    with D the most features of a site; 0 beyond a site's own.

    spectrum float [sum of features] of all sites, one after the other; features [M].
    """
    counts = np.asarray(features, int)
    found = np.zeros((len(counts), counts.max(initial=0)))
    found[np.arange(found.shape[1]) < counts[:, None]] = spectrum
    return found


def _group(setting: Setting, taken: dict, share: float, rotate: bool, chunks: Callable) -> dict:
    """What `record` finds at the sites of one group; taken: {site: its choices}, by index."""

    def directions(_):
        run = streamed.program(setting, taken, _inputs_and_outputs(setting))
        held = streamed.accumulated(setting, run, {})
        return {key: value for i in taken for key, value in _described(setting, i, held[i], share)}

    (own,) = chunks("directions")(1, directions)
    given = {i: (own[f"mean_{i}"], own[f"basis_{i}"]) for i in taken}
    run = streamed.program(setting, taken, _errors(setting, taken))
    sums = chunks("errors")(
        len(setting.steps),
        lambda row: {
            f"sums_{i}": value
            for i, value in streamed.at_timestep(setting, run, given, row).items()
        },
    )
    found = []
    for i in taken:
        total = np.stack([each[f"sums_{i}"] for each in sums]).sum(axis=0, dtype=np.float64)
        found += [manifold.of_sums(row, own[f"power_{i}"]) for row in total]
    found = np.array(found)
    out = {"leak": found[:, 0], "growth": found[:, 1], "error": found[:, 2]}
    out |= {
        name: np.array([own[f"{name}_{i}"] for i in taken])
        for name in ("energy", "k", "features", "concentration")
    }
    out["spectrum"] = np.concatenate([own[f"spectrum_{i}"] for i in taken])
    if rotate:
        (part,) = chunks("rotate")(1, lambda _: {"rotate": _turned(setting, taken, given)})
        out |= part
    return out


def _groups(setting: Setting, taken: dict, memory_gb: float) -> list[dict]:
    """`taken` in order, cut where the moments of a further site would exceed the memory."""
    if not taken:
        return []
    run = streamed.program(setting, taken, _inputs_and_outputs(setting))
    arguments = setting.net, {}, setting.x_ts[0], setting.steps[0], setting.cond
    groups, left = [], 0.0
    for i, sides in jax.eval_shape(run, *arguments).items():
        cost = sum(
            BYTES_PER_ROW_ENTRY * len(setting.steps) * side["rows"].size
            if "rows" in side
            else BYTES_PER_MOMENT * side["m2"].size
            for side in sides.values()
        )
        if not groups or cost > left:
            groups.append({})
            left = memory_gb * 2**30
        groups[-1][i] = taken[i]
        left -= cost
    return groups


def _inputs_and_outputs(setting: Setting) -> Reduce:
    """The first pass."""

    def reduce(net, given, t, index, module, args, out):
        both = {"inputs": args[0], "outputs": out}
        path = setting.sites[index].path
        return {
            name: streamed.reduced(setting, streamed.flat(setting, x, path))
            for name, x in both.items()
        }

    return reduce


def _errors(setting: Setting, taken: dict) -> Reduce:
    """The second pass: sums [choices,4] over rows of |e|^2, |V'e|^2, c.e and (V'c).(V'e), where
    e = y' - y and c = y - mean. They are all that `manifold.of_sums` needs."""

    def reduce(net, given, t, index, module, args, out):
        site, (mean, directions) = setting.sites[index], given[index]
        y = streamed.flat(setting, out, site.path)
        centred = y - mean
        inside = streamed.dot(centred, directions)
        quantised = streamed.quantised(setting, net, t, site, module, args)

        def one(choice):
            error = quantised(choice) - y
            within = streamed.dot(error, directions)
            products = (error, error), (within, within), (centred, error), (inside, within)
            return jnp.stack([jnp.sum(a * b) for a, b in products])

        return lax.map(one, jnp.array(taken[index]))

    return reduce


def _turned(setting: Setting, taken: dict, given: dict) -> np.ndarray:
    """`pca_rotate` of each site at its first choice, [M]: the only one that needs directions of
    the quantised outputs."""

    def reduce(net, given, t, index, module, args, out):
        quantised = streamed.quantised(setting, net, t, setting.sites[index], module, args)
        return {"outputs": streamed.reduced(setting, quantised(taken[index][0]))}

    held = streamed.accumulated(setting, streamed.program(setting, taken, reduce), {})
    found = []
    for i in taken:
        mine, theirs = given[i][1], held[i]["outputs"]
        if streamed.varies(theirs):
            vectors = streamed.directions(theirs, setting.sites[i].path).vectors
        else:  # quantised to constants: all directions are lost
            vectors = np.zeros((len(mine), 0))
        found.append(manifold.apart(mine, vectors[:, : mine.shape[1]]))
    return np.array(found)


def _described(setting: Setting, i: int, held: dict, share: float):
    """What the first pass found of site `i`, as (key, array)."""
    path = setting.sites[i].path
    inputs = streamed.directions(held["inputs"], f"inputs of site {path!r}")
    outputs = streamed.directions(held["outputs"], f"outputs of site {path!r}")
    directions = basis(outputs, share=share)
    inside, outside = np.split(outputs.values, [directions.shape[1]])
    yield f"energy_{i}", np.log10(manifold.power(inputs))
    yield f"k_{i}", intrinsic_dimension(inputs.values, share=share)
    yield f"features_{i}", inputs.mean.size
    left = inputs.mean.size - inputs.values.size  # directions of no variance, where rows were few
    yield f"spectrum_{i}", np.pad(inputs.values, (0, left)).astype(np.float32)
    yield f"concentration_{i}", manifold.pca_concentration(outputs)
    sums = inside.sum(), outside.sum(), manifold.power(outputs)
    yield f"power_{i}", streamed.count_of(held["outputs"]) * np.array(sums)
    yield f"mean_{i}", outputs.mean.astype(np.float32)
    yield f"basis_{i}", directions.astype(np.float32)
