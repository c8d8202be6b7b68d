"""From arms to files: `plan.json`, `results.json`, `report.html`, `samples/`, `manifest.json`."""

import platform
import time
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from mpqdiff import images as pictures
from mpqdiff import plan as plans
from mpqdiff import report
from mpqdiff.arms import Arm, list_arms, time_arms
from mpqdiff.artifacts import digest, load_arrays, read_json, save_arrays, write_json
from mpqdiff.costs.bitops import bitops
from mpqdiff.evaluate import evaluate, features, paired_numbers
from mpqdiff.evaluate.protocol import protocol
from mpqdiff.pipeline import VERSIONS, Experiment
from mpqdiff.plan import Plan, average_bits

SCHEMA = 1
METRICS = (
    "fid", "fid_ci", "delta_fid", "damage", "kid", "kid_ci", "sfid", "is", "precision", "recall",
    "psnr", "psnr_ci", "ssim", "x0_mse",
)  # fmt: skip
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "aqtp", "ml_collections", "safetensors")


class Clock:
    """Seconds by named stage, for the manifest and the report."""

    def __init__(self):
        self.stages: list[dict] = []
        self._since = time.perf_counter()

    def lap(self, name: str, *, cached: bool = False) -> None:
        """Close the stage `name` at this moment."""
        now = time.perf_counter()
        self.stages.append({"name": name, "seconds": round(now - self._since, 3), "cached": cached})
        self._since = now


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


