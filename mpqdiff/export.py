"""A plan in the formats of other tools, and the bit lists of other tools as weight widths.

Out: rules for qwix, and a configuration in the form of NVIDIA's ModelOpt. In: what
`read_bits` lists. Only the decision travels (which site, which widths, how scales are taken), not
the integers: each tool rounds by its own convention.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpqdiff import plan as plans
from mpqdiff.artifacts import read_json
from mpqdiff.errors import InputError
from mpqdiff.plan import Plan
from mpqdiff.quantize.numerics import BITS
from mpqdiff.sites import Site, module_path, planned

QUANTIZERS = ("weight_quantizer", "input_quantizer", "lhs_quantizer", "rhs_quantizer")


def to_qwix(plan: Plan, sites: Sequence[Site]) -> list:
    """One `qwix.QuantizationRule` for each module that `plan` runs in integers, in site order.

    For `qwix.quantize_model(module, qwix.PtqProvider(rules))`; modules without a rule stay float.
    What qwix 0.1 does differently:
    - a symmetric scale is absmax / (qmax + 1/2), ours absmax / qmax; integers reach -qmax - 1;
    - weights are clipped at absmax: no search for the scale of least squared error;
    - activations have no zero point; a dense layer takes one scale per token as our `online` mode
      does, a convolution one per image, a product one per row;
    - `static` becomes act_static_scale (qwix calibrates its own mean range); it has no scales by
      timestep, so `step_table` becomes a scale taken at run time, as `online` does.
    Two roundings of the same widths: on the embedded `fashion_dit`, eps in qwix and in our `online`
    mode (absmax weights, products in float) differ by 1.2 % (L2) with 8-bit weights and 3.6 % with
    4-bit ones, where either differs from float by 0.7-0.9 % and 2.7 %; on the small random network
    of tests/export_test.py by 3.5 % at 8 bits, tolerance 5 %.

    Raises InputError where qwix is not installed, and as `qwix_rules`.
    """
    try:
        import qwix
    except ImportError as error:
        raise InputError("qwix is not installed; it is optional: pip install qwix") from error
    return [qwix.QuantizationRule(**rule) for rule in qwix_rules(plan, sites)]


def qwix_rules(plan: Plan, sites: Sequence[Site]) -> list[dict]:
    """The arguments of the rules of `to_qwix`, JSON-ready; needs no qwix.

    Raises InputError on what qwix cannot express: two widths in one convolution or product, and
    calls of one module that the plan treats differently.
    """
    integer = {site.path for site in plan.integer(sites)}
    rules: dict[str, Any] = {}
    for site in sites:
        rule = None
        if site.path in integer:
            weight, activation = _types(site, plan)
            rule = {
                "module_path": re.escape(module_path(site.path)),  # qwix matches the whole path
                "weight_qtype": weight,
                "act_qtype": activation,
                "act_static_scale": plan.mode == "static",
            }
        if rules.setdefault(module_path(site.path), rule) != rule:
            raise InputError(
                f"site {site.path!r} repeats a call of its module with other widths, and a qwix "
                "rule holds for every call: give all calls of the module the same widths"
            )
    return [rule for rule in rules.values() if rule is not None]


def _types(site: Site, plan: Plan) -> tuple[str, str]:
    """qwix's (weight, activation) types of an integer site; a product's gate its two operands."""
    a_bits = plan.a_bits[site.path]
    if site.kind == "product":
        left, right = a_bits["lhs"], a_bits["rhs"]
    else:
        left, right = a_bits, plan.width(site.path)
    if site.kind != "dense" and left != right:
        raise InputError(
            f"site {site.path!r} is a {site.kind} of {left} by {right} bits, and qwix takes one "
            "width for both operands of it: pin it to equal widths, or leave it in float"
        )
    return f"int{right}", f"int{left}"


def to_modelopt(plan: Plan, sites: Sequence[Site]) -> dict:
    """A ModelOpt-like configuration, JSON-ready: an ordered list in which later entries win.

    Everything is disabled first; each site of `sites` is then enabled or disabled by name, with
    dots for slashes. Weights have one scale per output channel (axis 0, as torch stores
    them), activations one per tensor, or one per token at run time where the plan is `online`.
    ModelOpt has no scales by timestep and no name for the operands of a product, hence "like":
    a `step_table` becomes a range per tensor, and products have `lhs_` and `rhs_quantizer`.
    """
    dynamic = {"type": "dynamic", "block_sizes": {"-1": None}}
    scales = dynamic if plan.mode == "online" else {"axis": None}
    entries: list[dict] = [{"quantizer_name": "*", "enable": False}]
    for site in sites:
        a_bits = plan.a_bits.get(site.path)
        widths = a_bits if isinstance(a_bits, dict) else {"input": a_bits}
        if site.parameters:
            widths = {"weight": plan.w_bits.get(site.path), **widths}
        for operand, bits in widths.items():
            name = f"{site.path.replace('/', '.')}.{operand}_quantizer"
            how = {"axis": 0} if operand == "weight" else scales
            cfg = {"cfg": {"num_bits": bits, **how}} if bits is not None else {}
            entries.append({"quantizer_name": name, **cfg, "enable": bits is not None})
    return {"quant_cfg": entries, "algorithm": "max"}


# What a plan can be written as: JSON-ready, from a plan and the sites it decides on.
FORMS = {"modelopt": to_modelopt, "qwix": qwix_rules}


def read_bits(path: Path, sites: Sequence[Site]) -> dict[str, int | None]:
    """Weight widths by site path from the JSON file `path`; None: left in float.

    The file is one of: a plan.json; a ModelOpt-like configuration of `to_modelopt`; a list with
    one width per dense or convolution site, in the order of `sites`; an object of widths by name.
    Names are site paths with slashes or dots, and "blocks.0.mlp" is also "block_0/mlp" (the
    counted lists of torch). Every dense and convolution site must have a width; other sites have
    none, and are None in the result. A null is ignored where its name is no site's: that is float
    in any case. Raises InputError naming the sites that are missing, the names that are unknown,
    and widths that are neither 2..8 nor null.
    """
    body, asked = read_json(path), [site.path for site in planned(list(sites))]
    if isinstance(body, list):
        if len(body) != len(asked):
            raise InputError(
                f"{path}: {len(body)} widths for {len(asked)} dense and convolution sites; give "
                f"one for each of: {', '.join(asked)}"
            )
        found = dict(zip(asked, body, strict=True))
    elif isinstance(body, dict):
        found = _resolved(path, _widths_by_name(path, body), [site.path for site in sites])
    else:
        raise InputError(f"{path}: a {type(body).__name__}, expected a JSON list or object of bits")
    # Embeddings and products have no weight width: null is all that can be said of them.
    wrong = {
        name: bits
        for name, bits in found.items()
        if bits is not None and (type(bits) is not int or bits not in BITS or name not in asked)
    }
    if wrong:
        raise InputError(
            f"{path}: weight widths {wrong}: expected 2 to 8, or null for float, of dense and "
            "convolution sites"
        )
    missing = [name for name in asked if name not in found]
    if missing:
        raise InputError(f"{path}: no width for sites {missing}; give each one, or null for float")
    _check_ties(path, sites, found)
    return {site.path: found.get(site.path) for site in sites}


def _widths_by_name(path: Path, body: dict) -> dict[str, Any]:
    """The widths in a JSON object, by the names that it uses."""
    if "sites" in body and "schema" in body:
        return dict(plans.from_json(body, str(path)).w_bits)
    if "quant_cfg" not in body:
        return body
    widths, suffix = {}, ".weight_quantizer"
    try:
        for entry in body["quant_cfg"]:
            name = entry["quantizer_name"]
            if name != "*" and name.rpartition(".")[2] not in QUANTIZERS:
                raise InputError(
                    f"{path}: quantizer {name!r}: expected '*', or a site's name, a dot and one "
                    f"of {', '.join(QUANTIZERS)}; wildcards are not resolved"
                )
            if name.endswith(suffix):
                enabled = entry.get("enable", True)
                widths[name.removesuffix(suffix)] = entry["cfg"]["num_bits"] if enabled else None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: quant_cfg: {error!r}; expected a list of objects with quantizer_name, enable "
            "and, where enabled, cfg.num_bits, as written by the export of a plan"
        ) from error
    return widths


def _resolved(path: Path, widths: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """`widths` by site path; InputError on names of no site, of several, or of one named before."""
    found: dict[str, Any] = {}
    meant = {
        name: [name] if name in paths else [p for p in paths if _plain(p) == _plain(name)]
        for name in widths
    }
    if unknown := [name for name, own in meant.items() if not own and widths[name] is not None]:
        raise InputError(f"{path}: no such sites {unknown}; the model has: {', '.join(paths)}")
    for name, own in meant.items():
        if len(own) > 1:
            raise InputError(f"{path}: {name!r} could be each of {own}: give the site's own path")
        for site in own:
            if site in found:
                raise InputError(f"{path}: site {site!r} is named twice, once as {name!r}")
            found[site] = widths[name]
    return found


def _plain(name: str) -> str:
    """`name` without the marks in which tools differ: "blocks.0.mlp" -> "block_0/mlp"."""
    return re.sub(r"s?[/_](\d+)(?=/|$)", r"_\1", name.replace(".", "/"))


def _check_ties(path: Path, sites: Sequence[Site], widths: dict[str, Any]) -> None:
    """InputError where sites that share a parameter have different widths."""
    first: dict[str, Site] = {}
    for site in planned(list(sites)):
        other = first.setdefault(site.tie, site)
        if widths[other.path] != widths[site.path]:
            raise InputError(
                f"{path}: sites {other.path!r} and {site.path!r} share their weights and have "
                f"widths {widths[other.path]} and {widths[site.path]}: give both the same"
            )
