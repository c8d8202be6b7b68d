"""Rows moved inside vector memory: an image's features are brought in, and its rows copied there.

The grid runs over images and over blocks of features; the indices of an image are in scalar memory.
A row of a register tile can be addressed alone only in 32-bit types: narrower ones are widened as
they come in and narrowed as they leave, which changes no value.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mpqdiff.errors import InputError
from mpqdiff.kernels import tpu

FEATURES = (1024, 512, 256, 128)


def gather_rows(x, index, *, ordered, unique, interpret=False):
    """See the package; the indices are in range.

    Raises InputError off a TPU unless interpreted, and on more rows than vector memory holds.
    """
    del ordered, unique
    if not interpret:
        tpu.require_tpu("gather_rows")
    (images, rows, features), taken = x.shape, index.shape[1]
    if 0 in (images, features, taken):  # a grid cannot be empty
        return jnp.zeros((images, taken, features), x.dtype)
    width = _width("gather_rows", features, (rows + taken) * _bytes(x.dtype))
    return pl.pallas_call(
        _gather,
        out_shape=jax.ShapeDtypeStruct((images, taken, features), x.dtype),
        grid=(images, pl.cdiv(features, width)),
        in_specs=[_scalars(taken), _block(rows, width)],
        out_specs=_block(taken, width),
        scratch_shapes=[
            pltpu.VMEM((rows, width), _wide(x.dtype)),
            pltpu.VMEM((taken, width), _wide(x.dtype)),
        ],
        compiler_params=tpu.compiler_params("parallel", "parallel"),
        interpret=interpret,
        name="gather_rows",
    )(index[:, None], x)


def _gather(index_ref, x_ref, y_ref, x_wide, y_wide):
    x_wide[...] = x_ref[0].astype(x_wide.dtype)

    @pl.loop(0, y_wide.shape[0])
    def _(j):
        y_wide[pl.ds(j, 1), :] = x_wide[pl.ds(index_ref[0, 0, j], 1), :]

    y_ref[0] = y_wide[...].astype(y_ref.dtype)


def scatter_rows(into, index, rows, *, add, ordered, unique, interpret=False):
    """See the package. Of rows with the same index the last stays.

    Raises InputError as `gather_rows` does.
    """
    del ordered, unique
    if not interpret:
        tpu.require_tpu("scatter_rows")
    (images, places, features), given = into.shape, index.shape[1]
    if 0 in (images, places, features, given):
        return into
    width = _width("scatter_rows", features, (2 * places + given) * _bytes(into.dtype))
    return pl.pallas_call(
        partial(_scatter, add=add),
        out_shape=jax.ShapeDtypeStruct(into.shape, into.dtype),
        grid=(images, pl.cdiv(features, width)),
        in_specs=[_scalars(given), _block(places, width), _block(given, width)],
        out_specs=_block(places, width),
        scratch_shapes=[
            pltpu.VMEM((places, width), _wide(into.dtype)),
            pltpu.VMEM((given, width), _wide(into.dtype)),
        ],
        compiler_params=tpu.compiler_params("parallel", "parallel"),
        interpret=interpret,
        name="scatter_rows",
    )(index[:, None], into, rows)


def _scatter(index_ref, into_ref, rows_ref, y_ref, into_wide, rows_wide, *, add):
    into_wide[...] = into_ref[0].astype(into_wide.dtype)
    rows_wide[...] = rows_ref[0].astype(rows_wide.dtype)

    @pl.loop(0, rows_wide.shape[0])
    def _(j):
        place = index_ref[0, 0, j]

        @pl.when((place >= 0) & (place < into_wide.shape[0]))
        def _():
            row, at = rows_wide[pl.ds(j, 1), :], pl.ds(place, 1)
            # To the given type after each sum, as elsewhere.
            total = (into_wide[at, :] + row).astype(y_ref.dtype) if add else row
            into_wide[at, :] = total.astype(into_wide.dtype)

    y_ref[0] = into_wide[...].astype(y_ref.dtype)


def _scalars(count: int):
    return pl.BlockSpec((1, 1, count), lambda i, j: (i, 0, 0), memory_space=pltpu.SMEM)


def _block(rows: int, width: int):
    return pl.BlockSpec((1, rows, width), lambda i, j: (i, 0, j))


def _wide(dtype):
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else jnp.int32


def _bytes(dtype) -> int:
    """What a value takes: twice as it comes, for one block to move while another is worked on,
    and once wide."""
    return 2 * dtype.itemsize + 4


def _width(operation: str, features: int, bytes_each: int) -> int:
    """Features at a time: all of few, else the most that fit in vector memory."""
    fitting = [width for width in FEATURES if width * bytes_each <= tpu.VMEM_BUDGET]
    if not fitting:
        raise InputError(
            f"{operation}: the TPU kernel holds all rows of an image in vector memory, and these "
            "are too many; take implementation 'xla'"
        )
    return features if features <= fitting[0] else fitting[0]


gather_interpreted = partial(gather_rows, interpret=True)
scatter_interpreted = partial(scatter_rows, interpret=True)