def run(experiment: Experiment, *, command: str) -> dict:
    """All stages and all files of the workdir; returns the results object."""
    workdir, clock = experiment.store.workdir, Clock()
    config = experiment.config
    write_json(workdir / "config.json", config.to_dict())
    arms = stages(experiment, clock)
    plans.save(planned(arms[1]), workdir / "plan.json")
    for arm in tqdm(arms, desc="compile"):
        arm.verify()
        _ = arm.execution
    clock.lap("compile and verify")
    for arm in arms:
        _ = arm.samples
    save_samples(arms, workdir / "samples", config.report.num_images)
    clock.lap("sample")
    times = timed(arms)
    clock.lap("time")
    rows, described = metrics(arms) if config.publish else ([{}] * len(arms), {})
    clock.lap("evaluate")
    results = {
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
    write_json(workdir / "results.json", results)
    write_report(experiment, arms, results, clock, command)
    clock.lap("report")
    write_manifest(experiment, arms, clock, command)
    return results


def planned(arm: Arm) -> Plan:
    """The plan of an arm that has one."""
    assert arm.plan is not None, f"arm {arm.name!r} is a float arm"
    return arm.plan


def stages(experiment: Experiment, clock: Clock) -> list[Arm]:
    """Everything up to the plans, timed."""
    before = len(experiment.store.log)
    _ = experiment.calibration
    clock.lap("calibrate", cached=experiment.store.log[before]["cached"])
    before = len(experiment.store.log)
    _ = experiment.statistics
    clock.lap("record", cached=experiment.store.log[before]["cached"])
    arms = list_arms(experiment)
    clock.lap("score, solve and plan")
    return arms


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


def save_samples(arms: list[Arm], folder: Path, count: int) -> None:
    """One PNG strip per arm, the same seeds in each."""
    folder.mkdir(parents=True, exist_ok=True)
    for arm in arms:
        images = pictures.to_uint8(arm.samples[1][:count])
        pictures.save_grid(folder / f"{arm.name}.png", images)


def write_report(experiment, arms, results, clock: Clock, command: str) -> None:
    """`report.html` from what the stages found."""
    config = experiment.config
    scores = experiment.scores(config)
    value = np.asarray(scores.value)
    value = value.mean(axis=-1) if value.ndim == 3 else value
    if scores.kind == "redundancy":  # shown so that more is more important, for every score
        value = 1.0 - value
    timesteps = np.asarray(experiment.statistics[1].timesteps)
    matrix = None if scores.matrix is None else np.asarray(scores.matrix).mean(axis=0)
    time_only = np.asarray(experiment.statistics[1].time_only)
    paths = [site.path for site in experiment.sites]
    data = report.ReportData(
        results=results,
        plan=plans.to_json(planned(arms[1])),
        sites=[site_row(site, paths, time_only) for site in experiment.all_sites],
        remainder=[{"name": entry.name, "macs": entry.macs} for entry in experiment.remainder],
        timesteps=timesteps,
        importance=np.broadcast_to(value, (len(timesteps), value.shape[1])),
        score_name=f"1 - {scores.name}" if scores.kind == "redundancy" else scores.name,
        matrix=matrix,
        site_paths=paths,
        images={
            arm.name: pictures.to_uint8(arm.samples[1][: config.report.num_images]) for arm in arms
        },
        environment=environment(),
        command=command,
        stages=clock.stages,
        arm="plan",
        plans={arm.name: plans.to_json(arm.plan) for arm in arms if arm.plan},
    )
    report.write(experiment.store.workdir / "report.html", data)


def site_row(site, planned: list[str], time_only) -> dict:
    """A site as the report's and `--dry_run`'s tables show it."""
    reason = None
    if site.path not in planned:
        reason = (
            "looked up, never multiplied"
            if site.kind == "embedding"
            else "attention product; quantize.products=True runs it in integers"
        )
    index = planned.index(site.path) if reason is None else None
    return {
        "path": site.path,
        "kind": site.kind,
        "shape": list(site.shape),
        "parameters": site.parameters,
        "macs": site.macs,
        "pinned": site.pin,
        "time_only": None if index is None or time_only is None else bool(time_only[index]),
        "reason": reason,
    }


def source_digest() -> str:
    """The hash of the package's own source files."""
    root = Path(__file__).parent
    return digest(*(path.read_bytes() for path in sorted(root.rglob("*.py"))))


def write_manifest(experiment, arms, clock: Clock, command: str) -> None:
    """`manifest.json`: command, versions, hashes, times."""
    workdir = experiment.store.workdir
    previous = workdir / "manifest.json"
    runs = read_json(previous)["runs"] if previous.exists() else 0
    write_json(
        previous,
        {
            "schema": 1,
            "command": command,
            "runs": runs + 1,
            "environment": environment(),
            "source": source_digest(),
            "model_hash": experiment.model_hash,
            "plans": {arm.name: arm.plan.hash for arm in arms if arm.plan},
            "artifacts": experiment.store.log,
            "stages": clock.stages,
        },
    )


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


def plan_only(experiment: Experiment, *, command: str) -> str:
    """Stages up to `plan.json`; returns what to print."""
    workdir, clock = experiment.store.workdir, Clock()
    write_json(workdir / "config.json", experiment.config.to_dict())
    plan = experiment.plan(experiment.config, experiment.config.system)
    clock.lap("plan")
    plans.save(plan, workdir / "plan.json")
    width = max(map(len, plan.w_bits))
    lines = [f"{path:<{width}}  {bits or 'float'}" for path, bits in plan.w_bits.items()]
    lines.append(f"budget {plan.budgets}, predicted {plan.predicted}, gap {plan.gap:.3g}")
    return "\n".join([*lines, f"written: {workdir / 'plan.json'}"])


def planned_arm(experiment: Experiment) -> Arm:
    """The arm of `workdir/plan.json` as it stands, validated against the model and its sites."""
    plan = plans.load(experiment.store.workdir / "plan.json")
    plans.validate(plan, experiment.all_sites, experiment.model_hash)
    config = experiment.config.copy_and_resolve_references()
    config.quantize.mode = plan.mode
    return Arm(experiment, "plan", plan.system, config, plan)


def sample_only(experiment: Experiment) -> str:
    """Sample `workdir/plan.json`, whoever wrote it; returns what to print."""
    arm = planned_arm(experiment)
    folder = experiment.store.workdir / "samples"
    save_samples([arm], folder, experiment.config.report.num_images)
    return f"written: {folder / 'plan.png'}"


def verify_only(experiment: Experiment) -> str:
    """Compile `workdir/plan.json`'s sampler and check it; returns what to print.

    Raises VerificationError naming every site that does not run as planned.
    """
    arm = planned_arm(experiment)
    results = experiment.store.workdir / "results.json"
    recorded = None
    manifest = experiment.store.workdir / "manifest.json"
    if results.exists() and read_json(manifest)["plans"].get("plan") == planned(arm).hash:
        rows = {row["arm"]: row for row in read_json(results)["arms"]}
        recorded = rows["plan"]["resident_bytes"]
    arm.verify(recorded)
    products = sum(len(found) for found in arm.execution.products.values())
    return (
        f"verified: {len(arm.execution.products)} sites run {products} integer products, "
        f"{arm.passed_bytes:,} bytes passed as planned, {arm.file_bytes:,} in the file, "
        f"{arm.execution.resident_bytes:,} resident "
        f"{arm.execution.carry}"
    )
