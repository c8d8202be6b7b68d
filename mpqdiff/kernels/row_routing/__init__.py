"""Rows of each image taken out and put back: what routing tokens past a layer needs.

gather: y[b,j] = x[b, index[b,j]]. scatter: out = into, out[b, index[b,j]] = rows[b,j], or += with
`add`. Rows move as they are, bit for bit. With indices of no repeats, scatter(x, index,
gather(x, index)) is x.

An index outside [0, P) is refused where its value is known. Where it is traced, a gather takes the
nearest row, and a scatter leaves that row out. Negative indices are outside: none counts from the
end.
"""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mpqdiff.errors import InputError, unknown_name
from mpqdiff.kernels.row_routing import pallas_gpu, pallas_tpu, reference, xla

GATHER = {
    "reference": reference.gather_rows,
    "xla": xla.gather_rows,
    "pallas_tpu": pallas_tpu.gather_rows,
    "pallas_interpret": pallas_tpu.gather_interpreted,
    "pallas_gpu": pallas_gpu.gather_rows,
    "pallas_gpu_interpret": pallas_gpu.gather_interpreted,
}
SCATTER = {
    "reference": reference.scatter_rows,
    "xla": xla.scatter_rows,
    "pallas_tpu": pallas_tpu.scatter_rows,
    "pallas_interpret": pallas_tpu.scatter_interpreted,
    "pallas_gpu": pallas_gpu.scatter_rows,
    "pallas_gpu_interpret": pallas_gpu.scatter_interpreted,
}
DEFAULT = "xla"


def gather_rows(
    x, index, *, ordered: bool = False, unique: bool = False, implementation: str | None = None
):
    """x [B,P,D] float or int8, index int32 [B,Q] -> [B,Q,D] of x's type.

    `ordered`, `unique`: promises that each image's indices ascend, and that none repeats; the
    gradient of "xla" uses them, and is wrong where they are broken. `implementation`: a name in
    GATHER; "pallas_tpu" needs a TPU, "pallas_gpu" a GPU, and only "xla" and "reference" have
    gradients.
    Raises InputError, when traced, on an unknown name, an implementation this machine cannot run,
    shapes or types that do not fit, and a known index out of range.
    """
    run = _implementation("gather_rows", implementation, GATHER)
    _check("gather_rows", x, index)
    # Numbers below 0 too: a clipped index is what every implementation takes as it is.
    index = jnp.clip(index, 0, x.shape[1] - 1)
    return run(x, index, ordered=ordered, unique=unique)


def scatter_rows(
    into,
    index,
    rows,
    *,
    add: bool = False,
    ordered: bool = False,
    unique: bool = False,
    implementation: str | None = None,
):
    """into [B,P,D] with rows [B,Q,D] of its type at index int32 [B,Q] -> [B,P,D].

    `add`: rows are added to those there, repeated indices too (int8 wraps around). Without it a
    repeated index leaves one of its rows, which one is not defined. `ordered`, `unique`: promises
    as in `gather_rows`; if `unique` is broken, the result is wrong. `implementation`: a name in
    SCATTER. Raises InputError as `gather_rows` does.
    """
    run = _implementation("scatter_rows", implementation, SCATTER)
    _check("scatter_rows", into, index)
    expected = (*index.shape, into.shape[2])
    if rows.shape != expected or rows.dtype != into.dtype:
        raise InputError(
            f"scatter_rows: rows {rows.dtype}{list(rows.shape)}, expected "
            f"{into.dtype}{list(expected)} for the index and {list(into.shape)} to put them into"
        )
    return run(into, index, rows, add=add, ordered=ordered, unique=unique)


def _implementation(operation, implementation, known):
    name = DEFAULT if implementation is None else implementation
    if name not in known:
        raise unknown_name(f"implementation of {operation}", name, known)
    return known[name]


def _check(operation, x, index) -> None:
    """InputError unless index int32 [B,Q] can choose rows of x [B,P,D]."""
    typed = jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.int8
    if x.ndim != 3 or not typed:
        raise InputError(
            f"{operation}: rows of {x.dtype}{list(x.shape)}; expected float or int8 [B,P,D]"
        )
    if index.ndim != 2 or index.shape[0] != x.shape[0] or index.dtype != jnp.int32:
        raise InputError(
            f"{operation}: index {index.dtype}{list(index.shape)}; expected int32 [{x.shape[0]}, Q]"
        )
    rows = x.shape[1]
    if isinstance(index, Tracer):
        outside = None if rows or not index.size else "any"
    else:
        known = np.asarray(index)
        outside = next(iter(known[(known < 0) | (known >= rows)]), None)
    if outside is not None:
        raise InputError(f"{operation}: index {outside} of {rows} rows; expected 0 to {rows - 1}")
