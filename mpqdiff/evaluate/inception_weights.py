"""The weights of FID's Inception-v3, from the usual public file, given by path.

The file (`pt_inception-2015-12-05-6726825d.pth` of pytorch-fid,
`weights-inception-2015-12-05-6726825d.pth` of torch-fidelity: one sha256) is a PyTorch state
dict. Reading it takes torch; `convert` writes it as safetensors, which takes none. Nothing is
downloaded. Only that file, known by its sha256, gives a distance the name FID.
"""

import hashlib
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mpqdiff.artifacts import write_atomically
from mpqdiff.errors import InputError
from mpqdiff.evaluate.inception import SIZE, Inception

FID_SHA256 = "6726825d"  # how the sha256 of the public file begins, as its name says
SOURCE, CONTENT = "source_sha256", "tensors_sha256"  # metadata of a converted file
UNUSED = ".bn.num_batches_tracked"  # counts of training steps, one a convolution
LISTED = 6  # names in a message; more are counted

_TORCH_NAMES = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "variance": "bn.running_var",
}
_CONVERT = (
    "convert it once where torch is installed, with mpqdiff.evaluate.inception_weights.convert"
)


class Weights(NamedTuple):
    """Parameters of `Inception`, and where they come from."""

    params: dict
    hash: str  # sha256 of the file, of its source where it was converted
    is_fid: bool  # the public file's


def read(path: Path | str) -> Weights:
    """The weights in `path`: a PyTorch state dict, or safetensors of the same names.

    Raises InputError where the file cannot be read, a converted one was changed since, or a
    tensor is missing, unexpected, of another shape or not finite.
    """
    path = Path(path)
    state, digest = _state(path)
    return Weights(parameters(state, str(path)), digest, digest.startswith(FID_SHA256))


def convert(path: Path | str, out: Path | str | None = None) -> Path:
    """Write the state dict in `path` as safetensors, by default next to it; returns the path.

    Names and layouts stay; the metadata holds the sha256 of `path` and of the tensors, by which
    `read` knows the original and notices a change. InputError as `read`.
    """
    path = Path(path)
    out = path.with_suffix(".safetensors") if out is None else Path(out)
    if out.resolve() == path.resolve():
        raise InputError(f"{path} is both source and destination: give another out")
    state, digest = _state(path)
    parameters(state, str(path))
    kept = {name: np.ascontiguousarray(state[name]) for name in torch_shapes()}
    write_atomically(out, save(kept, metadata={SOURCE: digest, CONTENT: _content(kept)}))
    return out


def torch_shapes() -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that is used, by its name in the state dict (`UNUSED` besides)."""
    return {_torch_name(key): _to_torch(shape) for key, shape in _module_shapes().items()}


def parameters(state: Mapping[str, np.ndarray], where: str) -> dict:
    """`Inception`'s parameters, float32, from a state dict; each key is used or is `UNUSED`.

    Raises InputError, with `where`, on names and shapes that differ and on values that are not
    finite or, of variances, negative.
    """
    expected = torch_shapes()
    counters = {name.removesuffix(".conv.weight") + UNUSED for name in expected}
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys() - counters),
        "of another shape": [
            f"{name} {np.shape(state[name])} for {shape}"
            for name, shape in expected.items()
            if name in state and np.shape(state[name]) != shape
        ],
    }
    if not any(problems.values()):
        problems["not finite, or a negative variance"] = [
            name for name in expected if _spoilt(name, state[name])
        ]
    found = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
    if found:
        raise InputError(
            f"weights {where}: {found}. Expected the state dict of FID's Inception-v3, "
            f"{len(expected)} tensors; torchvision's own inception_v3 is another network"
        )
    return unflatten_dict(
        {
            key: jnp.asarray(_from_torch(np.asarray(state[_torch_name(key)], np.float32)))
            for key in _module_shapes()
        }
    )


@cache
def _module_shapes() -> dict[tuple[str, ...], tuple[int, ...]]:
    pixels = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    variables: Any = jax.eval_shape(Inception().init, jax.random.key(0), pixels)
    shapes = jax.tree.map(lambda leaf: leaf.shape, variables["params"])
    return cast(Any, flatten_dict(shapes))


def _torch_name(key: tuple[str, ...]) -> str:
    leaf = {"kernel": "weight", "bias": "bias"} if key[0] == "fc" else _TORCH_NAMES
    return ".".join((*key[:-1], leaf[key[-1]]))


def _to_torch(shape: tuple[int, ...]) -> tuple[int, ...]:
    """HWIO -> OIHW, and [in, out] -> [out, in]."""
    return (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _from_torch(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _spoilt(name: str, array: np.ndarray) -> bool:
    return not np.isfinite(array).all() or (name.endswith("running_var") and np.min(array) < 0)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _state(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """(state dict as numpy, sha256 of the file that it is from)."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"weights {path}: cannot be read ({error}); give an existing file"
        ) from error
    if path.suffix == ".safetensors":
        return _converted(path, digest)
    return _state_dict(path), digest


def _converted(path: Path, digest: str) -> tuple[dict[str, np.ndarray], str]:
    try:
        with safe_open(path, framework="numpy") as stored:
            metadata = stored.metadata() or {}
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        raise InputError(f"weights {path}: not complete safetensors ({error})") from error
    if SOURCE in metadata and metadata.get(CONTENT) != _content(state):
        raise InputError(
            f"weights {path}: its tensors are not those it was converted with: convert the "
            "original file again"
        )
    return state, metadata.get(SOURCE, digest)


def _state_dict(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"weights {path}: reading a PyTorch file takes torch, which is not installed; install "
            f"it, or {_CONVERT}"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own, on old formats
            state = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): tensor.detach().float().numpy() for name, tensor in state.items()}
    except Exception as error:  # an unpickler of foreign bytes may raise anything
        raise InputError(
            f"weights {path}: not a PyTorch state dict that loads with weights_only=True "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); give "
            "the public file, or safetensors converted from it"
        ) from error


def _content(state: Mapping[str, np.ndarray]) -> str:
    """sha256 over names, types, shapes and bytes of the tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.data)
    return digest.hexdigest()
