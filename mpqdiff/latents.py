"""The autoencoder of a latent model: what its samples are decoded with, always in float."""

from typing import Any, NamedTuple

import jax
import numpy as np

from mpqdiff import weights
from mpqdiff.artifacts import digest, tree_digest
from mpqdiff.config import Config
from mpqdiff.errors import InputError
from mpqdiff.models import FirstStage
from mpqdiff.recipe import random_model


class Autoencoder(NamedTuple):
    """A linen `AutoencoderKL` or `VQModel`, its parameters, and their hash."""

    module: FirstStage
    params: Any
    hash: str

    def image_shape(self, latent_shape) -> tuple[int, int, int]:
        """(H, W, C) of the images of latents (h, w, c)."""
        factor = 2 ** (len(self.module.widths) - 1)
        return latent_shape[0] * factor, latent_shape[1] * factor, self.module.channels

    def decode(self, latents, *, batch: int) -> np.ndarray:
        """Images float32 [N,H,W,C], about [-1, 1], of latents [N,h,w,c]; `batch` at a time."""
        to_images = jax.jit(lambda p, z: self.module.apply({"params": p}, z, method="to_images"))
        params = jax.device_put(self.params)
        parts = [
            np.asarray(to_images(params, latents[start : start + batch]))
            for start in range(0, len(latents), batch)
        ]
        return np.concatenate(parts)


def load(config: Config, denoiser) -> Autoencoder | None:
    """The autoencoder that `config.autoencoder` names for `denoiser`; None for a pixel model.

    Raises InputError on weights that are missing, damaged, of another kind of model, or with
    other latents than the denoiser's.
    """
    source = config.autoencoder.weights
    if not source:
        return None
    if source == "random":
        kwargs = {"latent_channels": denoiser.channels, **config.autoencoder.kwargs.to_dict()}
        module, params, model = random_model("autoencoder_kl", kwargs, config.seed)
    else:
        module, params, model = weights.load(source)
    if not isinstance(module, FirstStage) or module.latent_channels != denoiser.channels:
        channels = getattr(module, "latent_channels", "no")
        raise InputError(
            f"config.autoencoder.weights={source!r}: {model['name']} with {channels} latent "
            f"channels; the denoiser needs an autoencoder_kl or vq_model with "
            f"{denoiser.channels}"
        )
    return Autoencoder(module, params, digest(tree_digest(params), model))
