"""What the arms' samples are worth: the metrics of every arm, paired with the float arm's."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from mpqdiff.arms import Arm
from mpqdiff.artifacts import load_arrays, read_json, save_arrays, write_json
from mpqdiff.evaluate import drift, evaluate, features, health, paired_numbers, verdicts
from mpqdiff.evaluate.downstream import class_agreement, correct, downstream, real_images
from mpqdiff.evaluate.protocol import protocol
from mpqdiff.pipeline import VERSIONS
from mpqdiff.recipe import feature_space

PAIRED = ("x0_mse", "psnr", "ssim")  # taken image by image
COMPARED = ("x0_mse", "psnr", "kid", "fid")  # of `against_plan`


def extracted(arm: Arm, network) -> dict:
    """{images uint8, features, logits, spatial} of an arm's samples; features are cached."""
    name, images = arm.samples[0], arm.images

    def compute(folder):
        save_arrays(folder / "features.npz", features.collect(network, images)._asdict())

    key = {"sample": name, "decoder": _decoder(arm), "network": network.hash}
    folder = arm.experiment.store.get(
        "features", version=VERSIONS["features"], key=key, compute=compute
    )
    return {"images": images, "spatial": None, **load_arrays(folder / "features.npz")}


def ceiling_arm(base: Arm) -> Arm:
    """The float model at `evaluate.ceiling_steps` even steps, whose FID is damage 1: the same
    however the arms' timesteps are chosen."""
    low = base.config.copy_and_resolve_references()
    low.diffusion.num_steps = base.config.evaluate.ceiling_steps
    low.timesteps.name = "uniform"
    return Arm(base.experiment, "ceiling", "float32", low, None)


def metrics(arms: list[Arm]) -> tuple[list[dict], dict]:
    """(one row of metrics per arm, the protocol). Arm 0 is float, with which all are paired."""
    config = arms[0].config
    if not config.evaluate.features:
        return _judged(arms, [paired_metrics(arm, arms[0]) for arm in arms]), {}
    network, reference = feature_space(config)
    ceiling = extracted(ceiling_arm(arms[0]), network)
    base = extracted(arms[0], network)
    followed = min(config.evaluate.drift_images, *(arm.count for arm in arms))
    paths = [trajectory(arm, followed) for arm in arms]
    trained = [downstream_answers(arm) for arm in arms]
    rows = []
    for arm, path, right in tqdm(
        zip(arms, paths, trained, strict=True), desc="evaluate", total=len(arms)
    ):
        own = extracted(arm, network)
        beside = _beside_float(arm, arms[0], base, path, paths[0])
        shared = min(arm.count, arms[0].count)

        def row_of(images: int, beside: dict, arm=arm, own=own) -> dict:
            """The row of the arm's first `images`."""
            return evaluate(
                images=own["images"][:images],
                x_0=arm.samples[1][:images],
                features=own["features"][:images],
                logits=own["logits"][:images],
                spatial=own["spatial"],
                reference=reference,
                float_images=_decoded(arms[0] if beside else arm, images),
                ceiling_features=ceiling["features"],
                seed=config.seed,
                values=True,
                **beside,
            )

        if shared == arm.count == arms[0].count:
            row = row_of(shared, beside)
        else:  # of its own images, but for what is beside float: that is at equal numbers
            cut = {name: beside[name][:shared] for name in ("float_x_0", "float_features")}
            row = _beside_equals(row_of(arm.count, {}), row_of(shared, beside | cut))
        if arm is not arms[0]:
            row |= class_agreement(own["logits"][:shared], base["logits"][:shared])
            row |= downstream(right, trained[0])
        rows.append(row)
    return _judged(arms, rows), described(arms, network, reference)


def _beside_equals(row: dict, shared: dict) -> dict:
    """`row` of all of an arm's images with, from its row of those that float has too, the paired
    metrics and the differences from float; `n_shared` is their number."""
    taken = (*PAIRED, "delta_fid", "drift", "drift_curve")
    keys = {key for name in taken for key in (name, f"{name}_ci") if key in shared}
    values = {name: shared["values"][name] for name in PAIRED if name in shared["values"]}
    return (
        row
        | {key: shared[key] for key in keys}
        | {"values": row["values"] | values, "n_shared": shared["n_images"]}
    )


def _beside_float(arm: Arm, base: Arm, base_features, path, base_path) -> dict:
    """The arguments of `evaluate` that pair an arm with the float arm."""
    if arm is base:
        return {}
    given = {"float_x_0": base.samples[1], "float_features": base_features["features"]}
    if path is None:
        return given
    own, theirs = drift.shared_steps(arm.timesteps, base.timesteps)
    return given | {
        "trajectory": path[own],
        "float_trajectory": base_path[theirs],
        "timesteps": np.asarray(arm.timesteps)[own].tolist(),
    }


