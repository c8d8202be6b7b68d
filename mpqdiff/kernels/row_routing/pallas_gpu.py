"""A tile of rows and features to a Triton program, which reads rows wherever they lie.

A scatter is written as a gather: every row of the output is made once, by the program that looks
among the image's indices for its own. So no two programs write to the same place, repeated indices
need no atomic addition, and the order of a sum is always that of the rows. It costs a comparison of
every index with every row of the output, in registers, and nothing in memory but the indices.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mpqdiff.kernels import gpu

VALUES = 4096  # of a tile, and comparisons at a time: 32 a thread
WIDEST = 512


def gather_rows(x, index, *, ordered, unique, interpret=False):
    """See the package; the indices are in range.

    Raises InputError off a GPU unless interpreted, and without Triton.
    """
    del ordered, unique
    if not interpret:
        gpu.require_gpu("gather_rows")
    (images, rows, features), taken = x.shape, index.shape[1]
    if 0 in (images, features, taken):  # a grid cannot be empty
        return jnp.zeros((images, taken, features), x.dtype)
    height, width = _tile(taken, features)
    return pl.pallas_call(
        partial(_gather, taken=taken, features=features),
        out_shape=jax.ShapeDtypeStruct((images, taken, features), x.dtype),
        grid=(pl.cdiv(taken, height), pl.cdiv(features, width), images),
        in_specs=[
            pl.BlockSpec((None, height), lambda i, j, b: (b, i)),
            pl.BlockSpec((None, rows, width), lambda i, j, b: (b, 0, j)),
        ],
        out_specs=pl.BlockSpec((None, height, width), lambda i, j, b: (b, i, j)),
        compiler_params=gpu.triton().CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="gather_rows",
    )(index, x)


def _gather(index_ref, x_ref, y_ref, *, taken: int, features: int):
    height, width = y_ref.shape
    below = gpu.inside(pl.program_id(0) * height, height, taken)
    mask = gpu.both(below, gpu.inside(pl.program_id(1) * width, width, features))
    index = gpu.load(index_ref.at[:], below)
    gpu.store(y_ref.at[:, :], gpu.load(x_ref.at[_places(index, width)], mask), mask)


def scatter_rows(into, index, rows, *, add, ordered, unique, interpret=False):
    """See the package. Of rows with the same index the last stays.

    Raises InputError as `gather_rows` does.
    """
    del ordered, unique
    if not interpret:
        gpu.require_gpu("scatter_rows")
    (images, places, features), given = into.shape, index.shape[1]
    if 0 in (images, places, features, given):
        return into
    height, width = _tile(places, features)
    matched = min(VALUES // height, gpu.power_of_two(given))
    searched = pl.cdiv(given, matched) * matched
    tile = pl.BlockSpec((None, height, width), lambda i, j, b: (b, i, j))
    return pl.pallas_call(
        partial(_add if add else _put, matched=matched, sizes=(places, features, given)),
        out_shape=jax.ShapeDtypeStruct(into.shape, into.dtype),
        grid=(pl.cdiv(places, height), pl.cdiv(features, width), images),
        in_specs=[
            pl.BlockSpec((None, searched), lambda i, j, b: (b, 0)),
            tile,
            pl.BlockSpec((None, given, width), lambda i, j, b: (b, 0, j)),
        ],
        out_specs=tile,
        compiler_params=gpu.triton().CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="scatter_rows",
    )(index, into, rows)


def _put(index_ref, into_ref, rows_ref, y_ref, *, matched: int, sizes):
    """sizes: rows of the output, features, rows given."""
    mask, matches = _tile_of(y_ref, sizes), _matches(index_ref, y_ref, matched, sizes)

    def step(i, last):
        number, here = matches(i)
        return jnp.maximum(last, jnp.max(jnp.where(here, number, -1), axis=1))

    none = jnp.full(y_ref.shape[0], -1, jnp.int32)
    last = lax.fori_loop(0, pl.cdiv(sizes[2], matched), step, none)
    given = (last >= 0)[:, None]
    row = gpu.load(rows_ref.at[_places(jnp.maximum(last, 0), y_ref.shape[1])], _and(mask, given))
    old = gpu.load(into_ref.at[:, :], _and(mask, ~given))
    gpu.store(y_ref.at[:, :], jnp.where(given, row, old), mask)


def _add(index_ref, into_ref, rows_ref, y_ref, *, matched: int, sizes):
    """As `_put`, with every row that is given for a place, the first one first."""
    mask, matches = _tile_of(y_ref, sizes), _matches(index_ref, y_ref, matched, sizes)
    wide = jnp.float32 if jnp.issubdtype(y_ref.dtype, jnp.floating) else jnp.int32

    def step(i, total):
        number, here = matches(i)
        beyond = jnp.int32(sizes[2])

        def again(_, state):
            total, done = state
            rest = here & (number > done[:, None])
            first = jnp.min(jnp.where(rest, number, beyond), axis=1)
            given = (first < beyond)[:, None]
            at = _places(jnp.where(first < beyond, first, 0), y_ref.shape[1])
            row = gpu.load(rows_ref.at[at], _and(mask, given)).astype(wide)
            # To the given type after each sum, as elsewhere.
            return jnp.where(given, (total.astype(wide) + row).astype(y_ref.dtype), total), first

        most = jnp.max(jnp.sum(here.astype(jnp.int32), axis=1))
        none = jnp.full(y_ref.shape[0], -1, jnp.int32)
        return lax.fori_loop(0, most, again, (total, none))[0]

    total = gpu.load(into_ref.at[:, :], mask)
    total = lax.fori_loop(0, pl.cdiv(sizes[2], matched), step, total)
    gpu.store(y_ref.at[:, :], total, mask)


def _matches(index_ref, y_ref, matched: int, sizes):
    """A function of i: the numbers [1,q] of the i-th `matched` indices, and which of the tile's
    places each is [p,q]."""
    height = y_ref.shape[0]
    place = pl.program_id(0) * height + lax.iota(jnp.int32, height)

    def matches(i):
        first = i * matched
        within = gpu.inside(first, matched, sizes[2])
        index = gpu.load(index_ref.at[pl.ds(first, matched)], within)
        here = place[:, None] == index[None, :]
        number = (first + lax.iota(jnp.int32, matched))[None, :]
        return number, here if within is None else here & within[None, :]

    return matches


def _tile_of(y_ref, sizes):
    """Which places of this program's tile are inside the output, or None for all."""
    height, width = y_ref.shape
    return gpu.both(
        gpu.inside(pl.program_id(0) * height, height, sizes[0]),
        gpu.inside(pl.program_id(1) * width, width, sizes[1]),
    )


def _places(rows, width: int):
    """(rows, columns) [r,w] of the elements of rows [r]."""
    shape = rows.shape[0], width
    columns = lax.broadcasted_iota(jnp.int32, shape, 1)
    return jnp.broadcast_to(rows[:, None], shape), columns


def _and(mask, other):
    return other if mask is None else mask & other


def _tile(rows: int, features: int) -> tuple[int, int]:
    """(rows, features) of a tile: few features leave more rows, and none is taller than it need."""
    width = min(WIDEST, gpu.power_of_two(features))
    return min(VALUES // width, gpu.power_of_two(rows)), width


gather_interpreted = partial(gather_rows, interpret=True)
scatter_interpreted = partial(scatter_rows, interpret=True)
