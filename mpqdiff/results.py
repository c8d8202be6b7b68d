"""`results.json`: one row per arm, of what was counted, measured and evaluated."""

import platform
import warnings
from importlib import metadata

import jax
import numpy as np

from mpqdiff import fidelity, seconds
from mpqdiff.arms import Arm, time_arms
from mpqdiff.artifacts import read_json, write_json
from mpqdiff.costs.bitops import bitops
from mpqdiff.errors import InputError
from mpqdiff.evaluate import efficiency as speed
from mpqdiff.evaluate import energy_meter
from mpqdiff.evaluate.protocol import INDICATIVE_BELOW
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


def timed(arms: list[Arm]) -> list[dict]:
    """`time_arms`, each arm's energy, this device's fastest products ("ceilings") and, where asked,
    what the latency model expects ("predicted", seconds): measured once per machine, versions and
    arms, so that a report does not change them."""
    experiment, rounds = arms[0].experiment, arms[0].config.evaluate.timing_rounds
    batch_1, predict = (arms[0].config.evaluate[key] for key in ("batch_1", "predict_ms"))

    def compute(folder):
        expected = _expected(arms) if predict else [None] * len(arms)  # measures on its own
        times = time_arms(arms, rounds, batch_1=batch_1)
        ceilings = {kind: speed.ceiling(kind)._asdict() for kind in ("int8", "float32")}
        energies = [used_energy(arm)._asdict() for arm in arms]
        rows = zip(times, energies, expected, strict=True)
        write_json(
            folder / "times.json",
            [
                {**taken, "energy": energy, "ceilings": ceilings, "predicted": own}
                for taken, energy, own in rows
            ],
        )

    key = {
        "arms": [arm.samples[0] for arm in arms],
        "rounds": rounds,
        "batch_1": batch_1,
        "predict": predict,
        "environment": environment() | {"host": platform.node()},
    }
    folder = experiment.store.get("time", version=3, key=key, compute=compute)
    return read_json(folder / "times.json")


def _expected(arms: list[Arm]) -> list[float | None]:
    """Seconds of the latency model for each arm; None for all, with a warning that says why, where
    this machine gives no usable fit: that must not end a run whose samples are made."""
    try:
        return [
            seconds.predicted(arm.experiment, arm.config, arm.plan, len(arm.timesteps))
            for arm in arms
        ]
    except InputError as error:
        warnings.warn(f"evaluate.predict_ms: nothing is predicted, {error}", stacklevel=2)
        return [None] * len(arms)


def efficiency(arm: Arm, times: dict, base: dict) -> dict:
    """The part of an arm's row that is counted or measured; `base` are the times of arm 0."""
    experiment, plan = arm.experiment, arm.plan
    own = np.array(times["own"])
    evaluations = len(arm.timesteps) * experiment.halves
    sites, remainder = experiment.all_sites, experiment.remainder
    widths = (plan.w_bits, plan.a_bits) if plan else ({}, {})
    flags = zip(experiment.sites, experiment.asymmetric(arm.config), strict=True)
    macs = speed.macs_by_type(
        sites, remainder, plan.integer(sites) if plan else [], evaluations=evaluations
    )
    energy = energy_meter.Energy(**times["energy"])
    ceilings = {kind: speed.Ceiling(**found) for kind, found in times["ceilings"].items()}
    return {
        "arm": arm.name,
        "system": arm.system,
        "avg_w_bits": average_bits(plan, sites) if plan else 32.0,
        "bytes": arm.passed_bytes,
        "file_bytes": arm.file_bytes,
        "compression": sum(leaf.size * 4 for leaf in jax.tree.leaves(experiment.params))
        / arm.file_bytes,
        "bitops": bitops(sites, remainder, *widths, evaluations),
        "bitops_terms": speed.bitops_terms(
            sites,
            remainder,
            *widths,
            asymmetric=[site.path for site, flag in flags if flag],
            evaluations=evaluations,
        ),
        "steps": len(arm.timesteps),
        "ms_per_image": _milliseconds(own, arm.batch),
        "predicted_ms": times["predicted"] and 1e3 * times["predicted"],
        # The model's seconds are of the minute in which they were measured: their ratio lasts.
        "predicted_speedup": times["predicted"] and base["predicted"] / times["predicted"],
        "ms_per_image_batch_1": _milliseconds(times["single"], 1),
        # Medians of ratios within a round: a drift of the machine's speed cancels.
        "speedup": float(np.median(np.array(base["own"]) / own)),
        "speedup_same_steps": float(np.median(np.array(times["float_same_steps"]) / own)),
        "fraction_of_peak": speed.fraction_of_peak(macs, 1e-3 * float(np.median(own)), ceilings),
        "peak_bytes": arm.execution.peak_bytes,
        "resident_bytes": arm.execution.resident_bytes,
        "energy_j": energy.joules,
        "energy_label": energy.label,
        "energy_source": energy.source,
        "execution": "integer" if plan else "float",
        "backend": arm.backend,
    }