def trajectory(arm: Arm, count: int) -> np.ndarray | None:
    """The arm's x_t for the first `count` images, [S,n,H,W,C], cached; None for none."""
    if not count:
        return None

    def compute(folder):
        save_arrays(folder / "trajectory.npz", {"x_ts": arm.trajectory(count)})

    key = {"sample": arm.samples[0], "count": count}
    folder = arm.experiment.store.get(
        "trajectory", version=VERSIONS["trajectory"], key=key, compute=compute
    )
    return load_arrays(folder / "trajectory.npz")["x_ts"]


def clipped(arm: Arm) -> dict | None:
    """`health` of a quantised arm's activations, cached; None for float, and where no image is
    asked for."""
    count = min(arm.config.evaluate.health_images, arm.count)
    if arm.plan is None or not count:
        return None

    def compute(folder):
        write_json(folder / "health.json", health.health(arm, images=count))

    key = {"sample": arm.samples[0], "count": count}
    folder = arm.experiment.store.get(
        "health", version=VERSIONS["health"], key=key, compute=compute
    )
    found = read_json(folder / "health.json")
    return {name: found[name] for name in ("clip_rate", "not_finite")} | {"images": count}


def downstream_answers(arm: Arm) -> np.ndarray | None:
    """Which real test images classifiers trained on the arm's samples get right, [seeds,n],
    cached; None where not asked for, or where there are no real images."""
    config, experiment = arm.config, arm.experiment
    if not config.evaluate.downstream:
        return None
    cache = Path(config.data.cache).expanduser()
    real = real_images(config.data.name, directory=config.data.dir or None, cache=cache)
    if real is None:
        return None

    def compute(folder):
        images = arm.images
        labels, num_classes = experiment.labels(len(images))
        right = correct(images, labels, real, num_classes=num_classes)
        save_arrays(folder / "right.npz", {"right": right})

    key = {"sample": arm.samples[0], "data": config.data.name, "real": len(real.images)}
    folder = experiment.store.get(
        "downstream", version=VERSIONS["downstream"], key=key, compute=compute
    )
    return load_arrays(folder / "right.npz")["right"]


def _judged(arms: list[Arm], rows: list[dict]) -> list[dict]:
    """The rows with `against`, {metric: {arm: word}}: "better" or "worse" than that arm, or a
    "tie" inside the noise, by the paired test where there are values per image; and
    `against_plan`, what it says of COMPARED and the plan."""
    values = [row.pop("values", {}) for row in rows]
    for row, found in zip(rows, verdicts([arm.name for arm in arms], rows, values), strict=True):
        row["against"] = found
        plan = {key: found.get(key, {}).get("plan") for key in COMPARED}
        row["against_plan"] = {key: word for key, word in plan.items() if word}
    return rows


def described(arms: list[Arm], network, reference) -> dict:
    """The protocol that all arms share; its number of images is the least of theirs."""
    arm, config = arms[0], arms[0].config
    return protocol(
        feature_space=network.name,
        feature_hash=network.hash,
        reference=config.evaluate.reference,
        reference_count=reference.num_train or 0,
        n_images=min(each.count for each in arms),
        seeds=[config.sample.seed],
        guidance=config.diffusion.guidance_scale,
        sampler=f"{config.diffusion.sampler}, eta {config.diffusion.eta:g}, clip "
        f"{config.diffusion.clip}",
        ceiling_steps=config.evaluate.ceiling_steps,
        is_fid=network.is_fid,
        image_size=arm.experiment.pixel_shape,
    )


def paired_metrics(arm: Arm, base: Arm) -> dict:
    """The metrics that need no feature network: against float on the same seeds."""
    if arm is base:
        return {}
    shared = min(arm.count, base.count)
    decoded = _decoded(base, shared)
    return paired_numbers(
        arm.samples[1][:shared],
        base.samples[1][:shared],
        images=None if decoded is None else arm.images[:shared],
        float_images=decoded,
        values=True,
    )


def _decoder(arm: Arm) -> str | None:
    """The hash of what decodes the arm's samples; None for a pixel model."""
    return arm.experiment.autoencoder and arm.experiment.autoencoder.hash


def _decoded(arm: Arm, count: int) -> np.ndarray | None:
    """The arm's first `count` images where they are decoded from latents."""
    return arm.images[:count] if arm.experiment.autoencoder else None
