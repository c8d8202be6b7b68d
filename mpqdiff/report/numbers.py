"""Values of the report as text: what a reader sees of a number, a sequence or a null."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

DASH = "–"


def finite(value: Any, lost: list[str] | None = None, path: str = "") -> Any:
    """`value` with only JSON types in it; NaN and infinities become None, their paths go to `lost`.

    Takes dicts, sequences, numpy and jax arrays and scalars; anything else becomes its `str`.
    """
    if isinstance(value, dict):
        dot = f"{path}." if path else ""
        return {str(k): finite(v, lost, f"{dot}{k}") for k, v in value.items()}
    if hasattr(value, "tolist"):
        return finite(np.asarray(value).tolist(), lost, path)
    if isinstance(value, list | tuple):
        return [finite(item, lost, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        if lost is not None:
            lost.append(f"{path} = {value}")
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def whole(value) -> str:
    """1234567 -> "1,234,567"."""
    return f"{value:,.0f}"


def plain(value) -> str:
    """A number of a record as it is; floats to nine digits."""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def short(value, digits: int = 4) -> str:
    """`digits` significant digits, trailing zeros kept, so that a column lines up."""
    if 10**digits <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def small(value) -> str:
    """Three significant digits."""
    return short(value, 3)


def prefixed(value) -> str:
    """1.234e12 -> "1.234 T" (SI prefixes from k to E)."""
    power = 0 if value == 0 else min(max(int(math.log10(abs(value)) // 3), 0), 6)
    return f"{value / 1000**power:.4g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}".strip()


def amount(value) -> str:
    """Bytes, operations, seconds: whole with thousands from 1000 up, else six digits."""
    return whole(value) if abs(value) >= 1000 else f"{value:.6g}"


def percent(value) -> str:
    """0.0312 -> "3.1 %"."""
    return f"{100 * value:.1f} %"


def times(value) -> str:
    """1.314 -> "1.31x"."""
    return f"{value:.2f}x"


def shown(value: Any, show: Callable[[Any], str] = plain) -> str:
    """Any value as text: null is a dash, numbers by `show`, sequences item by item."""
    if value is None:
        return DASH
    if isinstance(value, list | tuple):
        return ", ".join(shown(item, show) for item in value) or DASH
    if isinstance(value, dict):
        return "; ".join(f"{key} {shown(item, show)}" for key, item in value.items()) or DASH
    return str(value) if isinstance(value, str | bool) else show(value)


def pick(arm: dict, key: str) -> Any:
    """The value at a dotted key; None where any part of it is absent or null."""
    value: Any = arm
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
