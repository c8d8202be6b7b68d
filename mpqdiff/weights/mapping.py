"""Filling a model's parameters from another code base's state dict, with every key accounted for.

A converter lists entries: which parameter comes from which source keys, and how. `match` checks
that every source key is used or named as left out and that every parameter is filled, `make` that
shapes agree and values are finite; whatever is missing, unexpected or wrongly shaped is named.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from mpqdiff.errors import InputError

SHOWN = 8  # names listed in an error, of each kind


class Entry(NamedTuple):
    """One parameter: `target` is its path ("block_0/attn/qkv/kernel"), `sources` the keys that it
    is made of, `make(*arrays)` how (None: one source, taken as it is)."""

    target: str
    sources: tuple[str, ...]
    make: Callable[..., np.ndarray] | None = None


class Coverage(NamedTuple):
    """What became of the source's keys: how many filled parameters, and which were left out."""

    used: int
    left_out: tuple[str, ...]

    def line(self) -> str:
        """For people."""
        rest = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self.used} source tensors used, {len(self.left_out)} left out{rest}"


def dense(weight) -> np.ndarray:
    """torch's Linear weight [out, in] as a Dense kernel [in, out]."""
    return np.asarray(weight).T


def conv(weight) -> np.ndarray:
    """torch's Conv2d weight [out, in, h, w] as a Conv kernel [h, w, in, out]."""
    return np.asarray(weight).transpose(2, 3, 1, 0)


def fill(
    state: Mapping[str, np.ndarray],
    entries: Iterable[Entry],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    ignored: Iterable[str] = (),
) -> tuple[dict[str, np.ndarray], Coverage]:
    """({path: float32 array}, coverage): `match`, then all that `make` gives."""
    entries = list(entries)
    coverage = match(state, entries, shapes, ignored=ignored)
    return dict(make(state, entries, shapes)), coverage


def match(
    state: Collection[str],
    entries: Sequence[Entry],
    targets: Collection[str],
    *,
    ignored: Iterable[str] = (),
) -> Coverage:
    """What becomes of the keys of `state`; no tensor is read.

    `targets` are the paths of the model's parameters, `ignored` patterns (fnmatch) of keys that it
    has no use for. Raises InputError naming the source keys that are missing or unexpected, and the
    parameters left unfilled.
    """
    patterns = tuple(ignored)
    wanted = {key for entry in entries for key in entry.sources}
    missing = sorted(wanted - set(state))
    unused = sorted(set(state) - wanted)
    left_out = tuple(k for k in unused if any(fnmatchcase(k, pattern) for pattern in patterns))
    unexpected = sorted(set(unused) - set(left_out))
    filled = {entry.target for entry in entries}
    unfilled = sorted(set(targets) - filled)
    unknown = sorted(filled - set(targets))
    problems = {
        "keys missing from the source": missing,
        "unexpected source keys": unexpected,
        "parameters that nothing fills": unfilled,
        "parameters that the model lacks": unknown,
    }
    _refuse({what: names for what, names in problems.items() if names})
    return Coverage(len(wanted), left_out)


def make(
    state: Mapping[str, np.ndarray],
    entries: Iterable[Entry],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, np.ndarray]]:
    """(path, float32 array) of one parameter after the other; `state` may be lazy, and each key is
    read when its parameter is made.

    Raises InputError on values that are not finite, and at the end naming the shapes that differ
    from `shapes` (by path), which are not given out.
    """
    wrong = []
    for entry in entries:
        arrays = [np.asarray(state[key], np.float32) for key in entry.sources]
        value = entry.make(*arrays) if entry.make else arrays[0]
        if value.shape != tuple(shapes[entry.target]):
            wrong.append(
                f"{entry.target} from {', '.join(entry.sources)}: {value.shape}, expected "
                f"{tuple(shapes[entry.target])}"
            )
            continue
        if not np.isfinite(value).all():
            raise InputError(
                f"{', '.join(entry.sources)}: values that are NaN or infinite; the file is "
                "damaged, or overflowed in half precision"
            )
        yield entry.target, value
    _refuse({"shapes that differ": wrong} if wrong else {})


def _refuse(problems: dict[str, list[str]]) -> None:
    if not problems:
        return
    texts = []
    for what, names in problems.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        texts.append(f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}")
    raise InputError(
        f"{'; '.join(texts)}. Is this the architecture that the file was trained with?"
    )
