"""What each choice costs, and which choices are legal: `Problem` from a value table and sites.

A choice is a pair (w_bits, a_bits); FLOAT_BITS twice keeps the site in float.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mpqdiff.costs.bitops import site_bitops
from mpqdiff.costs.bytes import device_bytes, file_bytes
from mpqdiff.costs.energy import site_joules
from mpqdiff.errors import InputError, unknown_name
from mpqdiff.records import FLOAT_BITS, Problem
from mpqdiff.sites import Site

FLOAT = (FLOAT_BITS, FLOAT_BITS)
Choice = tuple[int, int]

# What a budget can count. Bytes and bits are of the model; the others are of one image, all its
# steps. `seconds` come from a measured table (`latency`).
RESOURCES = {
    "bytes": "bytes passed to the device",
    "file_bytes": "bytes of the saved file, at most",
    "bitops": "MACs x weight bits x activation bits per image",
    "seconds": "seconds per image, from products measured on this device",
    "joules": "joules per image, modelled",
    "mean_bits": "mean weight bits of the unpinned sites",
}


def list_choices(
    w_bits: Sequence[int], a_bits: Sequence[int], *, keep_float: bool = False
) -> tuple[Choice, ...]:
    """Every pair of widths, ascending; with `keep_float` also FLOAT. InputError as `widths`."""
    pairs = tuple((w, a) for w in widths("w_bits", w_bits) for a in widths("a_bits", a_bits))
    return pairs + ((FLOAT,) if keep_float else ())


def widths(name: str, bits: Sequence[int]) -> tuple[int, ...]:
    """`bits` sorted; InputError unless distinct widths within 2..8."""
    found = tuple(sorted(set(bits)))
    if not found or len(found) != len(tuple(bits)) or found[0] < 2 or found[-1] > 8:
        raise InputError(f"{name} {tuple(bits)}: expected distinct widths within 2..8")
    return found


def legal_choices(sites: Sequence[Site], choices: Sequence[Choice]) -> tuple[list, np.ndarray]:
    """(all choices with those of the pins, ascending; legal bool [L,K]).

    A pinned site has its pin and the widest activation only, or float where the pin is FLOAT_BITS.
    A product has no weights: of the choices that differ in w_bits alone it has the widest.
    """
    a_widest = max((a for _, a in choices if a != FLOAT_BITS), default=8)
    w_widest = max((w for w, _ in choices if w != FLOAT_BITS), default=8)
    pinned = {bits: FLOAT if bits == FLOAT_BITS else (bits, a_widest) for bits in _pins(sites)}
    every = sorted({*choices, *pinned.values()})

    def allowed(site: Site, choice: Choice) -> bool:
        if site.pin:
            return choice == pinned[site.pin]
        whole = bool(site.parameters) or choice[0] in (w_widest, FLOAT_BITS)
        return choice in choices and whole

    return every, np.array([[allowed(site, choice) for choice in every] for site in sites])


def _pins(sites: Sequence[Site]) -> set[int]:
    return {site.pin for site in sites if site.pin}


def table(
    name: str,
    sites: Sequence[Site],
    choices: Sequence[Choice],
    *,
    asymmetric: Sequence[bool],
    evaluations: int,
    batch: int,
    measured: Mapping[str, np.ndarray],
) -> np.ndarray:
    """What each choice takes of resource `name`, float64 [L,K].

    `asymmetric` [L] tells which sites read a lopsided activation: their zero point costs a column
    sum per output. `evaluations` of the denoiser make an image; each call serves `batch` of them.
    `measured` holds the table of "seconds" [L,K]. Raises InputError on an unknown resource.
    """
    if name not in RESOURCES:
        raise unknown_name("budget resource", name, RESOURCES)
    if name == "seconds":
        return np.asarray(measured[name], np.float64)
    weights = max(sum(s.stored for s in sites if not s.pin), 1)
    cost = {
        "bytes": lambda s, w, a, flag: device_bytes(s, w, flag),
        "file_bytes": lambda s, w, a, flag: file_bytes(s, w, flag),
        "bitops": lambda s, w, a, flag: evaluations * site_bitops(s, w, a),
        "joules": lambda s, w, a, flag: evaluations * site_joules(s, w, a, batch=batch),
        "mean_bits": lambda s, w, a, flag: 0 if s.pin else s.stored * w / weights,
    }[name]
    pairs = zip(sites, asymmetric, strict=True)
    return np.array([[cost(s, w, a, flag) for w, a in choices] for s, flag in pairs], np.float64)


def problem(
    value,
    sites: Sequence[Site],
    choices: Sequence[Choice],
    legal,
    *,
    budgets: dict[str, float],
    tables: Mapping[str, np.ndarray],
    fixed: Mapping[str, float],
) -> Problem:
    """The knapsack over `sites`: expected damage `value` [L,K] of `choices` (`legal_choices`).

    `tables` [L,K] and `fixed` (what no choice changes) by resource; `budgets` names those that
    are bounded. Raises InputError on none or an unknown resource.
    """
    names = tuple(budgets)
    for name in names:
        if name not in RESOURCES:
            raise unknown_name("budget resource", name, RESOURCES)
    if not names:
        raise InputError(f"no budget given: expected one of {', '.join(RESOURCES)}")
    ties = {tie: index for index, tie in enumerate(dict.fromkeys(site.tie for site in sites))}
    return Problem(
        value=np.where(legal, np.asarray(value, np.float64), 0.0),
        resources=np.array([tables[name] for name in names], np.float64),
        fixed=np.array([fixed[name] for name in names], np.float64),
        budgets=np.array([budgets[name] for name in names], np.float64),
        w_bits=np.array([w for w, _ in choices], np.int32),
        a_bits=np.array([a for _, a in choices], np.int32),
        legal=np.asarray(legal, bool),
        tie=np.array([ties[site.tie] for site in sites], np.int32),
        parameters=np.array([site.stored for site in sites], np.int64),
        names=names,
    )
