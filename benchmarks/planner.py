"""The planner's LP against HiGHS: agreement, a front of 64 budgets, and 20 000 sites.

    python benchmarks/planner.py [--instances 500] [--fronts 250x7x3 2000x15x4] [--sites 20000]

HiGHS is `scipy.optimize.linprog` with sparse matrices, built before the clock starts, on one
thread. Agreement gives it the scaled problem and tolerances of 1e-10: with its own 1e-7 it can be
off by more than what is compared. A front is timed as one call of `interior.solve_many`, which
also rounds, certifies and makes the records, after compilation, against the better of highs-ds
and highs-ipm at default tolerances, every budget. Times are of one run, the two sides in turn.
Exits with 1 where an objective differs by more than 1e-7.
"""

import argparse
import resource
import sys
import time
from collections import Counter

import numpy as np
import scipy.sparse as sparse
from scipy.optimize import linprog

from mpqdiff.records import Problem
from mpqdiff.solve import interior
from mpqdiff.solve.feasible import Rows, rows

AGREEMENT = 1e-7
SHAPES = ((1, 4, 2), (8, 7, 3), (40, 5, 2), (64, 1, 2), (250, 7, 3), (1000, 3, 1), (2000, 15, 4))
WEIGHTS = (0.1, 0.2, 0.25, 0.05, 0.25, 0.1, 0.05)
STYLES = ("sizes", "uniform", "integers", "duplicates", "flat", "free", "decades")
BUDGETS = ("inside", "least", "edge", "ample", "mixed")


def tables(rng, shape: tuple[int, int, int], style: str):
    """value [L,K], cost [R,L,K], legal [L,K] of one style."""
    sites, choices, resources = shape
    bits = np.linspace(2, 8, choices)
    size = np.exp(rng.normal(12, 1.5, sites))
    value = np.exp(rng.normal(0, 2, sites))[:, None] * 4.0**-bits
    value *= np.exp(rng.normal(0, 0.2, (sites, choices)))
    noise = np.exp(rng.normal(0, 0.5, (resources, sites, choices)))
    noise[0] = 1  # bytes; the others are like latency: of no fixed order
    cost = np.ceil(size)[:, None] * bits * noise
    if style == "uniform":
        value, cost = rng.random(value.shape), rng.random(cost.shape)
    elif style == "integers":
        value = rng.integers(0, 4, value.shape).astype(float)
        cost = rng.integers(0, 4, cost.shape).astype(float)
    elif style == "duplicates":
        kind = rng.integers(0, min(3, sites), sites)
        value, cost = value[kind], cost[:, kind]
    elif style == "flat":
        value, cost = np.ones_like(value), np.broadcast_to(np.ceil(size)[:, None], cost.shape)
    elif style == "free":
        cost = cost * (rng.random(cost.shape) < 0.5)
    elif style == "decades":
        value = 10.0 ** rng.uniform(-5, 0, value.shape)
    legal = rng.random(value.shape) < rng.choice([0.6, 1.0])
    legal[rng.random(sites) < 0.1] = False  # pins
    legal[np.arange(sites), rng.integers(0, choices, sites)] = True
    return value, np.array(cost, float), legal


def budgets(rng, cost, legal, kind: str):
    """Budgets [R] of one kind; "mixed" may contradict each other."""
    least = np.where(legal, cost, np.inf).min(axis=2).sum(axis=1)
    most = np.where(legal, cost, -np.inf).max(axis=2).sum(axis=1)
    inside = least + rng.uniform(0.2, 0.9, len(cost)) * (most - least)
    if kind == "least":
        inside[0] = least[0]
    elif kind == "edge":  # what some allocation spends exactly
        choice = np.where(legal, rng.random(legal.shape), -1).argmax(axis=1)
        inside = np.take_along_axis(cost, choice[None, :, None], axis=2)[..., 0].sum(axis=1)
    elif kind == "ample":
        inside = most * rng.uniform(1, 2, len(cost))
        inside[-1] = np.inf
    elif kind == "mixed":
        inside = least + rng.uniform(0, 1.2, len(cost)) * (most - least)
    return inside


def build(value, cost, legal, limits) -> Problem:
    """A problem without fixed costs or ties."""
    sites, choices = value.shape
    bits = np.arange(2, 2 + choices, dtype=np.int32)
    return Problem(
        value=value, resources=cost, fixed=np.zeros(len(cost)), budgets=np.asarray(limits, float),
        w_bits=bits, a_bits=bits, legal=legal, tie=np.arange(sites, dtype=np.int32),
        parameters=np.ones(sites, int),
    )  # fmt: skip


class Highs:
    """The same LP for HiGHS; matrices are built once."""

    def __init__(self, table: Rows):
        sites, choices = table.value.shape
        self.value = table.value.ravel()
        self.cost = sparse.csr_matrix(table.cost.reshape(len(table.cost), -1))
        self.one = sparse.csr_matrix(sparse.kron(sparse.eye(sites), np.ones((1, choices))))
        self.ones = np.ones(sites)
        upper = table.legal.ravel().astype(float)
        self.bounds = np.stack([np.zeros_like(upper), upper], axis=1)

    def __call__(self, limit, method: str = "highs-ds", options: dict | None = None):
        use = np.flatnonzero(np.isfinite(limit))
        with_rows = {"A_ub": self.cost[use], "b_ub": limit[use]} if len(use) else {}
        return linprog(self.value, A_eq=self.one, b_eq=self.ones, bounds=self.bounds,
                       method=method, options=options or {}, **with_rows)  # fmt: skip


