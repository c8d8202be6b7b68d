"""The list of quantisable operations of a linen denoiser, and what is left in float (closure).

A site is one call of a Dense, Conv, Product or Embed module. Every other product is found by
closure: each `dot_general` and `conv_general_dilated` of the traced program that no site accounts
for is listed by its name stack with its MACs, never dropped.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from math import prod

import jax
import jax.numpy as jnp

from mpqdiff import intercept
from mpqdiff.denoiser import Denoise
from mpqdiff.errors import InputError


@dataclass(frozen=True)
class Site:
    """One quantisable operation. `shape` is the kernel's (empty for a product).

    `tie` names the parameter leaf: sites that share it must share their width. `pin` is the width
    it is held at in every arm, or None.
    """

    path: str
    kind: str  # dense, conv, product, embedding
    shape: tuple[int, ...]
    parameters: int  # weights, biases apart
    bias: int  # number of biases
    macs: int  # per image
    tie: str
    pin: int | None = None

    @property
    def stored(self) -> int:
        """Weights that this site holds: none of its own where it is a repeated call."""
        return 0 if self.repeated else self.parameters

    @property
    def repeated(self) -> bool:
        """Whether this is a further call of a module: its weights are held by the first."""
        return self.path != module_path(self.path)


@dataclass(frozen=True)
class Remainder:
    """A product left in float: where it is (name stack), its MACs per image, and why."""

    name: str
    macs: int
    reason: str = ""


def _site(path, module, kind, args, out) -> Site:
    base = "/".join(module.path)
    if kind == "product":
        return Site(path, kind, (), 0, 0, _product_macs(module.equation, args), base)
    leaves = module.variables["params"]
    if kind == "embedding":
        shape = leaves["embedding"].shape
        return Site(path, kind, shape, prod(shape), 0, 0, base)
    shape = leaves["kernel"].shape
    positions = out.size // out.shape[-1]
    bias = leaves["bias"].size if "bias" in leaves else 0
    return Site(path, kind, shape, prod(shape), bias, positions * prod(shape), base)


def _product_macs(equation: str, args) -> int:
    operands = equation.split("->")[0].split(",")
    sizes = {
        letter: size
        for letters, operand in zip(operands, args, strict=True)
        for letter, size in zip(letters, operand.shape, strict=True)
    }
    return prod(sizes.values())


def list_sites(denoise: Denoise, params, x_t, t, cond) -> tuple[list[Site], list[Remainder]]:
    """The sites of `denoise` in call order, and the products left in float. Traces, never runs.

    x_t [1,H,W,C], t [] or [1], cond for one image: MACs are per image. `params` may be shapes.
    Raises InputError when there is no site, when one lies inside a transform (see `intercept`), or
    when a site's call does other products than its own.
    """
    found: list[Site] = []
    observed = intercept.observe(denoise, lambda *call: found.append(_site(*call)))
    products = _products(jax.make_jaxpr(observed)(params, x_t, t, cond).jaxpr)
    if not found:
        raise InputError(
            "no Dense, Conv, Product or Embed was called: pass a denoise that applies a linen "
            "module and is not jitted (a trace made earlier would be reused), or wrap the module "
            "with mpqdiff.from_flax, which also finds raw products"
        )
    traced, remainder = dict.fromkeys((site.path for site in found), 0), []
    owners = {intercept.scope(site.path): site.path for site in found}
    for name, macs in sorted(products.items()):
        owner = next((path for scope, path in owners.items() if scope in name), None)
        if owner is None:
            remainder.append(_left(name, macs))
        else:
            traced[owner] += macs
    for site in found:
        if traced[site.path] != site.macs:
            raise InputError(
                f"MACs do not close at site {site.path!r}: {traced[site.path]} traced, "
                f"{site.macs} expected of its kind ({site.kind}); move the other products out of "
                "this module"
            )
    return found, remainder


def _left(name: str, macs: int) -> Remainder:
    """The Remainder of a name stack, which may tell why (`intercept.left_scope`)."""
    why = re.findall(r"left\[(\w+)\]", name)
    reason = intercept.LEFT[why[0] if why else "unseen"]
    return Remainder(re.sub(r"left\[\w+\]/?", "", name).rstrip("/"), macs, reason)


def module_path(path: str) -> str:
    """The module path of a site path: without the call index of a repeated call. It is the path of
    the first call, and what the module's weights are held by."""
    return path.split("#")[0]


