"""One self-contained HTML file: what was asked, what was reached, and the numbers behind it.

plotly.js is in the file once, a content security policy forbids every outside resource, tables
need no JavaScript, and `results.json` is embedded so that each number can be checked.
"""

import json
import os
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from mpqdiff.errors import InputError
from mpqdiff.evaluate.efficiency import bitops_text
from mpqdiff.report import (
    columns,
    drift,
    figures,
    front,
    manifold,
    numbers,
    steps,
    tables,
    verdicts,
)


@dataclass(frozen=True)
class ReportData:
    """Everything the report shows. Letters as in `shapes.py`: T timesteps, L scored sites.

    Values that are absent or null in `results` show as a dash; NaN and infinities too, and the
    page lists them.
    """

    results: dict  # results.json; arm 0 is the float model
    plan: dict  # plan.json
    # path, kind, shape, parameters, macs, pinned, time_only, reason; and bias (their number) and
    # asymmetric, without which the bytes of a site are of its weights alone
    sites: list[dict]
    remainder: list[dict]  # operations left in float by closure: name, macs
    timesteps: np.ndarray  # int [T], descending
    importance: np.ndarray  # float [T,L]
    score_name: str
    matrix: np.ndarray | None  # float [L,L], averaged over timesteps
    site_paths: list[str]  # [L]
    images: dict[str, np.ndarray]  # arm -> uint8 [n,H,W,C] of the same seeds, float first
    environment: dict
    command: str
    stages: list[dict]  # name, seconds, cached
    pareto: dict | None = None  # pareto.json, of `mpqdiff.pareto.points`
    explain: list[dict] | None = None  # of `mpqdiff.explain.explain`, for the plan
    arm: str | None = None  # the arm that runs `plan`; None: the first of the plan's system
    plans: dict[str, dict] = field(default_factory=dict)  # plan.json of other arms, by arm
    signals: dict | None = None  # of `mpqdiff.scoring.manifold_signals`
    ranges: dict | None = None  # of `mpqdiff.report.steps.varying`
    joint: dict | None = None  # joint.json, of `mpqdiff.joint.record`


def write(path, data: ReportData) -> None:
    """Write the report of `data` to `path`, whole or not at all.

    Raises InputError where the data do not fit together or the path cannot be written.
    """
    replace(Path(path), render(data))


def write_pareto(path, pareto: dict, results: dict | None = None) -> None:
    """Write the front of `pareto.json` as a page of its own to `path`, whole or not at all.

    The arms of `results.json`, where given, are drawn with it. Raises InputError where the front
    has no feasible point, `pareto` is no front, or the path cannot be written.
    """
    pareto = numbers.finite(pareto)
    arms = numbers.finite(results or {}).get("arms") or []
    figure = front.pareto(pareto, arms, None)
    if figure is None:
        raise InputError(
            f"none of the {len(pareto['points'])} budgets of the front fits a plan: raise the "
            "other budgets, or allow narrower choices"
        )
    values = {
        "figure": figure,
        "pareto": pareto,
        "points": pareto["points"],
        "resources": pareto["resources"],
    }
    replace(Path(path), page("pareto.html.jinja", values))


