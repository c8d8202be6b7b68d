"""mpqdiff: mixed-precision, timestep and token planning for diffusion models, run in integers.

Public names in the order of the pipeline; each is imported when first used, so that importing the
package is quick.

    models -> sites -> record -> sensitivity -> aggregate -> costs -> solve -> plan -> quantize
"""

import importlib

__version__ = "0.1.0"

# Public name -> (module, attribute). A module of the same name comes whole.
_NAMES = {
    "InputError": ("mpqdiff.errors", "InputError"),
    "Prediction": ("mpqdiff.denoiser", "Prediction"),
    "from_linen": ("mpqdiff.denoiser", "from_linen"),
    "load_weights": ("mpqdiff.weights", "load"),
    "list_sites": ("mpqdiff.sites", "list_sites"),
    "pin": ("mpqdiff.sites", "pin"),
    "observe": ("mpqdiff.intercept", "observe"),
    "rewrite": ("mpqdiff.intercept", "rewrite"),
    "record": ("mpqdiff.record", "record"),
    "SCORES": ("mpqdiff.sensitivity", "SCORES"),
    "aggregate": ("mpqdiff.aggregate", "aggregate"),
    "problem": ("mpqdiff.costs", "problem"),
    "SOLVERS": ("mpqdiff.solve", "SOLVERS"),
    "solve": ("mpqdiff.solve", "solve"),
    "Plan": ("mpqdiff.plan", "Plan"),
    "quantize": ("mpqdiff.quantize.apply", "quantize"),
    "build": ("mpqdiff.quantize.apply", "build"),
    "evaluate": ("mpqdiff.evaluate", "evaluate"),
    "Experiment": ("mpqdiff.pipeline", "Experiment"),
}

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str):
    if name in _NAMES:
        module, attribute = _NAMES[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'mpqdiff' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
