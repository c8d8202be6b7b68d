"""Model weights: safetensors files with a JSON description, and the embedded zoo."""

from mpqdiff.weights.store import ZOO, initialise, load, save

__all__ = ["ZOO", "initialise", "load", "save"]
