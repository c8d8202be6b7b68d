"""`results.json`: one row per arm, of what was counted, measured and evaluated."""

import platform
from importlib import metadata

import jax
import numpy as np
from tqdm import tqdm

from mpqdiff import images as pictures
from mpqdiff.arms import Arm, time_arms
from mpqdiff.artifacts import load_arrays, read_json, save_arrays, write_json
from mpqdiff.costs.bitops import bitops
from mpqdiff.evaluate import evaluate, features, paired_numbers
from mpqdiff.evaluate.protocol import protocol
from mpqdiff.pipeline import VERSIONS
from mpqdiff.plan import average_bits

SCHEMA = 1
METRICS = (
    "fid", "fid_ci", "delta_fid", "damage", "kid", "kid_ci", "sfid", "is", "precision", "recall",
    "psnr", "psnr_ci", "ssim", "x0_mse",
)  # fmt: skip
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "aqtp", "ml_collections", "safetensors")


def environment() -> dict:
    """Where and with what this runs."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def extracted(arm: Arm, network) -> dict:
    """{images uint8, features, logits} of an arm's samples; features are cached."""
    name, x_0 = arm.samples
    images = pictures.to_uint8(x_0)

    def compute(folder):
        found, logits = features.extract(network, images)
        save_arrays(folder / "features.npz", {"features": found, "logits": logits})

    key = {"sample": name, "network": network.hash}
    folder = arm.experiment.store.get(
        "features", version=VERSIONS["features"], key=key, compute=compute
    )
    return {"images": images, **load_arrays(folder / "features.npz")}


def metrics(arms: list[Arm]) -> tuple[list[dict], dict]:
    """(one row of metrics per arm, the protocol). Arm 0 is float, with which all are paired."""
    experiment, config = arms[0].experiment, arms[0].config
    if not config.evaluate.features:
        return [paired_metrics(arm, arms[0]) for arm in arms], {}
    network = features.load(config.evaluate.features)
    reference = features.load_reference(config.evaluate.reference, network=network)
    described = protocol(
        feature_space=network.name,
        feature_hash=network.hash,
        reference=config.evaluate.reference,
        reference_count=reference.num_train,
        n_images=config.sample.num_images,
        seeds=[config.sample.seed],
        guidance=config.diffusion.guidance_scale,
        sampler=f"{config.diffusion.sampler}, eta {config.diffusion.eta:g}, clip "
        f"{config.diffusion.clip}",
        ceiling_steps=config.evaluate.ceiling_steps,
        image_size=experiment.image_shape,
    )
    low = config.copy_and_resolve_references()
    low.diffusion.num_steps = config.evaluate.ceiling_steps
    ceiling = extracted(Arm(experiment, "ceiling", "float32", low, None), network)
    base, base_x_0 = extracted(arms[0], network), arms[0].samples[1]
    rows = []
    for arm in tqdm(arms, desc="evaluate"):
        own = extracted(arm, network)
        paired = (
            {} if arm is arms[0] else {"float_x_0": base_x_0, "float_features": base["features"]}
        )
        rows.append(
            evaluate(
                images=own["images"],
                x_0=arm.samples[1],
                features=own["features"],
                logits=own["logits"],
                reference=reference,
                ceiling_features=ceiling["features"],
                seed=config.seed,
                **paired,
            )
        )
    return rows, described


def paired_metrics(arm: Arm, base: Arm) -> dict:
    """The metrics that need no feature network: against float on the same seeds."""
    return {} if arm is base else paired_numbers(arm.samples[1], base.samples[1])


def timed(arms: list[Arm]) -> list[dict]:
    """`time_arms`, measured once per machine, versions and arms: a report does not change them."""
    experiment, rounds = arms[0].experiment, arms[0].config.evaluate.timing_rounds

    def compute(folder):
        write_json(folder / "times.json", time_arms(arms, rounds))

    key = {
        "arms": [arm.samples[0] for arm in arms],
        "rounds": rounds,
        "environment": environment() | {"host": platform.node()},
    }
    folder = experiment.store.get("time", version=1, key=key, compute=compute)
    return read_json(folder / "times.json")


def efficiency(arm: Arm, times: dict, base_times: list[float]) -> dict:
    """The part of an arm's row that is counted or measured."""
    experiment = arm.experiment
    own = np.array(times["own"])
    quartiles = np.percentile(own, [25, 75])
    plan = arm.plan
    return {
        "arm": arm.name,
        "system": arm.system,
        "avg_w_bits": average_bits(plan, experiment.all_sites) if plan else 32.0,
        "bytes": arm.passed_bytes,
        "file_bytes": arm.file_bytes,
        "compression": sum(leaf.size * 4 for leaf in jax.tree.leaves(experiment.params))
        / arm.file_bytes,
        "bitops": bitops(
            experiment.all_sites,
            experiment.remainder,
            plan.w_bits if plan else {},
            plan.a_bits if plan else {},
            len(arm.timesteps) * experiment.halves,
        ),
        "steps": len(arm.timesteps),
        "ms_per_image": {
            "median": float(np.median(own)),
            "iqr": float(quartiles[1] - quartiles[0]),
            "n": len(own),
            "batch": arm.batch,
        },
        # Medians of ratios within a round: a drift of the machine's speed cancels.
        "speedup": float(np.median(np.array(base_times) / own)),
        "speedup_same_steps": float(np.median(np.array(times["float_same_steps"]) / own)),
        "peak_bytes": arm.execution.peak_bytes,
        "resident_bytes": arm.execution.resident_bytes,
        "energy_j": None,
        "execution": "integer" if plan else "float",
        "backend": arm.backend,
    }


def assemble(arms: list[Arm], times: list[dict], rows: list[dict], described: dict) -> dict:
    """The results object: `times` as `timed` gives them, `rows` and the protocol as `metrics`."""
    config = arms[0].config
    return {
        "schema": SCHEMA,
        "protocol": described | {"publish": bool(config.publish), "name": config.name},
        "arms": [
            {
                **efficiency(arm, taken, times[0]["own"]),
                **{name: row.get(name) for name in METRICS},
                **{name: value for name, value in row.items() if name not in METRICS},
                "n_images": config.sample.num_images,
                "seed": config.sample.seed,
            }
            for arm, taken, row in zip(arms, times, rows, strict=True)
        ],
    }


def table(results: dict) -> str:
    """The arms as lines of text: what `mpqdiff run` prints."""
    columns = (
        ("arm", 12, lambda a: a["arm"]),
        ("w bits", 7, lambda a: f"{a['avg_w_bits']:.2f}"),
        ("bytes", 10, lambda a: f"{a['bytes']:,}"),
        ("smaller", 8, lambda a: f"{a['compression']:.2f}x"),
        ("ms/image", 9, lambda a: f"{a['ms_per_image']['median']:.2f}"),
        ("speed-up", 9, lambda a: f"{a['speedup']:.2f}x"),
        ("x0 MSE", 10, lambda a: _number(a["x0_mse"], ".2e")),
        ("PSNR dB", 8, lambda a: _number(a["psnr"], ".2f")),
        ("FID", 8, lambda a: _number(a["fid"], ".2f")),
        ("damage", 7, lambda a: _number(a["damage"], ".3f")),
        ("runs in", 8, lambda a: a["execution"]),
    )
    lines = ["  ".join(f"{name:>{width}}" for name, width, _ in columns)]
    for arm in results["arms"]:
        lines.append("  ".join(f"{show(arm):>{width}}" for _, width, show in columns))
    return "\n".join(lines)


def _number(value, form: str) -> str:
    return "-" if value is None else format(value, form)
