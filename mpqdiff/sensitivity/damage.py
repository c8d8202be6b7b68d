"""What the damage scores share: which (site, choice) pairs to run, in chunks, and what comes out.

Damage is the expected loss of taking a choice at one site while the others stay in float. It is 0
for float by definition, and left at 0 for a site with a single legal choice, where nothing is
decided; neither is run. A product of two activations has no weights, so that its choices of equal
`a_bits` are one and the same.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.quantize.simulate import Choice, widths
from mpqdiff.records import FLOAT_BITS, Scores
from mpqdiff.sites import Site

Pair = tuple[int, int]  # (index of a site, index of a choice)

# A few seconds on two CPU cores. It fixes what a chunk holds, so that a resumed run finds its own.
MACS_PER_CHUNK = 10**11


def in_memory(count: int, compute: Callable[[int], dict]) -> list[dict]:
    """The `chunks` of a score that keeps nothing on disk."""
    return [compute(index) for index in range(count)]


def measured(sites: Sequence[Site], choices: Sequence[Choice], legal) -> list[Pair]:
    """The pairs to run, by site.

    Raises InputError unless `choices` are ones and `legal` is bool [L,K] with no empty row.
    """
    widths(choices)
    legal = np.asarray(legal)
    if legal.shape != (len(sites), len(choices)) or legal.dtype != bool:
        raise InputError(
            f"legal is {legal.dtype} {legal.shape}, expected bool {(len(sites), len(choices))}"
        )
    empty = [site.path for site, row in zip(sites, legal, strict=True) if not row.any()]
    if empty:
        raise InputError(f"no legal choice at {empty}: relax a pin or add a choice")
    pairs = []
    for index, row in enumerate(legal):
        if row.sum() == 1:
            continue
        distinct: dict[Choice, int] = {}
        for k in map(int, np.flatnonzero(row)):
            if choices[k][0] != FLOAT_BITS:
                distinct.setdefault(_seen(sites[index], choices[k]), k)
        pairs += [(index, k) for k in distinct.values()]
    return pairs


def _seen(site: Site, choice: Choice) -> Choice:
    """`choice` as far as `site` can tell."""
    return (0, choice[1]) if site.kind == "product" else (choice[0], choice[1])


def in_chunks(
    items: Sequence, measure: Callable, chunks: Callable, *, evaluations: int, sites: Sequence[Site]
) -> np.ndarray:
    """`measure(item) -> [...]` of every item, stacked [items,...], computed in chunks.

    `evaluations` are the denoiser's, times images, for one item. A chunk is handed to the device
    whole before its first result is waited for.
    """
    size = max(1, MACS_PER_CHUNK // max(1, evaluations * sum(site.macs for site in sites)))

    def compute(index):
        rows = [measure(item) for item in items[index * size : (index + 1) * size]]
        return {"damage": np.stack(jax.device_get(rows))}

    parts = chunks(-(-len(items) // size), compute)
    return np.concatenate([part["damage"] for part in parts])


@jax.jit
def mean_squares(a, b):
    """Mean of (a - b)^2 over all axes but the first: a, b [T,...] -> float32 [T]."""
    change = (a - b).astype(jnp.float32)
    return jnp.mean(change**2, axis=tuple(range(1, a.ndim)))


def check_inputs(x_ts, timesteps) -> None:
    """Raises InputError unless x_ts [T,N,H,W,C] has a row for each of `timesteps` [T]."""
    if np.ndim(x_ts) != 5 or np.shape(timesteps) != np.shape(x_ts)[:1] or not np.size(x_ts):
        raise InputError(
            f"x_ts of {np.shape(x_ts)} at timesteps of {np.shape(timesteps)}: expected "
            "[T,N,H,W,C] and [T], one of each or more"
        )


def scores(
    name: str, found, pairs: Sequence[Pair], sites: Sequence[Site], choices, legal
) -> Scores:
    """The Scores of `found` [T,P], the damage of each pair: spread to [T,L,K] and made monotone.

    Raises InputError, naming the site and the choice, on damage that is not finite.
    """
    found = np.asarray(found, np.float32)
    value = np.zeros((len(found), len(sites), len(choices)), np.float32)
    for column, (site, k) in zip(found.T, pairs, strict=True):
        if not np.isfinite(column).all():
            raise InputError(
                f"{name} of site {sites[site].path!r} at {tuple(choices[k])} bits is not finite: "
                "check the weights and the calibration inputs"
            )
        for other in np.flatnonzero(legal[site]):
            if _seen(sites[site], choices[other]) == _seen(sites[site], choices[k]):
                value[:, site, other] = column
    value, violations = monotone(value, choices, legal)
    return Scores(value=value, kind="damage", name=name, violations=violations)


def monotone(value, choices: Sequence[Choice], legal) -> tuple[np.ndarray, int]:
    """`value` [T,L,K] with damage that never rises with bits, and how many entries that lowered.

    An entry becomes the least among the legal choices of its site that are no wider in weights
    nor in activations: with more bits a site does no worse, and what says otherwise is noise.
    Entries that are not legal take no part.
    """
    value, bits = np.asarray(value), np.asarray(choices).reshape(-1, 2)
    known = np.where(legal, value, np.inf)
    least = [known[..., (bits <= own).all(axis=-1)].min(axis=-1) for own in bits]
    fixed = np.where(legal, np.stack(least, axis=-1), value).astype(value.dtype)
    return fixed, int((fixed < value).sum())


def most(pairs: Sequence[Pair]) -> int:
    """The largest number of pairs that any one site has."""
    return max(Counter(site for site, _ in pairs).values(), default=0)


def evaluations(
    name: str,
    sites: Sequence[Site],
    choices: Sequence[Choice],
    T: int,
    N: int,
    S: int,
    *,
    legal=None,
) -> int:
    """Evaluations of the denoiser, times images, that the score `name` takes; 0 for most scores.

    T timesteps of N samples each, or rollouts of N images over S steps (guidance doubles those);
    without `legal`, as if every choice were.
    """
    legal = np.ones((len(sites), len(choices)), bool) if legal is None else legal
    pairs = measured(sites, choices, legal)
    if not pairs:
        return 0
    counts = {
        "output_error": T * N * (1 + most(pairs)),
        "manifold": T * N * (2 + most(pairs)),
        "eps_error": T * N * (1 + len(pairs)),
        "rollout_error": S * N * (1 + len(pairs)),
    }
    return counts.get(name, 0)
