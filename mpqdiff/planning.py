"""From scores to a Plan: the knapsack of a recipe, and what its solution becomes.

    scores -> aggregate -> value [L,K];  costs -> resources [R,L,K], budgets [R]  ->  solve -> Plan

Scores and latency tables are artifacts, so another budget on an existing workdir only solves.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from mpqdiff import aggregate, costs, export, scoring, seconds, solve
from mpqdiff import plan as plans
from mpqdiff.config import Config
from mpqdiff.costs import bitops, energy, legality
from mpqdiff.errors import InfeasibleError, InputError
from mpqdiff.pipeline import VERSIONS, Experiment
from mpqdiff.plan import Plan
from mpqdiff.quantize.apply import fixed_cost, float_leaves
from mpqdiff.quantize.store import header_bytes
from mpqdiff.records import Allocation, Problem


class Options(NamedTuple):
    """What a recipe can choose from, and what each choice takes."""

    choices: list[costs.Choice]  # [K]
    legal: np.ndarray  # bool [L,K]
    excluded: list[dict]  # choices that the device rules out: site, choice, reason
    tables: dict[str, np.ndarray]  # float64 [L,K] by resource
    fixed: dict[str, float]  # by resource: what no choice changes


def given_budgets(config: Config) -> dict[str, float]:
    """The budgets of the config in their units; empty where the ratio decides."""
    return {name: float(value) for name, value in config.plan.budget.items() if value}


def bounds(config: Config, name: str) -> bool:
    """Whether the config bounds the resource `name` by a number of its own."""
    return bool(config.plan.budget[name] or config.plan.reduction.get(name))


def options(experiment: Experiment, config: Config) -> Options:
    """Choices, legality and costs of the recipe `config`; seconds only where they are bounded."""
    p = config.plan
    offered = costs.list_choices(p.w_bits, p.a_bits, keep_float=p.keep_float)
    choices, legal = costs.legal_choices(experiment.sites, offered)
    # "any" device still cannot run what has no integer form (grouped, dilated convolutions).
    device = "cpu" if p.legality == "any" else p.legality
    operations = seconds.operations(experiment, config)
    legal, ruled_out = legality.restrict(operations, choices, legal, device)
    fixed, measured = fixed_costs(experiment, config), {}
    if bounds(config, "seconds"):
        measured["seconds"], fixed["seconds"] = seconds.per_image(experiment, config, choices)
    tables = _tables(experiment, config, choices, measured)
    return Options(choices, legal, ruled_out, tables, fixed)


def _tables(experiment: Experiment, config: Config, choices, measured) -> dict[str, np.ndarray]:
    names = [name for name in costs.RESOURCES if name != "seconds" or name in measured]
    return {
        name: costs.table(
            name,
            experiment.sites,
            choices,
            asymmetric=experiment.asymmetric(config),
            evaluations=experiment.evaluations(config),
            batch=seconds.batch(config),
            measured=measured,
        )
        for name in names
    }


def fixed_costs(experiment: Experiment, config: Config) -> dict[str, float]:
    """What no choice changes, by resource: float leaves, activation table, the file's header,
    and products that the plan leaves in float."""
    rows = len(experiment.table(config).timesteps)
    fixed = fixed_cost(experiment.params, experiment.sites, rows=rows)
    left = float_leaves(experiment.params, experiment.sites)
    fixed["file_bytes"] += header_bytes(experiment.draft(config), experiment.sites, left)
    planned = {site.path for site in experiment.sites}
    rest = [site for site in experiment.all_sites if site.path not in planned]
    evaluations = experiment.evaluations(config)
    fixed["bitops"] = bitops.bitops(rest, experiment.remainder, {}, {}, evaluations)
    fixed["joules"] = evaluations * energy.float_joules(
        rest, experiment.remainder, batch=seconds.batch(config)
    )
    return fixed | {"mean_bits": 0.0}


def predict(found: Options, choice) -> dict[str, float]:
    """Every resource of the choices [L] (indices), what is fixed included."""
    at = np.arange(len(found.legal)), np.asarray(choice)
    total = {name: float(t[at].sum()) + found.fixed[name] for name, t in found.tables.items()}
    return {name: int(v) if name.endswith("bytes") else v for name, v in total.items()}


def uniform(experiment: Experiment, config: Config, bits: int) -> dict[str, float]:
    """What `bits` everywhere (pins and widest activations apart) takes: the unit of a ratio."""
    choices, legal = costs.legal_choices(experiment.sites, [(bits, max(config.plan.a_bits))])
    tables = _tables(experiment, config, choices, {})
    found = Options(choices, legal, [], tables, fixed_costs(experiment, config))
    return predict(found, legal.argmax(axis=1))


def timing(experiment: Experiment, config: Config) -> str | None:
    """The artifact of the latency model, where the recipe bounds seconds."""
    return seconds.model(experiment, config)[0] if bounds(config, "seconds") else None


def float_total(experiment: Experiment, name: str) -> float:
    """What arm 0, the float32 model at its own steps, takes of resource `name`."""
    config, sites = experiment.config, experiment.sites
    if name in ("bytes", "file_bytes"):
        return float(sum(leaf.size * 4 for leaf in jax.tree.leaves(experiment.params)))
    fixed, measured = fixed_costs(experiment, config), {}
    if name == "seconds":
        measured["seconds"], fixed["seconds"] = seconds.per_image(experiment, config, [costs.FLOAT])
    rows = costs.table(
        name,
        sites,
        [costs.FLOAT],
        asymmetric=[False] * len(sites),
        evaluations=experiment.evaluations(config),
        batch=seconds.batch(config),
        measured=measured,
    )
    return float(rows.sum()) + fixed[name]


def budgets(experiment: Experiment, config: Config) -> dict[str, float]:
    """The recipe's budgets by resource: as given, as a share of float's (`plan.reduction`), or the
    ratio times uniform `ratio_bits`. Of two for one resource the smaller holds."""
    given, p = given_budgets(config), config.plan
    for name, times in p.reduction.items():
        if times:
            share = float_total(experiment, name) / times
            share = float(np.floor(share)) if name.endswith("bytes") else share
            given[name] = min(share, given.get(name, share))
    if given:
        return given
    unit = uniform(experiment, config, p.ratio_bits)[p.resource]
    limit = p.ratio * unit
    return {p.resource: float(np.floor(limit)) if p.resource.endswith("bytes") else limit}


def values(experiment: Experiment, config: Config, choices) -> np.ndarray:
    """Expected damage of each of `choices`, float64 [L,K]."""
    scores = scoring.scores(experiment, config)[1]
    value = aggregate.aggregate(
        scores,
        timesteps=experiment.statistics[1].timesteps,
        num_timesteps=config.diffusion.num_timesteps,
        method=config.aggregate.name,
        lam=config.aggregate.lam,
        beta=config.aggregate.beta,
    )
    if scores.kind == "redundancy":
        return aggregate.lift(value, choices)
    measured = scoring.every_choice(experiment, config)[0]
    return value[:, [measured.index(choice) for choice in choices]]


def knapsack(experiment: Experiment, config: Config) -> tuple[Problem, Options]:
    """The problem that the recipe poses. InputError on a budget above what can be spent."""
    found, limits = options(experiment, config), budgets(experiment, config)
    problem = costs.problem(
        values(experiment, config, found.choices),
        experiment.sites,
        found.choices,
        found.legal,
        budgets=limits,
        tables=found.tables,
        fixed=found.fixed,
    )
    least, most = solve.budget_range(problem)
    for name, low, high in zip(limits, least, most, strict=True):
        if name in given_budgets(config) and limits[name] > high * (1 + 1e-9):
            raise InputError(
                f"plan.budget.{name}={limits[name]:.9g} is above the maximum {high:.9g}, what the "
                f"dearest choices take; expected {low:.9g} to {high:.9g}"
            )
    return problem, found


def allocate(experiment: Experiment, config: Config, problem: Problem) -> Allocation:
    """The recipe's solver on its problem. InputError, with advice, when nothing fits."""
    p = config.plan
    offered = {"key": jax.random.key(config.seed), "exact": p.exact, "node_limit": p.node_limit}
    if config.score.name == "manifold" and "score" in solve.arguments(p.solver):
        offered["score"] = scoring.importance(experiment, config)
    taken = {name: offered[name] for name in solve.arguments(p.solver) if name in offered}
    answer = solve.solve(problem, p.solver, **taken)
    if not answer.status.feasible:
        raise InfeasibleError(solve.advice(answer, problem))
    return answer


