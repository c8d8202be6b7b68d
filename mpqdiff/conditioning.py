"""What images are conditioned on: class labels, cached text embeddings, or nothing.

A condition is a pytree that the model takes as `cond`; image i of an experiment has condition
i mod M of a pool of M. No text encoder runs here: embeddings come from a file.
"""

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqdiff.config import Config
from mpqdiff.errors import InputError
from mpqdiff.models.pixart import Caption, PixArt
from mpqdiff.models.unet import UNet

# Prompts and tokens of a random pool, for models without weights.
RANDOM_PROMPTS, RANDOM_TOKENS = 3, 4


class Conditions(NamedTuple):
    """`pool`: a pytree with leaves [M, ...]; `null`: one entry without the axis M, what guidance
    calls unconditional, or None where the model has no such thing."""

    pool: Any
    null: Any = None

    def take(self, start: int, count: int):
        """The conditions of images start..start+count-1: leaves [count, ...]."""
        return jax.tree.map(
            lambda leaf: jnp.asarray(leaf[np.arange(start, start + count) % len(leaf)]), self.pool
        )

    def input_shapes(self, image_shape, batch: int):
        """Shapes of (x_t [batch,H,W,C], t [], cond) of one call; image_shape (H, W, C)."""
        x_t = jax.ShapeDtypeStruct((batch, *image_shape), np.float32)
        cond = jax.eval_shape(lambda: self.take(0, batch))
        return x_t, jax.ShapeDtypeStruct((), np.int32), cond

    def mixed(self, start: int, count: int):
        """`take`, every other one null: under guidance a model is evaluated on both as often."""
        odd = np.arange(count) % 2 == 1
        return jax.tree.map(
            lambda leaf, null: jnp.where(odd.reshape(-1, *(1,) * null.ndim), null, leaf),
            self.take(start, count),
            self.null,
        )


def load(config: Config, module) -> Conditions:
    """The conditions of a model: every class in turn, or the prompts of the file `config.text`.

    A text model takes an .npz with `embeddings` [M,P,D] and, where there are any, `mask`
    [M,P] (1 keeps a token), `null` [P,D] and `null_mask` [P], the embeddings of the empty prompt.
    A random model without a file gets random ones. Raises InputError on a file that is missing,
    damaged or of another width, or on guidance without a null condition.
    """
    width, source = text_width(module), config.text
    if width is None:
        found = _labels(module)
    else:
        drawn = config.weights == "random" and not source
        tokens = _random(width) if drawn else _read(source, width)
        found = Conditions(*(_as_taken(module, part) for part in tokens))
    if config.diffusion.guidance_scale != 1.0 and found.null is None:
        advice = "set it to 1" if width is None else f"add `null` to {source!r}, or set it to 1"
        raise InputError(
            f"config.diffusion.guidance_scale={config.diffusion.guidance_scale:g} needs a null "
            f"condition, which there is none of: {advice}"
        )
    return found


def text_width(module) -> int | None:
    """Features of a text token for a model that reads text, else None."""
    if isinstance(module, PixArt):
        return module.text_width
    if isinstance(module, UNet) and module.condition == "context":
        return module.context_width
    return None


def num_classes(module) -> int | None:
    """Classes of a model's labels, the null label apart; None for a model without labels."""
    if isinstance(module, UNet) and "label" not in module.condition:
        return None
    return getattr(module, "num_classes", None)


def _labels(module) -> Conditions:
    count = num_classes(module)
    if count is None:  # labels are passed and not looked at
        return Conditions(np.zeros(1, np.int32))
    null = np.int32(count) if getattr(module, "null_class", True) else None
    return Conditions(np.arange(count, dtype=np.int32), null)


def _as_taken(module, tokens: dict | None):
    """{"embeddings", "mask"} as the model takes it, or None of None."""
    if tokens is None:
        return None
    embeddings = tokens["embeddings"]
    if not isinstance(module, PixArt):
        return embeddings
    pixels = np.full((*embeddings.shape[:-2], 2), 8.0 * module.image_size, np.float32)
    sizes = (pixels, pixels[..., :1] / pixels[..., 1:]) if module.size_conditions else (None, None)
    return Caption(embeddings, tokens["mask"], *sizes)


def _random(width: int) -> tuple[dict, dict]:
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((RANDOM_PROMPTS + 1, RANDOM_TOKENS, width)).astype(np.float32)
    mask = np.ones(drawn.shape[:2], np.float32)
    return _tokens(drawn[1:], mask[1:]), _tokens(drawn[0], mask[0])


def _tokens(embeddings, mask) -> dict:
    return {"embeddings": embeddings, "mask": mask}


def _read(source: str, width: int) -> tuple[dict, dict | None]:
    """(tokens of the prompts, tokens of the empty prompt or None) of a file."""
    if not source:
        raise InputError(
            "the model reads text: set config.text to an .npz with `embeddings` [prompts, tokens, "
            f"{width}] (and `mask`, `null`, `null_mask`), made once with the model's text encoder"
        )
    try:
        # Opened here because np.load leaves a damaged file open.
        with Path(source).open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {name: np.asarray(stored[name], np.float32) for name in stored.files}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"config.text={source!r}: no readable .npz ({error})") from error
    if "embeddings" not in arrays:
        raise InputError(f"config.text={source!r} has {sorted(arrays)}: expected `embeddings`")
    embeddings = arrays["embeddings"]
    if embeddings.ndim != 3 or embeddings.shape[-1] != width or not embeddings.size:
        raise InputError(
            f"config.text={source!r}: embeddings {list(embeddings.shape)}, the model takes "
            f"[prompts, tokens, {width}]"
        )
    prompts = _tokens(embeddings, arrays.get("mask", np.ones(embeddings.shape[:2], np.float32)))
    null = None
    if "null" in arrays:
        ones = np.ones(arrays["null"].shape[:1], np.float32)
        null = _tokens(arrays["null"], arrays.get("null_mask", ones))
    for what, tokens, axes in (("", prompts, 2), ("null of ", null or {}, 1)):
        expected = {
            "embeddings": embeddings.shape[-axes - 1 :],
            "mask": embeddings.shape[:2][-axes:],
        }
        for part, value in tokens.items():
            if value.shape != expected[part] or not np.isfinite(value).all():
                raise InputError(
                    f"config.text={source!r}: {what}{part} {list(value.shape)}, expected finite "
                    f"{list(expected[part])}"
                )
    return prompts, null