def _milliseconds(taken, batch: int) -> dict | None:
    """Median and interquartile range of milliseconds per image; None where not measured."""
    if taken is None:
        return None
    low, median, high = np.percentile(taken, [25, 50, 75])
    return {
        "median": float(median), "iqr": float(high - low), "n": len(taken), "batch": batch,
    }  # fmt: skip


def used_energy(arm: Arm) -> energy_meter.Energy:
    """Joules per image: the devices' counter where they have one, else the documented model."""
    plan, experiment = arm.plan, arm.experiment
    return energy_meter.joules_per_image(
        lambda: arm.run_batch(0),
        images=arm.batch,
        modelled=energy_meter.modelled_joules(
            experiment.all_sites,
            experiment.remainder,
            plan.w_bits if plan else {},
            plan.a_bits if plan else {},
            evaluations=len(arm.timesteps) * experiment.halves,
            batch=arm.batch,
        ),
        counter=energy_meter.find_counter(),
    )


def assemble(arms: list[Arm], times: list[dict], rows: list[dict], described: dict) -> dict:
    """The results object: `times` as `timed` gives them, `rows` and the protocol as
    `fidelity.metrics`."""
    config = arms[0].config
    return {
        "schema": SCHEMA,
        "protocol": described | {"publish": bool(config.publish), "name": config.name},
        "arms": [
            {
                **efficiency(arm, taken, times[0]),
                **{name: row.get(name) for name in METRICS},
                **{name: value for name, value in row.items() if name not in METRICS},
                "n_images": arm.count,
                "health": fidelity.clipped(arm),
                "seed": config.sample.seed,
            }
            for arm, taken, row in zip(arms, times, rows, strict=True)
        ],
    }


def table(results: dict) -> str:
    """The arms as lines of text, and what their words mean: what `mpqdiff run` prints."""
    protocol = results["protocol"]
    distance = "FID" if protocol.get("is_fid") else "Frechet"
    columns = (
        ("arm", 12, lambda a: a["arm"]),
        ("w bits", 7, lambda a: f"{a['avg_w_bits']:.2f}"),
        ("bytes", 10, lambda a: f"{a['bytes']:,}"),
        ("smaller", 8, lambda a: f"{a['compression']:.2f}x"),
        ("ms/image", 9, lambda a: f"{a['ms_per_image']['median']:.2f}"),
        ("speed-up", 9, lambda a: f"{a['speedup']:.2f}x"),
        ("x0 MSE", 10, lambda a: _number(a["x0_mse"], ".2e")),
        ("vs plan", 7, lambda a: a.get("against_plan", {}).get("x0_mse", "-")),
        ("PSNR dB", 8, lambda a: _number(a["psnr"], ".2f")),
        ("KID", 9, lambda a: _number(a["kid"], ".3g")),
        (distance, 8, lambda a: _number(a["fid"], ".2f")),
        ("damage", 7, lambda a: _number(a["damage"], ".3f")),
        ("runs in", 8, lambda a: a["execution"]),
    )
    lines = ["  ".join(f"{name:>{width}}" for name, width, _ in columns)]
    for arm in results["arms"]:
        lines.append("  ".join(f"{show(arm):>{width}}" for _, width, show in columns))
    if any(arm.get("against_plan", {}).get("x0_mse") for arm in results["arms"]):
        lines.append("vs plan: x0 MSE, by the paired test at 95 %; inside the noise it is a tie")
    if protocol.get("fid_name", "FID") != "FID":
        lines.append(f"Frechet: {protocol['fid_name']}")
    if protocol.get("indicative"):
        lines.append(
            f"{distance} and damage are indicative only: fewer than {INDICATIVE_BELOW} images"
        )
    return "\n".join(lines)


def _number(value, form: str) -> str:
    return "-" if value is None else format(value, form)