def replace(path: Path, text: str) -> None:
    """Put `text` in the place of the file at `path`; InputError where that cannot be done."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(
            f"cannot write the report to {path}: {error.strerror}; "
            "name a folder that exists, is writable and has room for 10 MB"
        ) from error


def page(name: str, values: dict) -> str:
    """Template `name` with `values` and what every page needs."""
    from plotly.offline import get_plotlyjs

    def source(name: str) -> str:
        return files("mpqdiff.report").joinpath(name).read_text("utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared = {
        "plotly_js": Markup(get_plotlyjs()),
        "embed": embed,
        "shown": numbers.shown,
        "whole": numbers.whole,
        "amount": numbers.amount,
        "small": numbers.small,
        "prefixed": numbers.prefixed,
    }
    return environment.get_template(name).render(shared | values)


def render(data: ReportData) -> str:
    """The page as text. Raises InputError where the data do not fit together."""
    lost: list[str] = []
    results, plan = numbers.finite(data.results, lost), numbers.finite(data.plan, lost)
    plans = {name: numbers.finite(other) for name, other in data.plans.items()}
    validate(data, results, {"the plan": plan, **plans})
    arms, chosen = results["arms"], chosen_arm(results["arms"], plan, data.arm)
    sites, remainder = numbers.finite(data.sites), numbers.finite(data.remainder)
    reasons = numbers.finite(data.explain or [])
    shown = {"quality": columns.quality(results), "speed": columns.SPEED,
             "health": columns.present(columns.HEALTH, results),
             "further": columns.present(columns.FURTHER, results),
             "bitops": columns.present(columns.BITOPS, results)}  # fmt: skip
    arm_tables = {name: (found, tables.cells(arms, found)) for name, found in shown.items()}
    own = [cell for name in ("quality", "speed")
           for cell in arm_tables[name][1][arms.index(chosen)]]  # fmt: skip
    terms = chosen.get("bitops_terms")
    values = {
        "results": results,
        "plan": plan,
        "arms": arms,
        "chosen": chosen,
        "headline": {cell.number.key: cell for cell in own},
        "rival": verdicts.rival(arms, chosen),
        "fid_name": columns.fid_name(results),
        "float_fid": numbers.shown(arms[0].get("fid"), numbers.short),
        "arm_tables": arm_tables,
        "bitops": bitops_text(terms).splitlines() if terms else None,
        "figures": {figure.name: figure for figure in drawn(data, results, chosen, plan, plans)},
        "strips": {name: (*figures.strip(value), len(value))
                   for name, value in data.images.items()},
        "rows": tables.site_rows(sites, plan),
        "complete": all(s.get("bias") is not None for s in sites if s.get("parameters")),
        "reasons": tables.reasons(reasons),
        "prices": tables.prices(reasons),
        "share": tables.integer_share(sites, remainder, plan),
        "remainder": sorted(remainder, key=lambda op: -(op.get("macs") or 0)),
        "environment": numbers.finite(data.environment),
        "stages": numbers.finite(data.stages),
        "command": data.command,
        "lost": lost,
    }  # fmt: skip
    return page("page.html.jinja", values)


def drawn(data: ReportData, results, chosen, plan, plans) -> list[figures.Figure]:
    """The figures that the data have something for."""
    others = {name: other for name, other in plans.items() if name != chosen["arm"]}
    arms = results["arms"]
    found = [
        figures.quality(results, chosen),
        drift.drift(arms, chosen),
        figures.bits(data.sites, {chosen["arm"]: plan, **others}),
        figures.importance(np.asarray(data.importance, np.float64), data.timesteps,
                           data.site_paths, data.score_name),
        *manifold.drawn(data.signals, plan),
        steps.ranges(data.ranges),
        steps.joint(numbers.finite(data.joint)),
    ]  # fmt: skip
    if data.matrix is not None:
        found.append(figures.orthogonality(np.asarray(data.matrix), data.site_paths))
    if data.pareto:
        found.append(front.pareto(numbers.finite(data.pareto), arms, chosen))
    return [figure for figure in found if figure is not None]


def embed(value) -> Markup:
    """`value` as JSON that cannot end the script element it stands in."""
    text = json.dumps(numbers.finite(value), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def chosen_arm(arms: list[dict], plan: dict, name: str | None) -> dict:
    """The arm that runs the plan: the one named, or the first of the plan's system."""
    key, wanted = ("arm", name) if name is not None else ("system", plan.get("system"))
    for arm in arms[1:]:
        if arm.get(key) == wanted:
            return arm
    known = ", ".join(str(arm.get(key)) for arm in arms[1:])
    raise InputError(f"no quantised arm has {key} {wanted!r}; the results have: {known or 'none'}")


def validate(data: ReportData, results: dict, plans: dict[str, dict]) -> None:
    """Raise InputError where results, plans, sites and arrays do not fit together."""
    if results.get("schema") != 1 or not results.get("arms"):
        raise InputError(f"results of schema {results.get('schema')!r} with "
                         f"{len(results.get('arms') or ())} arms; expected schema 1 and the "
                         "float arm at least; run the evaluation again")  # fmt: skip
    names = [arm["arm"] for arm in results["arms"]]
    if len(set(names)) != len(names):
        raise InputError(f"arm names {names} repeat; give each arm its own")
    if unknown := sorted({*data.plans, *data.images} - set(names)):
        raise InputError(f"plans or images of unknown arms {unknown}; the results have: {names}")
    paths = {site["path"] for site in data.sites}
    for name, plan in plans.items():
        if unknown := sorted(set(plan["sites"]) - paths):
            raise InputError(f"{name} has bits for sites {unknown} that the site list lacks; "
                             "both must come from the same model")  # fmt: skip
    size = (len(data.timesteps), len(data.site_paths))
    expected = {"importance": (data.importance, size), "matrix": (data.matrix, (size[1], size[1]))}
    for name, (array, shape) in expected.items():
        if array is not None and np.shape(array) != shape:
            raise InputError(f"{name} has shape {np.shape(array)}; expected {shape} for "
                             f"{size[0]} timesteps and {size[1]} sites")  # fmt: skip
