"""Which steps a plan runs, where its own student is asked: the integer model of its very widths.

    plan's widths -> student -> what it adds to each step of the teacher's trajectory -> steps

DiffPro (arXiv 2511.11446, Algorithm 2) prunes the schedule by teacher-student drift. `drift_edges`
and `shortest_path` with `timesteps.by_student` take the drift that a removal really adds, in closed
form (`timesteps.edges`); `drift` a number for each step (`timesteps.drift`). The first depend on
the widths alone, so that any number of steps is read off one record.
"""

from functools import partial

import numpy as np

from mpqdiff import seconds, timesteps
from mpqdiff.artifacts import chunked, load_arrays, save_arrays
from mpqdiff.config import Config
from mpqdiff.pipeline import VERSIONS, Experiment
from mpqdiff.plan import Plan
from mpqdiff.quantize.apply import QuantizedModel, build, quantize
from mpqdiff.timesteps.gram import StudentGram


def model(experiment: Experiment, config: Config, plan: Plan) -> QuantizedModel:
    """The integer model of `plan`, on the device."""
    table = experiment.table(config, plan.a_bits)
    flags = experiment.asymmetric(config)
    tensors = quantize(
        experiment.params, experiment.sites, plan, table, flags, clip=config.quantize.clip
    )
    return build(
        experiment.denoise,
        experiment.params,
        experiment.sites,
        plan,
        tensors,
        table,
        backend=seconds.backends(experiment, config, plan),
    )


def steps(experiment: Experiment, config: Config, plan: Plan, count: int) -> np.ndarray:
    """`count` timesteps int32 [S] of the whole schedule, selected by the student of `plan`, cached.

    InputError as the selector raises it, and where the student's eps is not finite.
    """
    name, chosen = config.timesteps.name, config.timesteps
    recorded, evidence = (_drift if name == "drift" else _edges)(experiment, config, plan)

    def compute(folder):
        taken = timesteps.arguments(name)
        given = {key: chosen[key] for key in chosen if key in taken} | evidence
        if name == "drift":
            follow = _drift_of(experiment, config, plan) if chosen.every else None
            given["remeasure"] = follow and (lambda left: follow(timesteps=left))
            given["every"] = chosen.every or 1
        else:
            given["gram"] = experiment.eps_gram
        kept = timesteps.select(experiment.abar, count, name, **given)
        save_arrays(folder / "steps.npz", {"timesteps": kept})

    key = {
        "evidence": recorded,
        "gram": VERSIONS["gram"],
        "count": count,
        "timesteps": chosen.to_dict(),
    }
    folder = experiment.store.get("steps", version=VERSIONS["steps"], key=key, compute=compute)
    return load_arrays(folder / "steps.npz")["timesteps"]


def _edges(experiment: Experiment, config: Config, plan: Plan) -> tuple[str, dict]:
    """(artifact name, {"student"}): what the student adds to the edges of `experiment.eps_gram`, on
    the same samples."""

    def compute(folder):
        found = timesteps.gram.record_student(
            *_pair(experiment, config, plan),
            alphas_cumprod=experiment.abar,
            clip=config.diffusion.clip,
            memory_gb=config.calibration.memory_gb,
            chunks=chunked(folder, "student"),
        )
        save_arrays(folder / "student.npz", found._asdict())

    key = _key(experiment, config, plan) | {"memory_gb": config.calibration.memory_gb}
    folder = experiment.store.get("student", version=VERSIONS["student"], key=key, compute=compute)
    return folder.name, {"student": StudentGram(**load_arrays(folder / "student.npz"))}


def _drift(experiment: Experiment, config: Config, plan: Plan) -> tuple[str, dict]:
    """(artifact name, {"drift"}) of a student that runs the whole schedule."""

    def compute(folder):
        save_arrays(folder / "drift.npz", {"drift": _drift_of(experiment, config, plan)()})

    key = _key(experiment, config, plan) | {"reading": config.timesteps.drift}
    folder = experiment.store.get("drift", version=VERSIONS["drift"], key=key, compute=compute)
    return folder.name, load_arrays(folder / "drift.npz")


def _drift_of(experiment: Experiment, config: Config, plan: Plan):
    """`timesteps.drift.measure` of further keywords."""
    return partial(
        timesteps.drift.measure,
        *_pair(experiment, config, plan),
        alphas_cumprod=experiment.abar,
        reading=config.timesteps.drift,
        clip=config.diffusion.clip,
    )


def _pair(experiment: Experiment, config: Config, plan: Plan) -> tuple:
    """Teacher, its params, student, its params, and the noise and conditions that both begin with:
    those of `experiment.eps_gram`, whatever the arm's own seed."""
    built, base = model(experiment, config, plan), experiment.config
    noise, cond, _ = experiment.inputs(base.seed, 0, base.timesteps.samples)
    teacher, other = (experiment.predicted(each) for each in (experiment.denoise, built.denoise))
    return teacher, experiment.params, other, built.params, noise, cond


def _key(experiment: Experiment, config: Config, plan: Plan) -> dict:
    diffusion, base = config.diffusion.to_dict(), experiment.config
    return {
        "model": experiment.model_hash,
        "conditions": experiment.conditions_hash,
        "record": experiment.statistics[0].name,
        "widths": [plan.w_bits, plan.a_bits],
        "quantize": config.quantize.to_dict(),
        "diffusion": {key: diffusion[key] for key in diffusion if key != "num_steps"},
        "samples": base.timesteps.samples,
        "seed": base.seed,
    }
