"""From arms to files: `plan.json`, `results.json`, `report.html`, `samples/`, `manifest.json`."""

import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mpqdiff import fidelity, joint, report, results, scoring
from mpqdiff import images as pictures
from mpqdiff import plan as plans
from mpqdiff.arms import Arm, list_arms
from mpqdiff.artifacts import digest, read_json, write_json
from mpqdiff.decisions import explained
from mpqdiff.pipeline import Experiment
from mpqdiff.plan import Plan
from mpqdiff.report import steps


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


def run(experiment: Experiment, *, command: str) -> dict:
    """All stages and all files of the workdir; returns the results object."""
    workdir, clock = experiment.store.workdir, Clock()
    config = experiment.config
    arms = stages(experiment, clock)
    write_json(workdir / "config.json", config.to_dict())  # a refused budget leaves the old one
    plans.save(planned(arms[1]), workdir / "plan.json")
    for arm in tqdm(arms, desc="compile"):
        arm.verify()
        _ = arm.execution
    clock.lap("compile and verify")
    for arm in arms:
        _ = arm.samples
    save_samples(arms, workdir / "samples", config.report.num_images)
    clock.lap("sample")
    times = results.timed(arms)
    clock.lap("time")
    rows, described = fidelity.metrics(arms) if config.publish else ([{}] * len(arms), {})
    clock.lap("evaluate")
    found = results.assemble(arms, times, rows, described)
    write_json(workdir / "results.json", found)
    write_report(experiment, arms, found, clock, command)
    clock.lap("report")
    write_manifest(experiment, arms, clock, command)
    return found


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


def save_samples(arms: list[Arm], folder: Path, count: int) -> None:
    """One PNG strip per arm, the same seeds in each."""
    folder.mkdir(parents=True, exist_ok=True)
    for arm in arms:
        pictures.save_grid(folder / f"{arm.name}.png", shown(arm, count))


def shown(arm: Arm, count: int) -> np.ndarray:
    """The first `count` images, uint8 [count,H,W,1 or 3]; latents that nothing decodes as grey."""
    images = arm.images[:count]
    return images if images.shape[-1] in (1, 3) else images.mean(-1, keepdims=True).astype("uint8")


def write_report(experiment, arms, found, clock: Clock, command: str) -> None:
    """`report.html` from what the stages found."""
    config = experiment.config
    scores = scoring.scores(experiment, config)[1]
    value = np.asarray(scores.value)
    value = value.mean(axis=-1) if value.ndim == 3 else value
    if scores.kind == "redundancy":  # shown so that more is more important, for every score
        value = 1.0 - value
    timesteps = np.asarray(experiment.statistics[1].timesteps)
    matrix = None if scores.matrix is None else np.asarray(scores.matrix).mean(axis=0)
    time_only = np.asarray(experiment.statistics[1].time_only)
    paths = [site.path for site in experiment.sites]
    workdir = experiment.store.workdir
    front = workdir / "pareto.json"
    data = report.ReportData(
        results=found,
        plan=plans.to_json(planned(arms[1])),
        sites=[
            site_row(site, paths, time_only) | _stored(site, paths, experiment.asymmetric(config))
            for site in experiment.all_sites
        ],
        remainder=[{"name": entry.name, "macs": entry.macs} for entry in experiment.remainder],
        timesteps=timesteps,
        importance=np.broadcast_to(value, (len(timesteps), value.shape[1])),
        score_name=f"1 - {scores.name}" if scores.kind == "redundancy" else scores.name,
        matrix=matrix,
        site_paths=paths,
        images={arm.name: shown(arm, config.report.num_images) for arm in arms},
        environment=results.environment(),
        command=command,
        stages=clock.stages,
        arm="plan",
        plans={arm.name: plans.to_json(arm.plan) for arm in arms if arm.plan},
        explain=None if config.plan.bits else explained(experiment),
        pareto=read_json(front) if front.exists() else None,
        signals=signals(experiment),
        ranges=ranges(experiment, planned(arms[1])),
        joint=read_json(workdir / "joint.json") if joint.record(experiment) else None,
    )
    report.write(workdir / "report.html", data)


def signals(experiment: Experiment) -> dict | None:
    """The signals of a manifold score; None for other scores, and where nothing is decided."""
    config = experiment.config
    if config.score.name != "manifold":
        return None
    _, legal = scoring.every_choice(experiment, config)
    if not (legal.sum(axis=1) > 1).any():
        return None
    return scoring.manifold_signals(experiment, config)


def ranges(experiment: Experiment, plan: Plan) -> dict | None:
    """`steps.varying` of the config's plan, under its mode and under one scale for all steps."""
    config = experiment.config
    fixed = config.copy_and_resolve_references()
    fixed.quantize.mode = "static"
    return steps.varying(
        experiment.statistics[1],
        experiment.sites,
        plan.a_bits,
        mode=plan.mode,
        static=experiment.table(fixed, plan.a_bits),
        own=experiment.table(config, plan.a_bits),
    )


def _stored(site, planned: list[str], asymmetric: list[bool]) -> dict:
    """What a site stores beside its weights: biases, and column sums where asymmetric."""
    flag = site.path in planned and asymmetric[planned.index(site.path)]
    return {"bias": site.bias, "asymmetric": bool(flag)}


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
        "parameters": site.stored,
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
            "environment": results.environment(),
            "source": source_digest(),
            "model_hash": experiment.model_hash,
            "plans": {arm.name: arm.plan.hash for arm in arms if arm.plan},
            "artifacts": experiment.store.log,
            "stages": clock.stages,
        },
    )


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
    stored = experiment.store.workdir / "results.json"
    manifest = experiment.store.workdir / "manifest.json"
    recorded = None
    # Results of another plan, since edited or solved again, say nothing about this one.
    own = planned(arm).hash
    if stored.exists() and (
        not manifest.exists() or read_json(manifest)["plans"].get("plan") == own
    ):
        rows = {row["arm"]: row for row in read_json(stored)["arms"]}
        recorded = rows["plan"]["resident_bytes"]
    arm.verify(recorded)
    products = sum(len(found) for found in arm.execution.products.values())
    return (
        f"verified: {len(arm.execution.products)} sites run {products} integer products, "
        f"{arm.passed_bytes:,} bytes passed as planned, {arm.file_bytes:,} in the file, "
        f"{arm.execution.resident_bytes:,} resident "
        f"{arm.execution.carry}"
    )
