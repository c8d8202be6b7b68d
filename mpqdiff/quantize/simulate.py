"""The model with traced bits: one compilation serves every (site, choice) pair and every plan.

`supernet` quantises each site once at every width that some choice names. `simulated_denoise` reads
an index per site that says which choice it takes, or that it stays in float, and runs the very
product of the integer path on int8 containers. Agreement with the integer model of the same plan:
equal int32 accumulators, because the integers are equal and only their packing differs.

Map it over choices, do not vmap it: each site decides with a `lax.cond`, which under vmap would
run both sides. Label its results "simulated" and never time them.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

from mpqdiff import intercept
from mpqdiff.denoiser import Denoise
from mpqdiff.errors import InputError
from mpqdiff.kernels.quantized_matmul import quantized_matmul
from mpqdiff.quantize import activations
from mpqdiff.quantize.activations import Table
from mpqdiff.quantize.apply import quantize_kernel
from mpqdiff.quantize.numerics import BITS, column_sums
from mpqdiff.quantize.operate import integer_site
from mpqdiff.records import FLOAT_BITS
from mpqdiff.sites import Site, module_path

Choice = tuple[int, int]  # (w_bits, a_bits); FLOAT_BITS twice leaves the site in float


def supernet(
    params,
    sites: Sequence[Site],
    choices: Sequence[Choice],
    tables: Mapping[int, Table],
    asymmetric: Sequence[bool],
    *,
    clip: str = "mse",
):
    """All that a plan over `choices` may read, as the pytree that `simulated_denoise` takes.

    {"float": `params`, "sites": {path: {qvalue int8 [W,K,N], scale [W,N], colsum int32 [W,N] where
    `asymmetric`, bias [N] where there is one}}, "steps": Table of leaves [A,...]} over the W weight
    and A activation widths of `choices`, ascending; calls of one module share their arrays.
    `tables` holds the activation table of each activation width. Raises InputError on choices that
    no site can take and on a missing table.
    """
    w_bits, a_bits = widths(choices)
    missing = [bits for bits in a_bits if bits not in tables]
    if missing:
        raise InputError(f"no activation table for {missing} bits; got those of {list(tables)}")
    flat = traverse_util.flatten_dict(params, sep="/")
    held: dict[str, dict] = {}
    flags = list(zip(sites, asymmetric, strict=True))
    lopsided = {module_path(site.path) for site, flag in flags if flag}
    for site in sites:
        if not site.parameters:
            continue
        base = module_path(site.path)
        if site.repeated and base in held:
            held[site.path] = held[base]
            continue
        kernel = flat[f"{base}/kernel"]
        pairs = [quantize_kernel(kernel, bits, clip=clip) for bits in w_bits]
        qvalue = jnp.stack([q.reshape(-1, q.shape[-1]) for q, _ in pairs])
        held[site.path] = {"qvalue": qvalue, "scale": jnp.stack([scale for _, scale in pairs])}
        if base in lopsided:
            held[site.path]["colsum"] = jax.vmap(column_sums)(qvalue)
        if f"{base}/bias" in flat:
            held[site.path]["bias"] = flat[f"{base}/bias"]
    steps = jax.tree.map(lambda *rows: jnp.stack(rows), *[tables[bits] for bits in a_bits])
    return jax.tree.map(jnp.asarray, {"float": params, "sites": held, "steps": steps})


def widths(choices: Sequence[Choice]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The weight widths and the activation widths of the integer choices, ascending.

    Raises InputError unless each choice has both widths in 2..8 or both FLOAT_BITS, at least one
    of them the former.
    """
    pairs = [(int(w), int(a)) for w, a in choices]
    integer = [pair for pair in pairs if pair != (FLOAT_BITS, FLOAT_BITS)]
    if not integer or not all({*pair} <= {*BITS} for pair in integer):
        raise InputError(
            f"choices {pairs}: expected pairs (w_bits, a_bits) of 2 to "
            f"8 bits, or ({FLOAT_BITS}, {FLOAT_BITS}) for float, and at least one of the former"
        )
    return tuple(sorted({w for w, _ in integer})), tuple(sorted({a for _, a in integer}))


def all_float(sites: Sequence[Site], choices: Sequence[Choice]) -> np.ndarray:
    """The `choice` int32 [L] of the float model: one past the last of `choices`."""
    return np.full(len(sites), len(choices), np.int32)


def one_site(sites: Sequence[Site], choices: Sequence[Choice], site: int, choice: int):
    """The `choice` int32 [L] that quantises one site and leaves the others in float."""
    taken = all_float(sites, choices)
    taken[site] = choice
    return taken


def simulated_denoise(
    denoise: Denoise,
    sites: Sequence[Site],
    choices: Sequence[Choice],
    *,
    only: Collection[int] | None = None,
) -> Denoise:
    """`denoise` over params = {**supernet, "choice": int32 [L]}, choices traced.

    Entry l is an index into `choices`, or len(choices), which is float whatever they hold. Only
    the chosen side of a site runs, so one quantised site costs one integer product. With `only`,
    indices of sites, the others are left as they are: they need not have an integer form.
    """
    is_float = np.array([w == FLOAT_BITS for w, _ in choices] + [True])
    product = site_product(sites, choices)

    def simulated(params, x_t, t, cond):
        rows = step_rows(params, t)
        table, chosen = jnp.asarray(is_float), params["choice"]

        def operate(index, site, module, *args):
            linear = module.clone(parent=None, name=None)
            variables, choice = module.variables, chosen[index]

            def left():
                return linear.apply(variables, *args)

            dtype = jax.eval_shape(left).dtype  # a narrower float model gets its own type back

            def quantised():
                return product(params, rows, site, module, args, choice).astype(dtype)

            return lax.cond(table[choice], left, quantised)

        operations = {
            site.path: partial(operate, index, site)
            for index, site in enumerate(sites)
            if only is None or index in only
        }
        return intercept.rewrite(denoise, operations)(params["float"], x_t, t, cond)

    return simulated


def step_rows(net, t):
    """Scales and zero points of the step nearest to t at each activation width, [A,...,columns].

    None where scales are taken online.
    """
    if not net["steps"].timesteps.size:
        return None
    # Held apart: XLA would repeat the lookup inside every elementwise loop that scales.
    return lax.optimization_barrier(jax.vmap(activations.row, (0, None))(net["steps"], t))


def site_product(sites: Sequence[Site], choices: Sequence[Choice]):
    """`run(net, rows, site, module, args, choice) -> y`: one call of a site at a traced choice.

    `rows` are `step_rows`; `choice` an index into `choices` that is not float's. The product of
    two activations has no weights and follows `a_bits` alone, the same for both operands.
    """
    w_bits, a_bits = widths(choices)
    integer = [pair if pair[0] != FLOAT_BITS else (w_bits[0], a_bits[0]) for pair in choices]
    w_index = np.array([w_bits.index(w) for w, _ in integer])
    a_index = np.array([a_bits.index(a) for _, a in integer])
    columns = activations.columns(sites)

    def run(net, rows, site, module, args, choice):
        narrow, width = jnp.asarray(w_index)[choice], jnp.asarray(a_index)[choice]
        row = None if rows is None else tuple(value[width] for value in rows)
        bits = jnp.asarray(a_bits, jnp.int32)[width]
        tensors = {
            name: value if name == "bias" else value[narrow]
            for name, value in net["sites"].get(site.path, {}).items()
        }
        if site.kind == "product":
            bits = {"lhs": bits, "rhs": bits}
        return integer_site(
            site, module, args, tensors, row, columns[site.path], bits, matmul=quantized_matmul
        )

    return run
