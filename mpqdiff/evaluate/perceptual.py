"""Perceptual distance in the feature network: LPIPS's form without its learned weights.

Every layer's activations are scaled to unit length over channels at each position; the squared
difference is summed over channels, averaged over positions and summed over layers (Zhang et al.
2018, eq. 1, with w = 1). It is not LPIPS: the network is ours and nothing was fitted to human
judgements, so its values compare with one another in one feature space only. In a row it is taken
on the final features, one position of D channels: 2 (1 - cosine), from 0 to 4.
"""

from collections.abc import Sequence

import numpy as np

from mpqdiff.errors import InputError

_CHUNK = 256  # images held in float64 at a time


def distances(layers: Sequence, float_layers: Sequence) -> np.ndarray:
    """Distance of each image to the float model's of the same seed, [n] float64, 0 where equal.

    `layers` and `float_layers` hold the same layers' activations, each [n,D] or [n,...,channels].
    Raises InputError on no layer, layers of different shape, or values that are not finite.
    """
    if not layers or len(layers) != len(float_layers):
        raise InputError(
            f"got {len(layers)} and {len(float_layers)} layers, expected the same ones, at least 1"
        )
    return np.sum([_layer(*pair) for pair in zip(layers, float_layers, strict=True)], axis=0)


def _layer(a, b) -> np.ndarray:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim < 2:
        raise InputError(
            f"got activations of shape {a.shape} and {b.shape}, expected equal [n,...,channels]: "
            "pass the images of the seeds that both arms have"
        )
    parts = []
    for start in range(0, len(a), _CHUNK):
        difference = _unit(a[start : start + _CHUNK]) - _unit(b[start : start + _CHUNK])
        squared = np.sum(difference**2, axis=-1)
        parts.append(squared.reshape(len(squared), -1).mean(axis=1))
    values = np.concatenate(parts) if parts else np.zeros(0)
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise InputError(f"activations of {bad} of {len(a)} images have NaN or infinite values")
    return values


def _unit(x) -> np.ndarray:
    """`x` of length 1 over its last axis; an all-zero vector stays zero."""
    x = x.astype(np.float64)
    length = np.sqrt(np.sum(x * x, axis=-1, keepdims=True))
    return x / np.where(length > 0, length, 1.0)
