"""What `mpqdiff plan` writes and prints: the plan, a front of plans, and the reasons for them."""

from mpqdiff import explain, export, joint, pareto, planning, report, solve
from mpqdiff import plan as plans
from mpqdiff.artifacts import read_json, write_json
from mpqdiff.errors import InputError, unknown_name
from mpqdiff.pipeline import Experiment
from mpqdiff.records import Status


def plan_only(experiment: Experiment) -> str:
    """Stages up to `plan.json`; returns what to print."""
    workdir, config = experiment.store.workdir, experiment.config
    plan = joint.plan(experiment, config, config.system)
    write_json(workdir / "config.json", config.to_dict())
    plans.save(plan, workdir / "plan.json")
    width = max(map(len, plan.w_bits))
    lines = [
        f"{path:<{width}}  w {bits or 'float'}  a {plan.a_bits[path] or 'float'}"
        for path, bits in plan.w_bits.items()
    ]
    lines += [f"budget     {_numbers(plan.budgets)}", f"predicted  {_numbers(plan.predicted)}"]
    status = plan.provenance.get("status")
    if status:
        lines.append(f"{Status[status.upper()].value} (gap {plan.gap:.3g} of {plan.objective:.3g})")
    lines.append(f"written: {workdir / 'plan.json'}")
    if found := joint.record(experiment):
        lines += [joint.table(*found), f"written: {workdir / 'joint.json'}"]
    return "\n".join(lines)


def _numbers(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.6g}" for name, value in values.items()) or "none"


def explained(experiment: Experiment) -> list[dict]:
    """One row per site: its width, what the next ones would save and cost, at which price."""
    problem, _ = planning.knapsack(experiment, experiment.config)
    answer = planning.allocate(experiment, experiment.config, problem)
    return explain.explain(problem, answer, experiment.sites)


def explain_only(experiment: Experiment, pattern: str) -> str:
    """Why the sites that `pattern` (a regex) matches got their widths; returns what to print."""
    if experiment.config.plan.bits:
        raise InputError("the plan is an imported bit list (config.plan.bits): nothing was solved")
    return explain.text(explained(experiment), pattern)


def pareto_only(experiment: Experiment, count: int) -> str:
    """`pareto.json` and `pareto.html`: `count` budgets solved in one call; returns what to print.

    Budgets run from the least to the most that can be spent of the config's resource; other
    budgets stay as they are. Arms of results.json, where there is one, are drawn on top.
    """
    workdir, config = experiment.store.workdir, experiment.config
    problem, _ = planning.knapsack(experiment, config)
    limits = pareto.budgets_between(problem, count)
    found = pareto.points(problem, solve.solve_many(problem, limits), limits, experiment.sites)
    write_json(workdir / "pareto.json", found)
    stored = workdir / "results.json"
    measured = read_json(stored) if stored.exists() else None
    report.write_pareto(workdir / "pareto.html", found, measured)
    feasible = sum(Status[point["status"].upper()].feasible for point in found["points"])
    return (
        f"{feasible} of {count} budgets have a plan\n"
        f"written: {workdir / 'pareto.json'}, {workdir / 'pareto.html'}"
    )


def export_only(experiment: Experiment, form: str) -> str:
    """`workdir/plan.json` in another tool's form (export.FORMS); returns what to print."""
    if form not in export.FORMS:
        raise unknown_name("export form", form, export.FORMS)
    plan = plans.load(experiment.store.workdir / "plan.json")
    plans.validate(plan, experiment.all_sites, experiment.model_hash)
    path = experiment.store.workdir / f"plan.{form}.json"
    write_json(path, export.FORMS[form](plan, experiment.sites))
    return f"written: {path}"
