"""Which S of the F timesteps a sampler runs: selectors of one signature.

A selector takes (alphas_cumprod [F], num_steps) and what it needs by name, and returns int32 [S],
descending, for any sampler of `SAMPLERS`. `drift` needs the `drift` that `drift.measure` measures
between a student and its teacher, `drift_edges` and `shortest_path` the `gram` that
`gram.record_gram` takes from one trajectory of the teacher; with the `student` of
`gram.record_student` they select for that student. Both costs are about DDIM with eta 0: with DDPM,
DPM-Solver or eta > 0 the steps that they select are a heuristic.
"""

import inspect

import numpy as np

from mpqdiff.diffusion.steps import check_timesteps, log_snr_timesteps
from mpqdiff.errors import InputError, unknown_name
from mpqdiff.timesteps import drift, gram, prune, quadratic, shortest_path, uniform

__all__ = ["SELECTORS", "arguments", "drift", "gram", "select"]

SELECTORS = {
    "uniform": uniform.select,
    "quadratic": quadratic.select,
    "log_snr": log_snr_timesteps,
    "drift": prune.by_drift,
    "drift_edges": prune.by_edges,
    "shortest_path": shortest_path.select,
}


def arguments(name: str) -> dict[str, bool]:
    """The keyword arguments of selector `name`, each with whether it must be given."""
    if name not in SELECTORS:
        raise unknown_name("selection of timesteps", name, SELECTORS)
    taken = list(inspect.signature(SELECTORS[name]).parameters.values())[2:]
    return {each.name: each.default is inspect.Parameter.empty for each in taken}


def select(alphas_cumprod, num_steps: int, name: str = "uniform", **kwargs) -> np.ndarray:
    """The timesteps int32 [S] of selector `name`; kwargs as `arguments(name)` has them.

    Raises InputError on an unknown selector or argument, a missing one, and as the selector does.
    """
    known = arguments(name)
    missing = {each for each, needed in known.items() if needed} - kwargs.keys()
    if missing or kwargs.keys() - known.keys():
        raise InputError(f"selector {name!r} got arguments {sorted(kwargs)}, expected {known}")
    return check_timesteps(
        SELECTORS[name](alphas_cumprod, num_steps, **kwargs), len(alphas_cumprod)
    )
