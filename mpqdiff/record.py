"""One streamed pass of the float denoiser over the calibration set -> Statistics.

Inside the forward pass each site's output is flattened per sample, centred over samples in
float32 and reduced to its N x N Gram, a slice of features at a time; raw activations never leave
the program, nor are they copied whole inside it. The pass is written for one timestep and vmapped
over a chunk of them; chunks are sized by a memory budget.
"""

from collections.abc import Callable, Sequence
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff import intercept
from mpqdiff.denoiser import Denoise
from mpqdiff.errors import InputError
from mpqdiff.kernels.gram import gram as centred_gram
from mpqdiff.records import Statistics
from mpqdiff.sites import Site


def _once_reduced(out, taken: dict):
    """`out` itself, but to the compiler only known when its Gram is.

    Free to choose, XLA reduces late and keeps several activations alive; a barrier does not stop
    it on CPUs. A diagonal entry of a Gram is never negative, and NaN only if `out` holds NaN.
    """
    if "gram" not in taken:
        return out
    return jnp.where(taken["gram"][0, 0] >= 0.0, out, jnp.nan)


def per_sample(out, samples: int, path: str):
    """out [N,...] itself; [N*M,...], other axes folded into the batch, as [N,M,...]; and [1,...],
    in which no sample has a part, once for each.

    Raises InputError on a first axis that is none of these.
    """
    if out.shape[0] == samples:
        return out
    if out.shape[0] == 1:
        return jnp.broadcast_to(out, (samples, *out.shape[1:]))
    if out.shape[0] % samples:
        raise InputError(
            f"site {path!r} gives {list(out.shape)} for {samples} samples: expected the samples as "
            "the first axis; leave the site out of the list, or wrap the module with "
            "mpqdiff.from_flax, which moves them there"
        )
    return out.reshape(samples, -1, *out.shape[1:])


def _range(args):
    """(min, max) of both operands, [2] each; zero is always inside, a weight operand gives 0."""
    operands = [jnp.asarray(arg) for arg in args[:2]]
    operands += [jnp.zeros(())] * (2 - len(operands))
    low = jnp.stack([jnp.minimum(operand.min(), 0.0) for operand in operands])
    return low, jnp.stack([jnp.maximum(operand.max(), 0.0) for operand in operands])


def one_timestep(denoise: Denoise, sites: Sequence[Site], *, grams: bool = True) -> Callable:
    """The reductions of one timestep: `(params, x_t [N,H,W,C], t [N], cond) -> dict`.

    Keys: gram [L,N,N], row_sums [L,N] (with `grams`), input_min and input_max [L,2].
    """
    wanted = {site.path for site in sites}

    def run(params, x_t, t, cond):
        def reduce(path, module, kind, args, out):
            if path not in wanted:
                return None
            low, high = _range(args)
            taken: dict[str, jax.Array] = {"input_min": low, "input_max": high}
            if grams:
                rows = per_sample(out, x_t.shape[0], path)
                taken["gram"], taken["row_sums"] = centred_gram(rows)
            return taken

        observed = intercept.observe(denoise, reduce, proceed=_once_reduced)
        _, taken = observed(params, x_t, t, cond)
        missing = wanted - set(taken)
        if missing:
            raise InputError(f"sites never called by this model: {sorted(missing)}")
        return jax.tree.map(lambda *rows: jnp.stack(rows), *[taken[site.path] for site in sites])

    return run


def detect_time_only(denoise: Denoise, params, x_t, t, cond, sites: Sequence[Site]):
    """bool [L]: sites whose output does not change when x_t does (t and cond held).

    x_t [N,H,W,C]; each sample is compared with the same timestep and label on another's x_t.
    A zero test of the centred Gram would miss them as soon as there are labels.
    """

    def reduce(path, module, kind, args, out):
        return _digest(out)

    observed = jax.jit(intercept.observe(denoise, reduce))
    t = jnp.broadcast_to(t, x_t.shape[:1])
    _, one = observed(params, x_t, t, cond)
    _, two = observed(params, x_t[::-1] + 0.5, t, cond)
    return np.array([bool(one[site.path] == two[site.path]) for site in sites])


