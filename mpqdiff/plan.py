"""Plan: the portable decision. Data only, schema versioned, validated on load.

What it fixes: weight and activation bits per site, the activation mode and its timestep groups,
the kept timesteps. What it records: budgets, predictions, the solver's objective and bound, the
model it was made for and where it came from.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mpqdiff.artifacts import digest, read_json, write_json
from mpqdiff.errors import InputError
from mpqdiff.sites import Site

SCHEMA = 1
MODES = ("static", "step_table", "online")


@dataclass(frozen=True)
class Plan:
    """Bits per site path (None: left in float) and everything a run needs to repeat it.

    `a_bits` is one width, or {"lhs": ..., "rhs": ...} for a product of two activations.
    `groups` are [t_hi, t_lo] ranges, one row of the activation table each, descending.
    """

    model: dict[str, Any]  # {"hash": ..., "name": ...}
    w_bits: dict[str, int | None]
    a_bits: dict[str, Any]
    mode: str
    groups: tuple[tuple[int, int], ...]
    timesteps: tuple[int, ...]
    system: str
    base_method: str = "nearest"
    tokens: dict[str, Any] = field(default_factory=dict)
    budgets: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Of the decision alone: bits, mode, groups, timesteps and model."""
        return digest(
            self.model["hash"], self.w_bits, self.a_bits, self.mode, self.groups, self.timesteps
        )


def average_bits(plan: Plan, sites: Sequence[Site]) -> float:
    """Mean stored width over all site weights; a site left in float counts 32."""
    weights = [site for site in sites if site.parameters]
    total = sum(site.parameters * (plan.w_bits[site.path] or 32) for site in weights)
    return total / sum(site.parameters for site in weights)


def to_json(plan: Plan) -> dict:
    """The JSON object of `plan.json`; floats rounded to 9 digits."""
    record = asdict(plan)
    w_bits, a_bits = record.pop("w_bits"), record.pop("a_bits")
    sites = {
        path: {
            "w_bits": bits,
            "stored_bits": [] if bits is None else [bits],
            "a_bits": a_bits[path],
        }
        for path, bits in w_bits.items()
    }
    activations = {"mode": record.pop("mode"), "groups": [list(g) for g in record.pop("groups")]}
    record["timesteps"] = list(record["timesteps"])
    body = {"schema": SCHEMA, "sites": sites, "activations": activations, **record}
    return _rounded(body)


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value


def save(plan: Plan, path: Path) -> None:
    """Write `plan.json` atomically."""
    write_json(path, to_json(plan))


def load(path: Path) -> Plan:
    """Read and validate a plan's form; `validate` checks it against a model."""
    return from_json(read_json(path), str(path))


def from_json(body: Any, where: str = "plan") -> Plan:
    """The Plan of a JSON object. InputError names the first thing that is wrong."""
    if not isinstance(body, dict) or body.get("schema") != SCHEMA:
        got = body.get("schema") if isinstance(body, dict) else type(body).__name__
        raise InputError(f"{where}: schema {got!r}, expected {SCHEMA}")
    try:
        sites, activations = body["sites"], body["activations"]
        plan = Plan(
            model=body["model"],
            w_bits={path: entry["w_bits"] for path, entry in sites.items()},
            a_bits={path: entry["a_bits"] for path, entry in sites.items()},
            mode=activations["mode"],
            groups=tuple((int(high), int(low)) for high, low in activations["groups"]),
            timesteps=tuple(int(t) for t in body["timesteps"]),
            **{
                name: body[name]
                for name in ("system", "base_method", "tokens", "budgets", "predicted",
                             "objective", "bound", "gap", "provenance")
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: key {error} is missing or malformed") from error
    for path, bits in plan.w_bits.items():
        if bits is not None and (not isinstance(bits, int) or not 2 <= bits <= 8):
            raise InputError(f"{where}: site {path!r} has w_bits {bits!r}, expected 2..8 or null")
    if plan.mode not in MODES:
        raise InputError(f"{where}: activation mode {plan.mode!r}; known: {', '.join(MODES)}")
    steps = plan.timesteps
    if not steps or any(a <= b for a, b in zip(steps, steps[1:], strict=False)):
        raise InputError(f"{where}: timesteps must be a strictly descending list, got {steps}")
    return plan


def validate(plan: Plan, sites: Sequence[Site], model_hash: str) -> None:
    """InputError unless `plan` is for this model and decides on exactly its sites and pins."""
    if plan.model.get("hash") != model_hash:
        raise InputError(
            f"the plan was made for model {plan.model.get('hash')}, the weights given are "
            f"{model_hash}: plan again for these weights"
        )
    paths = {site.path for site in sites}
    unknown, missing = sorted(plan.w_bits.keys() - paths), sorted(paths - plan.w_bits.keys())
    if unknown or missing:
        raise InputError(
            f"the plan names sites the model lacks: {unknown or 'none'}; sites without a "
            f"decision: {missing or 'none'}"
        )


def diff(a: Plan, b: Plan) -> dict[str, tuple]:
    """The sites whose widths differ: {path: ((w, a) of a, (w, a) of b)}."""
    return {
        path: ((a.w_bits[path], a.a_bits[path]), (b.w_bits.get(path), b.a_bits.get(path)))
        for path in a.w_bits
        if (a.w_bits[path], a.a_bits[path]) != (b.w_bits.get(path), b.a_bits.get(path))
    }


def with_bits(plan: Plan, w_bits: dict[str, int | None], **changes) -> Plan:
    """`plan` with other widths and whatever `changes` name."""
    return replace(plan, w_bits=w_bits, **changes)