def scaled(table: Rows) -> tuple[Rows, float, float]:
    """`table` with values and costs above each site's least and of mean 1; its unit and base."""
    cost = np.where(table.legal, table.cost, np.inf)
    least = cost.min(axis=2)
    cost = np.where(table.legal, table.cost - least[..., None], 0.0)
    unit = np.maximum(cost.mean(axis=(1, 2)), 1e-300)
    value = np.where(table.legal, table.value, np.inf)
    base = value.min(axis=1)
    value = np.where(table.legal, table.value - base[:, None], 0.0)
    value_unit = max(float(value.mean()), 1e-300)
    limit = (table.limit - least.sum(axis=1)) / unit
    rows = Rows(value / value_unit, cost / unit[:, None, None], table.legal, limit)
    return rows, value_unit, float(base.sum())


def difference(rng, shape, style: str, kind: str) -> tuple[str, float]:
    """(outcome, relative difference of the LP's values) of one instance."""
    value, cost, legal = tables(rng, shape, style)
    problem = build(value, cost, legal, budgets(rng, cost, legal, kind))
    table = rows(problem)
    found = interior.solve_many(problem, problem.budgets[None])[0]
    plain, unit, base = scaled(table)
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    out = Highs(plain)(plain.limit, options=tight)
    if out.status == 2 or found.status.name == "INFEASIBLE":
        same = out.status == 2 and found.status.name == "INFEASIBLE"
        return "infeasible" if same else "one infeasible", 0.0 if same else np.inf
    if out.status != 0:
        return f"HiGHS status {out.status}", 0.0
    reference = base + unit * out.fun
    size = max(abs(reference), 1e-6 * unit)
    return found.status.name.lower(), abs(found.bound - reference) / size


def agreement(instances: int, seed: int) -> bool:
    """Random instances of every shape, style and kind of budget; whether all agree."""
    rng = np.random.default_rng(seed)
    worst: dict[str, float] = {}
    outcomes: Counter = Counter()
    failures = 0
    for index in range(instances):
        shape = SHAPES[rng.choice(len(SHAPES), p=WEIGHTS)]
        style, kind = STYLES[index % len(STYLES)], BUDGETS[rng.integers(len(BUDGETS))]
        outcome, error = difference(rng, shape, style, kind)
        outcomes[outcome] += 1
        worst[style] = max(worst.get(style, 0.0), error)
        if not error <= AGREEMENT:
            failures += 1
            case = f"instance {index}, {shape}, {style}, {kind}, {outcome}"
            print(f"  differs by {error:.1e}: {case}")
    print(f"\nagreement on {instances} instances: {instances - failures} to {AGREEMENT:g} relative")
    print("  " + ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items())))
    for style, error in worst.items():
        print(f"  {style:<11}worst {error:.1e}")
    return failures == 0


def front(shape: tuple[int, int, int], points: int, seed: int, repeats: int) -> None:
    """One call for the whole front against one HiGHS call per budget."""
    rng = np.random.default_rng(seed)
    value, cost, legal = tables(rng, shape, "sizes")
    least = np.where(legal, cost, np.inf).min(axis=2).sum(axis=1)
    most = np.where(legal, cost, -np.inf).max(axis=2).sum(axis=1)
    limits = least + np.linspace(0.2, 0.95, points)[:, None] * (most - least)
    problem = build(value, cost, legal, limits[0])
    start = time.perf_counter()
    interior.solve_many(problem, limits)
    first = time.perf_counter() - start
    ours = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = interior.solve_many(problem, limits)
        ours.append(time.perf_counter() - start)
    solver = Highs(rows(problem))
    theirs = {}
    for method in ("highs-ds", "highs-ipm"):
        start = time.perf_counter()
        reference = [solver(limit, method).fun for limit in limits]
        theirs[method] = time.perf_counter() - start
    best = min(theirs, key=theirs.__getitem__)
    took = float(np.median(ours))
    gap = np.median([each.gap / each.objective for each in found if each.status.feasible])
    sizes = "L={}, K={}, R={}".format(*shape)
    print(f"\nfront of {points} budgets, {sizes}")
    print(f"  one call         {took:10.3f} s   (first, with compilation, {first:.1f} s)")
    for method, seconds in theirs.items():
        print(f"  {method:<17}{seconds:10.3f} s")
    print(f"  ratio            {theirs[best] / took:10.1f} x   against {best}")
    error = max(
        abs(a.bound - b) / abs(b) for a, b in zip(found, reference, strict=True) if b is not None
    )
    print(f"  largest difference {error:.1e} (HiGHS at its default tolerance of 1e-7)")
    print(f"  gap after rounding, median {gap:.1e}")


def large(sites: int, seed: int) -> None:
    """One budget vector of many sites: seconds with compilation, and peak memory."""
    value, cost, legal = tables(np.random.default_rng(seed), (sites, 7, 3), "sizes")
    limits = budgets(np.random.default_rng(seed), cost, legal, "inside")
    start = time.perf_counter()
    found = interior.solve(build(value, cost, legal, limits))
    took = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nL={sites}, K=7, R=3: {took:.1f} s with compilation, peak {peak:.2f} GiB")
    print(f"  {found.status.name.lower()}, gap {found.gap / found.objective:.1e} of the objective")


def main() -> int:
    """Print the three parts; the exit code says whether all objectives agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=500)
    parser.add_argument("--fronts", nargs="*", default=["250x7x3", "2000x15x4"])
    parser.add_argument("--points", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sites", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.sites:  # first: peak memory is of the whole process
        large(options.sites, options.seed)
    for shape in options.fronts:
        sites, choices, resources = map(int, shape.split("x"))
        front((sites, choices, resources), options.points, options.seed, options.repeats)
    return 0 if agreement(options.instances, options.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
