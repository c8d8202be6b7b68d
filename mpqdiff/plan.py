"""Plan: the portable decision. Data only, schema versioned, validated on load.

What it fixes: weight and activation bits per site, the activation mode and its timestep groups,
the kept timesteps. What it records: budgets, predictions, the solver's objective and bound, the
model it was made for and where it came from.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from mpqdiff.artifacts import digest, read_json, write_json
from mpqdiff.errors import InputError
from mpqdiff.records import FLOAT_BITS
from mpqdiff.sites import Site

SCHEMA = 1
MODES = ("static", "step_table", "online", "ema")


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

    def integer(self, sites: Sequence[Site]) -> list[Site]:
        """Those of `sites` that this plan runs in integers; the others stay in float."""
        return [site for site in sites if runs_in_integers(self.a_bits.get(site.path))]

    def width(self, path: str) -> int:
        """The weight width of an integer site. Raises InputError when it has none."""
        bits = self.w_bits.get(path)
        if bits is None:
            raise InputError(f"site {path!r} has activation bits and no weight bits; give it both")
        return bits

    @property
    def hash(self) -> str:
        """Of the decision alone: bits, mode, groups, timesteps and model."""
        return digest(
            self.model["hash"], self.w_bits, self.a_bits, self.mode, self.groups, self.timesteps
        )


def runs_in_integers(a_bits: Any) -> bool:
    """Whether a plan's entry `a_bits` (a width, a pair of them, or None) quantises its site."""
    return None not in a_bits.values() if isinstance(a_bits, dict) else a_bits is not None


def average_bits(plan: Plan, sites: Sequence[Site]) -> float:
    """Mean stored width over all site weights; a site left in float counts 32."""
    weights = [site for site in sites if site.parameters]
    total = sum(site.stored * (plan.w_bits[site.path] or FLOAT_BITS) for site in weights)
    return total / sum(site.stored for site in weights)


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


def _rounded(value) -> Any:
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
                for name in (
                    "system",
                    "base_method",
                    "tokens",
                    "budgets",
                    "predicted",
                    "objective",
                    "bound",
                    "gap",
                    "provenance",
                )
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: key {error} is missing or malformed") from error
    if not isinstance(plan.model, dict):
        raise InputError(f"{where}: model is {plan.model!r}, expected an object with its hash")
    for path, bits in plan.w_bits.items():
        _check_widths(where, path, bits, plan.a_bits[path])
    if plan.mode not in MODES:
        raise InputError(f"{where}: activation mode {plan.mode!r}; known: {', '.join(MODES)}")
    steps = plan.timesteps
    if not steps or any(a <= b for a, b in pairwise(steps)):
        raise InputError(f"{where}: timesteps must be a strictly descending list, got {steps}")
    return plan


def _check_widths(where: str, path: str, w_bits: Any, a_bits: Any) -> None:
    """InputError unless both are widths that an integer product can have, or both null."""
    pair = isinstance(a_bits, dict)
    if pair and set(a_bits) != {"lhs", "rhs"}:
        raise InputError(f"{where}: site {path!r} has a_bits of {sorted(a_bits)}, not lhs and rhs")
    sides = list(a_bits.values()) if pair else [a_bits]
    for name, bits in [("w_bits", w_bits), *(("a_bits", side) for side in sides)]:
        if bits is not None and (type(bits) is not int or not 2 <= bits <= 8):
            raise InputError(f"{where}: site {path!r} has {name} {bits!r}, expected 2..8 or null")
    if len({side is None for side in sides} | (set() if pair else {w_bits is None})) > 1:
        raise InputError(
            f"{where}: site {path!r} has w_bits {w_bits} and a_bits {a_bits}: expected both "
            "operands in integers, or null for both"
        )


def validate(plan: Plan, sites: Sequence[Site], model_hash: str) -> None:
    """InputError unless `plan` is for this model and has exactly its sites, at their pins."""
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
    for site in plan.integer(sites):
        bits = plan.w_bits[site.path]
        decided = site.parameters or site.pin == FLOAT_BITS
        if decided and site.pin not in (None, bits):
            raise InputError(
                f"site {site.path!r} has w_bits {bits} in the plan and is pinned at {site.pin}"
                f"{' (float)' if site.pin == FLOAT_BITS else ''}: "
                "change the plan, or the pins (config.plan.pins), which every arm shares"
            )


def diff(a: Plan, b: Plan) -> dict[str, tuple]:
    """The sites whose widths differ: {path: ((w, a) of a, (w, a) of b)}."""
    return {
        path: ((a.w_bits[path], a.a_bits[path]), (b.w_bits.get(path), b.a_bits.get(path)))
        for path in a.w_bits
        if (a.w_bits[path], a.a_bits[path]) != (b.w_bits.get(path), b.a_bits.get(path))
    }


def with_choices(
    plan: Plan, sites: Sequence[Site], chosen: dict[str, tuple[int, int]], **changes
) -> Plan:
    """`plan` with the pairs (w_bits, a_bits) `chosen` for `sites`, FLOAT_BITS for float, and
    whatever `changes` name."""
    w_bits, a_bits = dict(plan.w_bits), dict(plan.a_bits)
    for site in sites:
        w, a = (None if bits == FLOAT_BITS else bits for bits in chosen[site.path])
        w_bits[site.path] = w if site.parameters else None
        a_bits[site.path] = {"lhs": a, "rhs": a} if site.kind == "product" else a
    return replace(plan, w_bits=w_bits, a_bits=a_bits, **changes)
