"""Statistics of features as files, and what FID and sFID are measured against.

Files are the usual `.npz` of FID tools: `mu` [D] and `sigma` [D,D], divided by n - 1. The streaming
moments that they hold are `mpqdiff.moments`.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpqdiff.artifacts import save_arrays
from mpqdiff.errors import InputError
from mpqdiff.moments import CHUNK, Moments, allreduce, empty, finite_features, moments

__all__ = [
    "CHUNK",
    "Moments",
    "Reference",
    "allreduce",
    "check_gaussian",
    "empty",
    "finite_features",
    "load",
    "moments",
    "save",
]

_UNREADABLE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


class Reference(NamedTuple):
    """Statistics read from a file: what FID and, with `spatial_*`, sFID are measured against.

    `num_train` is None where the file does not say it; there are no features, so that metrics
    which need them (KID, precision, recall) are None against it.
    """

    train_mean: np.ndarray  # float64 [D]
    train_cov: np.ndarray  # float64 [D,D]
    num_train: int | None = None
    spatial_mean: np.ndarray | None = None  # float64 [S]
    spatial_cov: np.ndarray | None = None
    train_features: Any = None
    test_features: Any = None


def save(path, features: Moments, *, spatial: Moments | None = None) -> None:
    """Write `mu` and `sigma` of `features` to the .npz `path`, whole or not at all.

    `spatial` adds `mu_s` and `sigma_s`, the names of guided-diffusion's reference files. `count`
    is an entry of ours; other tools ignore it. Raises InputError below 2 rows.
    """
    arrays = {"mu": features.mean, "sigma": features.cov, "count": np.int64(features.count)}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.cov}
    save_arrays(Path(path), arrays)


def load(path, *, dimensions: int | None = None, network: Any = None) -> Reference:
    """Statistics in the .npz `path`, ours or another FID tool's; `dimensions` is the D expected.

    Raises InputError on a file that is missing, cut short or without `mu` and `sigma`, on shapes
    that do not fit, NaN, an asymmetric covariance, another D, or where the file tells the hash of
    the feature network and it is not that of `network`.
    """
    try:
        # Opened here: on a damaged file, np.load would leave it open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            names = [name for name in ("mu", "sigma", "mu_s", "sigma_s") if name in stored.files]
            arrays = {name: np.asarray(stored[name], np.float64) for name in names}
            count = int(stored["count"]) if "count" in stored.files else None
            made = str(stored["network"]) if "network" in stored.files else None
            mean, cov = arrays["mu"], arrays["sigma"]
    except _UNREADABLE as error:
        raise InputError(
            f"{path}: not a complete .npz with mu [D] and sigma [D,D]: {error}; expected the "
            "statistics file of an FID tool"
        ) from error
    if network is not None and made not in (None, network.hash):
        raise InputError(
            f"{path}: statistics of features of hash {str(made)[:16]}, the network at hand is "
            f"{network.name} of hash {network.hash[:16]}: make them again with this one"
        )
    spatial = arrays.get("mu_s"), arrays.get("sigma_s")
    check_gaussian(mean, cov, f"{path}: mu and sigma")
    if spatial[0] is not None and spatial[1] is not None:
        check_gaussian(*spatial, f"{path}: mu_s and sigma_s")
    if dimensions is not None and mean.size != dimensions:
        raise InputError(
            f"{path}: statistics of {mean.size} dimensions, the features have {dimensions}: it was "
            "made with another feature network; use one made with the network at hand"
        )
    return Reference(mean, cov, count, *spatial)


def check_gaussian(mean, cov, name: str) -> None:
    """InputError unless `mean` is [D] and `cov` a symmetric [D,D], both finite."""
    if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
        raise InputError(f"{name}: got shapes {mean.shape} and {cov.shape}, expected [D] and [D,D]")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise InputError(f"{name}: NaN or infinite entries: check the features")
    if not np.allclose(cov, cov.T, rtol=1e-5, atol=1e-6 * np.abs(cov).max(initial=0.0)):
        raise InputError(f"{name}: not symmetric: expected a covariance")
