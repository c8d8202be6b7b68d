"""Evolutionary search as TMPQ-DM runs it (arXiv 2404.09532 and its released code).

    P <- {x_0} + random + mutations of x_0
    repeat: archive <- best(archive u P); parents <- the best of it
            P <- mutations of parents + uniform crossovers of two parents + random

`search` knows neither genes nor budgets: `Genes` holds the operators. Every child is unseen, so
each evaluation of the fitness is of a new individual. `solve` is the search over the choices of a
`Problem`, where children above a budget are repaired instead of drawn again.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.records import Allocation, Problem
from mpqdiff.solve import uniform
from mpqdiff.solve.certify import begin, certify
from mpqdiff.solve.feasible import Rows, rows, scarcity

ATTEMPTS = 20  # at drawing what is still missing, so that a small space ends the search
Fitness = Callable[[np.ndarray], np.ndarray]
Generator = np.random.Generator


class Schedule(NamedTuple):
    """How many individuals, of which kind, for how long; the defaults are the paper's."""

    population: int = 50
    parents: int = 10
    archive: int = 50
    mutations: int = 25  # per generation; what these and the crossovers leave is random
    crossovers: int = 10
    generations: int = 20
    rate: float = 0.25  # of mutation, per gene
    first_rate: float = 0.1  # in the first population


PAPER = Schedule()


class Genes(NamedTuple):
    """Operators on individuals, int [P,G]; none changes its arguments."""

    draw: Callable[[Generator, int], np.ndarray]  # (rng, P) -> random [P,G]
    mutate: Callable[[Generator, np.ndarray, float], np.ndarray]  # (rng, [P,G], rate) -> [P,G]
    cross: Callable[[Generator, np.ndarray, np.ndarray], np.ndarray]  # two [P,G] -> [P,G]
    admit: Callable[[Generator, np.ndarray], np.ndarray]  # [P,G] -> those allowed, [<=P,G]


