"""A config's model as a denoiser: one of ours as it is, anyone else's by its program."""

from typing import Any

from mpqdiff.denoiser import from_linen
from mpqdiff.models import MODELS
from mpqdiff.program import Wrapped, from_flax


def denoiser(module, params, x_t, t, cond) -> Wrapped:
    """(denoise, its params) of a module that `models.build` gave; `params` are arrays or shapes.

    x_t [B,H,W,C], t and cond (a pytree of [B,...]) are an example of a call, of which shapes are
    read, B at least 2. A module of our own (`models.MODELS`) keeps its parameters; any other is
    traced (`from_flax`), so that raw products, scans and remat are no obstacle.
    """
    if isinstance(module, tuple(MODELS.values())):
        return Wrapped(from_linen(module), params)
    given: dict[str, Any] = {"params": params}
    return from_flax(module, given, x_t, t, cond)
