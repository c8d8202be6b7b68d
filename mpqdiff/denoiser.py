"""What the rest of the package sees of a model: `denoise(params, x_t, t, cond) -> Prediction`.

`x_t` [B,H,W,C] float32; `t` an integer index, shape [] (the whole batch at one step, as samplers
call it) or [B]; `cond` whatever the model takes, here labels int32 [B].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from mpqdiff.shapes import Images, Timestep


class Prediction(NamedTuple):
    """The network's output: predicted noise, and the raw variance channels where it has them."""

    eps: Images
    log_variance: Images | None = None


Denoise = Callable[[Any, Images, Timestep, Any], Prediction]


def from_linen(module) -> Denoise:
    """The `denoise` function of a linen module with `module(x_t, t, cond) -> Prediction`.

    A module that returns a bare array is taken to predict eps.
    """

    def denoise(params, x_t, t, cond) -> Prediction:
        out = module.apply({"params": params}, x_t, t, cond)
        return out if isinstance(out, Prediction) else Prediction(out)

    return denoise