def _products(jaxpr, prefix: str = "", times: int = 1) -> dict[str, int]:
    """MACs by name stack of every product in `jaxpr`, scan lengths multiplied in."""
    totals: dict[str, int] = defaultdict(int)
    for equation in jaxpr.eqns:
        stack = str(equation.source_info.name_stack)
        name = "/".join(part for part in (prefix, stack) if part)
        primitive, params = equation.primitive.name, equation.params
        if primitive == "dot_general":
            (contracting, _), _ = params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            depth = prod(lhs[axis] for axis in contracting)
            totals[name] += times * depth * prod(equation.outvars[0].aval.shape)
        elif primitive == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_axis = params["dimension_numbers"].rhs_spec[0]
            depth = prod(kernel) // kernel[out_axis]
            totals[name] += times * depth * prod(equation.outvars[0].aval.shape)
        repeats = params["length"] if primitive == "scan" else 1
        for inner in _inner_jaxprs(params):
            for inner_name, macs in _products(inner, name, times * repeats).items():
                totals[inner_name] += macs
    return dict(totals)


def _inner_jaxprs(params):
    for value in params.values():
        for leaf in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(leaf, "jaxpr", leaf)
            if hasattr(inner, "eqns"):
                yield inner


def pin(sites: list[Site], pins) -> list[Site]:
    """`sites` with `Site.pin` set from `pins`, pairs (regex on the whole path, bits; FLOAT_BITS
    for float).

    Raises InputError for a pattern that matches no site or two pins that contradict.
    """
    for pattern, _ in pins:
        if not any(re.fullmatch(pattern, site.path) for site in sites):
            paths = ", ".join(site.path for site in sites)
            raise InputError(f"pin {pattern!r} matches no site; sites: {paths}")
    pinned = []
    for site in sites:
        widths = {bits for pattern, bits in pins if re.fullmatch(pattern, site.path)}
        if len(widths) > 1:
            raise InputError(f"site {site.path!r} is pinned to {sorted(widths)} bits at once")
        pinned.append(replace(site, pin=widths.pop()) if widths else site)
    return pinned


def tie(sites: list[Site], patterns) -> list[Site]:
    """`sites` with one `Site.tie` for all that a regex matches with the same captured groups.

    `"(block_\\d+)/attn/[qkv]"` ties q, k and v of each block; a pattern without groups ties all its
    matches. Sites that share parameters stay tied. Raises InputError for a pattern that matches
    fewer than two sites.
    """
    for pattern in patterns:
        groups: dict[tuple, list[str]] = {}
        for site in sites:
            match = re.fullmatch(pattern, site.path)
            if match:
                groups.setdefault(match.groups(), []).append(site.tie)
        if not any(len(ties) > 1 for ties in groups.values()):
            paths = ", ".join(site.path for site in sites)
            raise InputError(f"tie {pattern!r} matches no two sites together; sites: {paths}")
        merged = {tie: ties[0] for ties in groups.values() for tie in ties}
        sites = [replace(site, tie=merged.get(site.tie, site.tie)) for site in sites]
    return sites


def planned(sites: list[Site], *, products: bool = False) -> list[Site]:
    """The sites a plan decides on: those with a weight product, and products where asked for."""
    kinds = {"dense", "conv"} | ({"product"} if products else set())
    return [site for site in sites if site.kind in kinds]


def example_inputs(image_shape, *, batch: int = 1):
    """Shapes of (x_t, t, labels) for tracing a class-conditional image denoiser."""
    x_t = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return x_t, jax.ShapeDtypeStruct((), jnp.int32), labels
