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
    name = config.timesteps.name
    recorded, evidence = _evidence(experiment, config, plan)

    def compute(folder):
        taken = timesteps.arguments(name)
        given = {key: config.timesteps[key] for key in config.timesteps if key in taken}
        given |= evidence
        if name == "drift":
            follow = _follow(experiment, config, plan) if config.timesteps.every else None
            given["remeasure"] = follow and (lambda left: follow(timesteps=left))
            given["every"] = config.timesteps.every or 1
        else:
            given["gram"] = experiment.eps_gram
        kept = timesteps.select(experiment.abar, count, name, **given)
        save_arrays(folder / "steps.npz", {"timesteps": kept})

    key = {"evidence": recorded, "count": count, "timesteps": config.timesteps.to_dict()}
    folder = experiment.store.get("steps", version=VERSIONS["steps"], key=key, compute=compute)
    return load_arrays(folder / "steps.npz")["timesteps"]


def _evidence(experiment: Experiment, config: Config, plan: Plan) -> tuple[str, dict]:
    """(artifact name, what the selector takes of the student), for any number of steps."""
    drifts, c = config.timesteps.name == "drift", config

    def compute(folder):
        follow = _follow(experiment, config, plan)
        if drifts:
            save_arrays(folder / "student.npz", {"drift": follow()})
        else:
            found = follow(memory_gb=c.calibration.memory_gb, chunks=chunked(folder, "student"))
            save_arrays(folder / "student.npz", found._asdict())

    key = {
        "model": experiment.model_hash,
        "conditions": experiment.conditions_hash,
        "record": experiment.statistics[0].name,
        "widths": [plan.w_bits, plan.a_bits],
        "quantize": c.quantize.to_dict(),
        "diffusion": {k: v for k, v in c.diffusion.to_dict().items() if k != "num_steps"},
        "samples": c.timesteps.samples,
        "memory_gb": c.calibration.memory_gb,
        "seed": c.seed,
        "reading": c.timesteps.drift if drifts else "edges",
    }
    folder = experiment.store.get("student", version=VERSIONS["student"], key=key, compute=compute)
    found = load_arrays(folder / "student.npz")
    return folder.name, found if drifts else {"student": StudentGram(**found)}


def _follow(experiment: Experiment, config: Config, plan: Plan):
    """A function of further keywords that follows teacher and student over the schedule."""
    built = model(experiment, config, plan)
    noise, cond, _ = experiment.inputs(config.seed, 0, config.timesteps.samples)
    both = (
        experiment.predicted(experiment.denoise), experiment.params,
        experiment.predicted(built.denoise), built.params, noise, cond,
    )  # fmt: skip
    common = {"alphas_cumprod": experiment.abar, "clip": config.diffusion.clip}
    if config.timesteps.name == "drift":
        reading = config.timesteps.drift
        return partial(timesteps.drift.measure, *both, reading=reading, **common)
    return partial(timesteps.gram.record_student, *both, **common)
