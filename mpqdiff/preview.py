"""`--dry_run`: the resolved config, the site table and what a run will cost, without running it."""

import time

import jax
import jax.numpy as jnp

from mpqdiff import conditioning, pipeline, timesteps
from mpqdiff import sites as site_list
from mpqdiff.config import for_arm
from mpqdiff.costs import legal_choices, list_choices
from mpqdiff.outcome import site_row
from mpqdiff.program.configured import denoiser
from mpqdiff.recipe import by_student, count_images
from mpqdiff.record import timesteps_per_chunk
from mpqdiff.records import FLOAT_BITS
from mpqdiff.sensitivity.damage import evaluations


def macs_per_second() -> float:
    """This device's float32 rate on one mid-sized product, MACs/s; measured in about 0.2 s."""
    size = 512
    x = jnp.ones((size, size))
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        product(x).block_until_ready()
        count += 1
    return count * size**3 / (time.perf_counter() - start)


def text(config) -> str:
    """Everything `--dry_run` prints. Nothing is written. InputError as of a run's first checks."""
    for recipe in pipeline.recipes(config):
        pipeline.check_names(recipe)
    module, params, _ = pipeline.load_model(config)
    shape = (module.image_size, module.image_size, module.channels)
    conditions = conditioning.load(config, module)
    denoise, params = denoiser(module, params, *conditions.input_shapes(shape, 2))
    inputs = conditions.input_shapes(shape, 1)
    found, remainder = site_list.list_sites(denoise, params, *inputs)
    sites = site_list.pin(found, config.plan.pins)
    planned = site_list.planned(sites, products=config.quantize.products)
    paths = [site.path for site in planned]
    rows = [site_row(site, paths, None) for site in sites]
    width = max(len(row["path"]) for row in rows)
    offered = "/".join(map(str, config.plan.w_bits)) + ("/float" if config.plan.keep_float else "")
    lines = [str(config), f"{'site':<{width}}  kind       parameters        MACs  bits"]
    for row in rows:
        choices = "float" if row["pinned"] == FLOAT_BITS else row["pinned"] or offered
        lines.append(
            f"{row['path']:<{width}}  {row['kind']:<9}  {row['parameters']:>10,}  "
            f"{row['macs']:>10,}  {choices if row['reason'] is None else 'float: ' + row['reason']}"
        )
    lines += [f"left in float: {entry.name}  {entry.macs:,} MACs" for entry in remainder]
    return "\n".join([*lines, "", cost(config, params, sites, planned, remainder)])


def cost(config, params, sites, planned, remainder) -> str:
    """Evaluations, time and memory, from MACs and the device's measured product rate."""
    macs = sum(site.macs for site in sites) + sum(entry.macs for entry in remainder)
    steps = config.diffusion.num_steps
    halves = 1 if config.diffusion.guidance_scale == 1.0 else 2
    c, runs = config.calibration, sampled(config)
    timed = sum(min(config.sample.batch, images) * count for count, images in runs)
    recorded = min(c.timesteps, steps)
    calls = {
        "calibrate": c.samples * steps * halves,
        "record": c.samples * recorded * 2,
        **score_calls(config, planned, recorded, steps * halves),
        **{name: count * halves for name, count in step_calls(config).items()},
        "sample": sum(images * count for count, images in runs) * halves,
        "time": (config.evaluate.timing_rounds + 1) * timed * halves,
    }
    # Elementwise work, normalisation and attention: small models reach about a fifth of the rate.
    rate = macs_per_second() / 5
    lines = [
        f"{name:<13} {count:>10,} evaluations, about {count * macs / rate:,.0f} s"
        for name, count in calls.items()
    ]
    chunk = min(timesteps_per_chunk(planned, c.samples, c.memory_gb), c.timesteps)
    grams = 4 * c.timesteps * len(planned) * c.samples**2
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    lines += [
        f"compiling     {len(runs) + 4} programs",
        f"memory        {c.memory_gb} GB of activations at most ({chunk} timesteps at once), "
        f"{grams / 2**20:.1f} MiB of Grams, {weights / 2**20:.1f} MiB of float32 weights",
    ]
    return "\n".join(lines)


def sampled(config) -> list[tuple[int, int]]:
    """(steps, images) of every arm, float first; the most steps where a plan chooses them."""
    float_steps = config.diffusion.num_steps
    counts = [float_steps, max(config.plan.steps, default=float_steps)]
    for changes in config.arms.values():
        recipe = for_arm(config, changes)
        own = recipe.diffusion.num_steps
        counts.append(own if changes.get("float") else max(recipe.plan.steps, default=own))
    return [(steps, count_images(config, steps)) for steps in counts]


def step_calls(config) -> dict[str, int]:
    """Evaluations that choosing timesteps and their number takes; what takes none is left out."""
    length, rollouts, students = config.diffusion.num_timesteps, 0, 0
    every = pipeline.recipes(config)
    floats = [False, *(bool(changes.get("float")) for changes in config.arms.values())]
    for recipe, is_float in zip(every, floats, strict=True):
        if is_float:
            continue
        steps = recipe.plan.steps or (recipe.diffusion.num_steps,)
        if len(steps) > 1:
            truth = 0 if rollouts else config.diffusion.num_steps  # of arm 0, for all of them
            rollouts += recipe.plan.rollout * (truth + sum(steps))
        if by_student(recipe):
            every_so = recipe.timesteps.every if recipe.timesteps.name == "drift" else 0
            again = sum((length - s) // every_so if every_so else 0 for s in steps)
            students += 2 * recipe.timesteps.samples * length * (1 + again)
    taken = ("gram" in timesteps.arguments(each.timesteps.name) for each in every)
    counts = {
        "teacher": config.timesteps.samples * length if any(taken) else 0,
        "student": students,
        "steps": rollouts,
    }
    return {name: count for name, count in counts.items() if count}


def score_calls(config, planned, recorded: int, steps: int) -> dict[str, int]:
    """Evaluations of each damage score that a recipe uses; what takes none is left out."""
    every = pipeline.recipes(config)
    offered = {
        choice
        for recipe in every
        for choice in list_choices(
            recipe.plan.w_bits, recipe.plan.a_bits, keep_float=recipe.plan.keep_float
        )
    }
    choices, legal = legal_choices(planned, sorted(offered))
    counts = {}
    for name in dict.fromkeys(recipe.score.name for recipe in every):
        rollout = name == "rollout_error"
        samples = config.score.samples if rollout else config.calibration.samples
        counts[name] = evaluations(name, planned, choices, recorded, samples, steps, legal=legal)
    return {name: count for name, count in counts.items() if count}