def _digest(x):
    """uint32 checksum of the float32 bits of x: equal for equal arrays, else 2^-32 likely to be."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32).reshape(-1), jnp.uint32)
    odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
    return jnp.sum(bits * odd, dtype=jnp.uint32)


def timesteps_per_chunk(sites: Sequence[Site], samples: int, memory_gb: float) -> int:
    """How many timesteps to vmap at once: the activations of every site are assumed alive.

    A site's output has MACs / (parameters / outputs) elements per image.
    """
    per_image = 0
    for site in sites:
        depth = prod(site.shape[:-1]) if site.shape else 1
        per_image += site.macs // max(depth, 1)
    return max(1, int(memory_gb * 2**30 / (4 * samples * max(per_image, 1))))


def record(
    denoise: Denoise,
    params,
    x_ts,
    timesteps,
    cond,
    sites: Sequence[Site],
    *,
    memory_gb: float = 1.0,
    chunks: Callable = lambda count, compute: [compute(i) for i in range(count)],
) -> Statistics:
    """Reduce one pass over x_ts [T,N,H,W,C] at `timesteps` [T] with cond [N] to Statistics.

    `chunks(count, compute)` runs `compute(i) -> dict of arrays` for every chunk; the pipeline
    passes one that keeps finished chunks on disk. Raises InputError when the shapes do not fit,
    a site is never called, or a reduction is not finite (naming the site and the timestep).
    """
    total, samples = x_ts.shape[:2]
    timesteps = np.asarray(timesteps, np.int32)
    if not sites or not total or timesteps.shape != (total,):
        raise InputError(
            f"recording got {len(sites)} sites, x_ts {x_ts.shape} and timesteps {timesteps.shape}; "
            "expected a site or more, [T,N,H,W,C] and [T]"
        )
    one = one_timestep(denoise, sites)
    over_timesteps = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, None)))
    count = -(-total // timesteps_per_chunk(sites, samples, memory_gb))
    size = -(-total // count)
    t_rows = np.broadcast_to(timesteps[:, None], (total, samples))

    def compute(index):
        # The last chunk is padded by repetition, so that every chunk has the compiled shape.
        rows = np.minimum(np.arange(index * size, (index + 1) * size), total - 1)
        taken = jax.device_get(over_timesteps(params, x_ts[rows], t_rows[rows], cond))
        return {name: value[: total - index * size] for name, value in taken.items()}

    parts = chunks(-(-total // size), compute)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name, value in joined.items():
        _check_finite(name, value, timesteps, sites)
    at = pooled_rows(total, samples)
    pooled = jax.jit(one_timestep(denoise, sites))(
        params, x_ts[at, np.arange(samples)], timesteps[at], cond
    )
    return Statistics(
        timesteps=timesteps,
        gram=joined["gram"],
        row_sums=joined["row_sums"],
        pooled_gram=np.asarray(pooled["gram"]),
        pooled_row_sums=np.asarray(pooled["row_sums"]),
        time_only=detect_time_only(denoise, params, x_ts[0], timesteps[0], cond, sites),
        input_min=joined["input_min"],
        input_max=joined["input_max"],
    )


def pooled_rows(timesteps: int, samples: int) -> np.ndarray:
    """Which timestep each sample has in the pooled Gram: int [N], every timestep equally often.

    In an order of its own: labels run in cycles, and i mod T would tie each one to few timesteps.
    """
    return np.random.default_rng(0).permutation(np.arange(samples) % timesteps)


def _check_finite(name: str, value, timesteps, sites: Sequence[Site]) -> None:
    """InputError unless `value` [T,L,...] is finite."""
    bad = ~np.isfinite(value).all(axis=tuple(range(2, value.ndim)))
    if bad.any():
        t, site = np.argwhere(bad)[0]
        raise InputError(
            f"{name} of site {sites[site].path!r} holds NaN or infinity at timestep "
            f"{timesteps[t]} ({bad.sum()} of {bad.size} site-timesteps); check the weights and x_ts"
        )
