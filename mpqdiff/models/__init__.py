"""Networks in plain Flax linen, by the name a config or a weights file gives them."""

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.models import named, unet
from mpqdiff.models.dit import DIT_SIZES, DiT
from mpqdiff.models.pixart import PixArt
from mpqdiff.models.unet import UNet
from mpqdiff.models.vae import AutoencoderKL, FirstStage, VQModel

MODELS = {
    "dit": DiT,
    "pixart": PixArt,
    "unet": UNet,
    "autoencoder_kl": AutoencoderKL,
    "vq_model": VQModel,
}
# Numbers that need not be positive; of the others, every one is a count or a scale.
FREE = {"timestep_freq_shift", "frequency_shift", "shift_factor"}


def build(name: str, **kwargs):
    """The linen module called `name`: one of MODELS, or one's own as "package.module:ClassName".

    Raises InputError on an unknown name, a bad size, or an own module that does not fit (`named`).
    """
    if named.is_named(name):
        return named.build(name, **kwargs)
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    try:
        module = MODELS[name](**kwargs)
    except TypeError as error:
        raise InputError(f"model {name!r}: {error}") from error
    counts = {
        k: v
        for k, v in kwargs.items()
        if isinstance(v, int | float) and not isinstance(v, bool) and k not in FREE
    }
    if any(value <= 0 for value in counts.values()):
        raise InputError(f"model {name!r} got {counts}: every count must be positive")
    if isinstance(module, UNet):
        unet.check(module)
    elif isinstance(module, PixArt | FirstStage):
        module.check()
    elif module.image_size % module.patch or module.width % (4 * module.num_heads):
        raise InputError(
            f"dit: image_size={module.image_size} must be a multiple of patch={module.patch} and "
            f"width={module.width} of 4 * num_heads={4 * module.num_heads}"
        )
    return module


__all__ = [
    "DIT_SIZES",
    "MODELS",
    "AutoencoderKL",
    "DiT",
    "FirstStage",
    "PixArt",
    "UNet",
    "VQModel",
    "build",
]
