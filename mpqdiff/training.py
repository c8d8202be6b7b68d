"""`mpqdiff train`: the config's model on the config's data, to a weights file with its card."""

import hashlib
import json
from pathlib import Path

import jax

from mpqdiff import data, models, weights
from mpqdiff.artifacts import read_json, write_atomically, write_json
from mpqdiff.conditioning import num_classes
from mpqdiff.denoiser import from_linen
from mpqdiff.diffusion.schedule import alphas_cumprod
from mpqdiff.errors import InputError
from mpqdiff.results import environment
from mpqdiff.train import train


def run(config, workdir: Path, *, command: str) -> str:
    """Train, or go on where a killed run stopped; writes `workdir/weights.safetensors` (the EMA).

    Returns what to print. Raises InputError when data and model do not fit.
    """
    kwargs = config.model.kwargs.to_dict()
    module = models.build(config.model.name, **kwargs)
    images, labels = data.load(
        config.data.name,
        directory=Path(config.data.dir).expanduser() if config.data.dir else None,
        cache=Path(config.data.cache).expanduser() if config.data.cache else None,
        split="train",
    )
    shape = (module.image_size, module.image_size, module.channels)
    classes = num_classes(module)
    if images.shape[1:] != shape or (classes and int(labels.max()) >= classes):
        raise InputError(
            f"data {config.data.name!r} has images {images.shape[1:]} and "
            f"{int(labels.max()) + 1} classes; the model takes {shape} and {classes}"
        )
    recipe = {name: config[name].to_dict() for name in ("train", "data", "model", "diffusion")} | {
        "seed": config.seed
    }
    del recipe["data"]["dir"], recipe["data"]["cache"]
    check_recipe(workdir / "recipe.json", recipe)
    write_json(workdir / "config.json", config.to_dict())
    # A key apart from the one that draws noise: training folds steps into key(seed).
    params = weights.initialise(module, jax.random.key(config.seed + 1))
    d = config.diffusion
    state = train(
        from_linen(module),
        params,
        images,
        labels,
        alphas_cumprod=alphas_cumprod(d.schedule, d.num_timesteps, d.betas),
        num_classes=classes or 0,
        folder=workdir,
        seed=config.seed,
        prediction_type=d.prediction_type,
        **config.train.to_dict(),
    )
    path = workdir / "weights.safetensors"
    weights.save(path, state.ema, model={"name": config.model.name, "kwargs": kwargs})
    count = sum(leaf.size for leaf in jax.tree.leaves(state.ema))
    card = f"""# {config.name}

Trained by `{command}` on {config.data.name} (train split, {len(images)} images): {count:,}
parameters, {int(state.step)} steps of {config.train.batch} ({config.train.epochs} epochs), seed
{config.seed}, {config.train.dtype}. The file holds the exponential moving average (decay
{config.train.ema_decay}) as float16.

- sha256: `{hashlib.sha256(path.read_bytes()).hexdigest()}`
- environment: {environment()}
"""
    write_atomically(workdir / "weights.md", card.encode())
    return f"written: {path} ({path.stat().st_size:,} bytes) and its card weights.md"


def check_recipe(path: Path, recipe: dict) -> None:
    """InputError when the checkpoints beside `path` come from another recipe; else record this one.

    Going on under another seed, rate or data set would give weights that no command repeats.
    """
    recipe = json.loads(json.dumps(recipe))
    if not path.exists():
        write_json(path, recipe)
        return
    found = read_json(path)
    different = sorted(key for key in recipe if recipe[key] != found.get(key))
    if different:
        raise InputError(
            f"{path.parent} holds a training of another recipe (other {', '.join(different)}): "
            "choose another --workdir, or delete it to start afresh"
        )
