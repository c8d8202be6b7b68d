"""Entries of the layers that every torch model is made of, under torch's names for their leaves."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.weights.mapping import Entry, conv, dense


def linear(target: str, source: str) -> list[Entry]:
    """A Linear as a Dense."""
    return [_entry(target, "kernel", source, "weight", dense), _entry(target, "bias", source)]


def convolution(target: str, source: str) -> list[Entry]:
    """A Conv2d as a Conv."""
    return [_entry(target, "kernel", source, "weight", conv), _entry(target, "bias", source)]


def norm(target: str, source: str) -> list[Entry]:
    """A GroupNorm or LayerNorm with weight and bias."""
    return [_entry(target, "scale", source, "weight"), _entry(target, "bias", source)]


def fused(target: str, *sources: str) -> list[Entry]:
    """Linears of one input, such as q, k and v, as one Dense with their outputs side by side."""
    weights = tuple(f"{source}.weight" for source in sources)
    biases = tuple(f"{source}.bias" for source in sources)
    return [
        Entry(f"{target}/kernel", weights, lambda *parts: np.concatenate(parts).T),
        Entry(f"{target}/bias", biases, lambda *parts: np.concatenate(parts)),
    ]


def _entry(target, leaf, source, kind="bias", make=None) -> Entry:
    return Entry(f"{target}/{leaf}", (f"{source}.{kind}",), make)


def resolve(
    config: Mapping[str, Any], defaults: Mapping[str, Any], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """A diffusers config with what it leaves out; `fixed` are the values that our model has.

    Raises InputError naming the entries that differ from `fixed` or are not of the default's type.
    """
    full = {**fixed, **defaults, **config}
    other = [f"{key}={full[key]!r} (supported: {fixed[key]!r})" for key in fixed
             if full[key] != fixed[key]]  # fmt: skip
    if other:
        raise InputError(f"config.json has {', '.join(other)}: this model is not supported")
    for key, default in defaults.items():
        kinds = (int, float) if isinstance(default, float) else type(default)
        if default is not None and not isinstance(full[key], kinds):
            raise InputError(
                f"config.json has {key}={full[key]!r}, expected {type(default).__name__}, such as "
                f"{default!r}"
            )
    return full


def learns_variance(in_channels: int, out_channels: int | None) -> bool:
    """Whether a denoiser's output has a second half for the variance; InputError when neither."""
    out_channels = out_channels or in_channels
    if out_channels not in (in_channels, 2 * in_channels):
        raise InputError(
            f"{out_channels} output channels for {in_channels} input channels: expected as many, "
            "or twice as many (learned variance)"
        )
    return out_channels == 2 * in_channels


def changed(kwargs: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs` without those that equal the module's own defaults."""
    return {k: v for k, v in kwargs.items() if k not in defaults or defaults[k] != v}
