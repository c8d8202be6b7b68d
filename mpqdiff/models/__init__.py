"""Denoisers in plain Flax linen, by the name a config gives them."""

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.models.dit import DIT_SIZES, DiT

MODELS = {"dit": DiT}


def build(name: str, **kwargs):
    """The linen module called `name`. Raises InputError on an unknown name or a bad size."""
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    try:
        module = MODELS[name](**kwargs)
    except TypeError as error:
        raise InputError(f"model {name!r}: {error}") from error
    counts = {k: v for k, v in kwargs.items() if isinstance(v, int | float)}
    if any(value <= 0 for key, value in counts.items() if key != "learn_variance"):
        raise InputError(f"model {name!r} got {counts}: every count must be positive")
    if name == "dit" and (
        module.image_size % module.patch or module.width % (4 * module.num_heads)
    ):
        raise InputError(
            f"dit: image_size={module.image_size} must be a multiple of patch={module.patch} and "
            f"width={module.width} of 4 * num_heads={4 * module.num_heads}"
        )
    return module


__all__ = ["DIT_SIZES", "MODELS", "DiT", "build"]
