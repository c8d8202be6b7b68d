"""What each choice costs, and which choices are legal: `Problem` from a value table and sites."""

from collections.abc import Sequence

import numpy as np

from mpqdiff.costs.bytes import device_bytes, file_bytes
from mpqdiff.errors import InputError, unknown_name
from mpqdiff.records import Problem
from mpqdiff.sites import Site

RESOURCES = {"bytes": device_bytes, "file_bytes": file_bytes}


def problem(
    value,
    sites: Sequence[Site],
    *,
    w_bits: Sequence[int],
    a_bits: int,
    budgets: dict[str, float],
    fixed: dict[str, float],
    asymmetric: Sequence[bool],
) -> Problem:
    """The knapsack over `sites` with expected damage `value` [L,K] and `budgets` by resource.

    `asymmetric` [L] tells which sites read a lopsided activation: their zero point costs a column
    sum per output. A pinned site keeps only its pin's choice, which is added to the choices where
    `w_bits` lacks it. `fixed` is what no choice changes.
    Raises InputError on an unknown resource or an empty list of choices.
    """
    choices = check_choices(w_bits)
    pins = {site.pin for site in sites if site.pin}
    widths = sorted(set(choices) | pins)
    for name in budgets:
        if name not in RESOURCES:
            raise unknown_name("budget resource", name, RESOURCES)
    names = list(budgets)
    legal = np.array(
        [[w == site.pin if site.pin else w in choices for w in widths] for site in sites]
    )
    table = np.zeros((len(sites), len(widths)))
    columns = [widths.index(w) for w in choices]
    table[:, columns] = np.asarray(value, np.float64)
    resources = [
        [
            [RESOURCES[name](site, w, flag) for w in widths]
            for site, flag in zip(sites, asymmetric, strict=True)
        ]
        for name in names
    ]
    ties = {tie: index for index, tie in enumerate(dict.fromkeys(site.tie for site in sites))}
    return Problem(
        value=table,
        resources=np.array(resources, np.float64),
        fixed=np.array([fixed[name] for name in names], np.float64),
        budgets=np.array([budgets[name] for name in names], np.float64),
        w_bits=np.array(widths, np.int32),
        a_bits=np.full(len(widths), a_bits, np.int32),
        legal=legal,
        tie=np.array([ties[site.tie] for site in sites], np.int32),
        parameters=np.array([site.parameters for site in sites], np.int64),
    )


def check_choices(w_bits: Sequence[int]) -> tuple[int, ...]:
    """`w_bits` sorted; InputError unless distinct widths within 2..8."""
    choices = tuple(sorted(set(w_bits)))
    if not choices or len(choices) != len(tuple(w_bits)) or choices[0] < 2 or choices[-1] > 8:
        raise InputError(f"w_bits {tuple(w_bits)}: expected distinct widths within 2..8")
    return choices
