"""Simulated plans: traced bits in int8 containers and the same int32 product, one compile for all.

`simulated_params` runs under jit with `w_bits` traced, so it can be vmapped over plans; its
result goes through the very operation graph of the integer path. Agreement: equal int32
accumulators, because the integers are equal and only their packing differs.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import traverse_util

from mpqdiff.denoiser import Denoise
from mpqdiff.kernels.quantized_matmul import quantized_matmul
from mpqdiff.quantize.activations import Table
from mpqdiff.quantize.apply import float_leaves, integer_denoise
from mpqdiff.quantize.numerics import quantize_weight
from mpqdiff.sites import Site, module_path


def simulated_params(
    params, sites: Sequence[Site], w_bits, steps: Table, asymmetric: Sequence[bool], *, clip="mse"
):
    """The pytree of the simulated model; w_bits int32 [L] may be traced."""
    flat = traverse_util.flatten_dict(params, sep="/")
    held = {}
    for index, (site, flag) in enumerate(zip(sites, asymmetric, strict=True)):
        if not site.parameters:
            continue
        base = module_path(site.path)
        qvalue, scale = quantize_weight(flat[f"{base}/kernel"], w_bits[index], clip=clip)
        qvalue = qvalue.reshape(-1, qvalue.shape[-1])
        entry = {"qvalue": qvalue, "scale": scale}
        if flag:
            entry["colsum"] = qvalue.astype(jnp.int32).sum(axis=0)
        if f"{base}/bias" in flat:
            entry["bias"] = flat[f"{base}/bias"]
        held[site.path] = entry
    return {"float": float_leaves(params, sites), "sites": held, "steps": steps}


def simulated_denoise(denoise: Denoise, sites: Sequence[Site], *, a_bits) -> Denoise:
    """`denoise` over `simulated_params`; label its results "simulated", never time them."""
    whole = {site.path: _whole for site in sites if site.parameters}
    return integer_denoise(denoise, sites, whole, quantized_matmul, a_bits=a_bits)


def _whole(qvalue):
    return qvalue