def plan(experiment: Experiment, config: Config, system: str) -> Plan:
    """The recipe `config` as a Plan, cached. InputError names an impossible budget."""
    if config.plan.bits:
        return imported(experiment, config, system)
    key = {
        "record": experiment.statistics[0].name,
        "score": scoring.scores(experiment, config)[0],
        "aggregate": config.aggregate.to_dict(),
        "plan": config.plan.to_dict(),
        "quantize": config.quantize.to_dict(),
        "timesteps": experiment.steps(config).tolist(),
        "seed": config.seed,
        "system": system,
        "seconds": timing(experiment, config),
        "batch": seconds.batch(config),  # joules share a weight's reading among so many images
    }

    def compute(folder):
        problem, found = knapsack(experiment, config)
        answer = allocate(experiment, config, problem)
        plans.save(
            compose(experiment, config, system, found, problem, answer), folder / "plan.json"
        )

    folder = experiment.store.get("plan", version=VERSIONS["plan"], key=key, compute=compute)
    return plans.load(folder / "plan.json")


def compose(experiment, config, system, found: Options, problem: Problem, answer) -> Plan:
    """The Plan of an allocation."""
    pairs = [found.choices[k] for k in np.asarray(answer.choice)]
    chosen = dict(zip((site.path for site in experiment.sites), pairs, strict=True))
    return replace(
        plans.with_choices(experiment.draft(config), experiment.sites, chosen),
        system=system,
        budgets=dict(zip(problem.names, map(float, problem.budgets), strict=True)),
        predicted=predict(found, answer.choice),
        objective=float(answer.objective),
        bound=float(answer.bound),
        gap=float(answer.gap),
        provenance=provenance(experiment, config)
        | {
            "score": config.score.name,
            "solver": config.plan.solver,
            "status": answer.status.name.lower(),
            "excluded": found.excluded,
        },
    )


def imported(experiment: Experiment, config: Config, system: str) -> Plan:
    """The bit list in the file `config.plan.bits` as a Plan: another tool's, as a baseline."""
    given = export.read_bits(config.plan.bits, experiment.sites)
    found = options(experiment, config)
    a_bits = max(config.plan.a_bits)
    chosen = {path: costs.FLOAT if bits is None else (bits, a_bits) for path, bits in given.items()}
    choices = sorted(set(chosen.values()))
    found = found._replace(choices=choices, tables=_tables(experiment, config, choices, {}))
    index = [choices.index(chosen[site.path]) for site in experiment.sites]
    return replace(
        plans.with_choices(experiment.draft(config), experiment.sites, chosen),
        system=system,
        predicted=predict(found, index),
        provenance=provenance(experiment, config) | {"bits": config.plan.bits},
    )


def provenance(experiment: Experiment, config: Config) -> dict:
    """What a plan came from."""
    return {
        "config_hash": plans.digest(config.to_dict()),
        "calibration_hash": experiment.calibration[0].name,
        "versions": {"jax": jax.__version__},
        "seed": config.seed,
    }