def cross(rng: Generator, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Uniform crossover: each gene from either parent, [P,G]."""
    return np.where(rng.random(one.shape) < 0.5, one, other)


def _unseen(seen: set[bytes], count: int, make: Callable[[], np.ndarray]) -> list[np.ndarray]:
    """Up to `count` of the individuals [P,G] that `make` returns, asked again and again; those
    in `seen` are left out, and the others added to it."""
    out: list[np.ndarray] = []
    for _ in range(ATTEMPTS):
        if len(out) >= count:
            break
        for child in make():
            mark = child.astype(np.int64).tobytes()
            if len(out) < count and mark not in seen:
                seen.add(mark)
                out.append(child)
    return out


def search(
    fitness: Fitness,
    first: np.ndarray,
    genes: Genes,
    rng: Generator,
    schedule: Schedule,
) -> tuple[np.ndarray, np.ndarray]:
    """(individuals [A,G], fitness [A]) of the archive, the least fitness first; equals as found.

    `first` [P,G] are the individuals to start from; half of the rest of the first population is
    random, half are mutations of them. Ends after `schedule.generations`, or once nothing unseen
    turns up. `fitness` takes [P,G] and returns [P], less is better. Raises InputError where it
    returns another shape or NaN, and on a schedule without anyone or any generation.
    """
    size, first = schedule.population, np.atleast_2d(first)
    if min(size, schedule.parents, schedule.archive, schedule.generations) < 1:
        raise InputError(f"{schedule}: population, parents, archive, generations are at least 1")
    seen: set[bytes] = set()

    def fresh():
        return genes.admit(rng, genes.draw(rng, size))

    def mutated(pool, rate):
        parents = pool[rng.integers(len(pool), size=size)]
        return genes.admit(rng, genes.mutate(rng, parents, rate))

    def crossed(pool):
        one, other = pool[rng.integers(len(pool), size=(2, size))]
        return genes.admit(rng, genes.cross(rng, one, other))

    born = _unseen(seen, len(first), lambda: genes.admit(rng, first))
    born += _unseen(seen, (size - len(born)) // 2, fresh)
    born += _unseen(seen, size - len(born), partial(mutated, first, schedule.first_rate))
    best, score = np.empty((0, first.shape[1]), first.dtype), np.empty(0)
    for generation in range(schedule.generations):
        if not born:
            break
        best = np.concatenate([best, np.stack(born)])
        score = np.concatenate([score, _evaluate(fitness, np.stack(born))])
        order = np.argsort(score, kind="stable")[: schedule.archive]
        best, score = best[order], score[order]
        if generation < schedule.generations - 1:
            elite = best[: schedule.parents]
            born = _unseen(seen, schedule.mutations, partial(mutated, elite, schedule.rate))
            born += _unseen(seen, schedule.crossovers, partial(crossed, elite))
            born += _unseen(seen, size - len(born), fresh)
    return best, score


def _evaluate(fitness: Fitness, individuals: np.ndarray) -> np.ndarray:
    out = np.asarray(fitness(individuals), np.float64)
    if out.shape != (len(individuals),) or np.isnan(out).any():
        raise InputError(f"fitness returned {out}, expected {len(individuals)} numbers, none NaN")
    return out


def repaired(rng: Generator, table: Rows, base: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """`choices` [P,L] with randomly drawn sites lowered until all budgets hold, [P,L].

    Lowering is to the next cheaper choice (`scarcity`; of equals the widest), one step for each
    site in a random order, pass after pass; where that is not enough for several budgets, to
    the choice of `base` [L], which is within them. Individuals within them stay as they are.
    """
    choices, lower = np.array(choices, np.int32), _lower(table)
    sites, passes = np.arange(choices.shape[1]), table.legal.shape[1]
    for turn in range(passes):
        rest = np.flatnonzero(~_within(table, choices))
        if not len(rest):
            break
        now = choices[rest]
        after = lower[sites, now] if turn < passes - 1 else np.broadcast_to(base, now.shape)
        order = rng.permuted(np.tile(sites, (len(rest), 1)), axis=1)
        # Lowered in this order, all sites up to which? The first count that is enough.
        change = table.cost[:, sites, after] - table.cost[:, sites, now]
        change = np.take_along_axis(change, order[None], axis=2).cumsum(axis=2)
        total = table.cost[:, sites, now].sum(axis=2)[..., None] + change
        enough = (total <= table.limit[:, None, None]).all(axis=0)
        count = np.where(enough.any(axis=1), enough.argmax(axis=1), len(sites))
        rank = np.argsort(order, axis=1)
        choices[rest] = np.where(rank <= count[:, None], after, now)
    return choices


def _lower(table: Rows) -> np.ndarray:
    """The next cheaper choice of each, [L,K]; itself where there is none."""
    price = scarcity(table.cost, table.legal, table.limit)
    out = np.tile(np.arange(price.shape[1]), (len(price), 1))
    for k in range(price.shape[1]):
        cheaper = np.where(price < price[:, k, None], price, -np.inf)
        widest = price.shape[1] - 1 - cheaper[:, ::-1].argmax(axis=1)
        out[:, k] = np.where(cheaper.max(axis=1) > -np.inf, widest, k)
    return out


def _within(table: Rows, choices: np.ndarray) -> np.ndarray:
    """Whether each of `choices` [P,L] is within every budget, bool [P]."""
    total = table.cost[:, np.arange(choices.shape[1]), choices].sum(axis=2)
    return (total <= table.limit[:, None]).all(axis=0)


def knapsack(table: Rows, base: np.ndarray, *, mend: bool = True) -> Genes:
    """The genes of a knapsack: one choice per site, uniform over those that are legal.

    Above a budget a child is repaired towards `base` [L], or dropped where not `mend`.
    """
    count = table.legal.sum(axis=1)
    legal = np.argsort(~table.legal, axis=1, kind="stable")

    def draw(rng: Generator, size: int) -> np.ndarray:
        index = (rng.random((size, len(count))) * count).astype(np.int64)
        return legal[np.arange(len(count)), index].astype(np.int32)

    def mutate(rng: Generator, choices: np.ndarray, probability: float) -> np.ndarray:
        changed = rng.random(choices.shape) < probability
        return np.where(changed, draw(rng, len(choices)), choices)

    def admit(rng: Generator, choices: np.ndarray) -> np.ndarray:
        if mend:
            choices = repaired(rng, table, base, choices)
        return choices[_within(table, choices)]

    return Genes(draw, mutate, cross, admit)


def _checked(table: Rows, seeds) -> np.ndarray:
    """`seeds` as int32 [P,L]; raises InputError where they are no legal choices."""
    out, (sites, choices) = np.atleast_2d(np.asarray(seeds)), table.legal.shape
    if out.ndim != 2 or out.shape[1] != sites or not np.issubdtype(out.dtype, np.integer):
        raise InputError(f"seeds are {out.dtype} {out.shape}, expected integers [P,{sites}]")
    bad = (out < 0) | (out >= choices)
    bad |= ~table.legal[np.arange(sites), np.where(bad, 0, out)]
    if bad.any():
        where = np.flatnonzero(bad.any(axis=0)).tolist()
        raise InputError(f"seeds: a choice is not legal at sites {where}")
    return out.astype(np.int32)


def solve(
    problem: Problem,
    *,
    key: jax.Array,
    fitness: Fitness | None = None,
    seeds: np.ndarray | None = None,
    repair: bool = True,
    schedule: Schedule = PAPER,
) -> Allocation:
    """The fittest of `search` over choices, from the uniform choice and `seeds` [P,L], if any.

    `fitness` takes choices int32 [P,L] and returns [P], less is better; the table's sum where
    None. The record's objective and bound are the table's in any case. Children above a budget
    are repaired (seeds too), or, without `repair`, drawn again. `key` is consumed.
    """
    table = rows(problem)
    sites = np.arange(len(table.legal))

    def table_sum(choices: np.ndarray) -> np.ndarray:
        return table.value[sites, choices].sum(axis=1)

    first = uniform.choose(problem)[None]
    if seeds is not None:
        first = np.concatenate([first, _checked(table, seeds)])
    genes = knapsack(table, begin(problem), mend=repair)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    best, _ = search(fitness or table_sum, first, genes, rng, schedule)
    return certify(problem, best[0])
