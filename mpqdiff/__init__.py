"""mpqdiff: mixed-precision, timestep and token planning for diffusion models, run in integers.

Public names in the order of the pipeline; each is imported when first used, so that importing the
package is quick.

    models -> sites -> record -> sensitivity -> aggregate -> costs -> solve -> plan -> quantize
"""

import importlib

__version__ = "0.1.0"

# The stages are modules of the same name: `mpqdiff.record.record`, `mpqdiff.solve.solve`, ...
_STAGES = (
    "models",
    "sites",
    "record",
    "sensitivity",
    "aggregate",
    "costs",
    "solve",
    "timesteps",
    "plan",
    "quantize",
    "evaluate",
    "report",
)

# Other public names -> (module, attribute).
_NAMES = {
    "InputError": ("mpqdiff.errors", "InputError"),
    "Prediction": ("mpqdiff.denoiser", "Prediction"),
    "from_linen": ("mpqdiff.denoiser", "from_linen"),
    "from_flax": ("mpqdiff.program", "from_flax"),
    "load_weights": ("mpqdiff.weights", "load"),
    "list_sites": ("mpqdiff.sites", "list_sites"),
    "pin": ("mpqdiff.sites", "pin"),
    "observe": ("mpqdiff.intercept", "observe"),
    "rewrite": ("mpqdiff.intercept", "rewrite"),
    "SCORES": ("mpqdiff.sensitivity", "SCORES"),
    "SELECTORS": ("mpqdiff.timesteps", "SELECTORS"),
    "SOLVERS": ("mpqdiff.solve", "SOLVERS"),
    "Plan": ("mpqdiff.plan", "Plan"),
    "quantize_sites": ("mpqdiff.quantize.apply", "quantize"),
    "build": ("mpqdiff.quantize.apply", "build"),
    "Experiment": ("mpqdiff.pipeline", "Experiment"),
}

__all__ = ["__version__", *_STAGES, *_NAMES]


def __getattr__(name: str):
    if name in _NAMES:
        module, attribute = _NAMES[name]
        return getattr(importlib.import_module(module), attribute)
    if name in _STAGES:
        return importlib.import_module(f"mpqdiff.{name}")
    raise AttributeError(f"module 'mpqdiff' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
