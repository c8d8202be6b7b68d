"""What each site multiplies, as which executions it can run, and which choices a device rules out.

An operation is a site's product in the shape that the sampler's batched call gives it. Rules are
about doing it well: where a rule is broken, XLA would still run the product, padded or slower, so
`cpu`, where nothing is gained by alignment, has none. What has no integer form at all is ruled out
everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np

from mpqdiff import intercept
from mpqdiff.denoiser import Denoise
from mpqdiff.errors import InputError, unknown_name
from mpqdiff.kernels.quantized_matmul import MAX_CONTRACTION
from mpqdiff.quantize.pack import container_bits
from mpqdiff.records import FLOAT_BITS
from mpqdiff.sites import Site

Choice = tuple[int, int]  # (w_bits, a_bits); FLOAT_BITS twice keeps the site in float
FLOATS = ("float32", "bf16")
INTEGERS = {"int8": 8, "int4": 4, "int2": 2}  # by the packed width of the weight


class Rules(NamedTuple):
    """What an integer product must be to run well on a device; a float one may be anything."""

    alignment: int = 1  # contraction and outputs are multiples of it
    min_rows: int = 1
    # Whether widths may be offered that take the room of a wider one on the device, where that one
    # is offered too: 3 bits fill 4, and 5, 6 and 7 fill 8. They pay in the file only.
    odd_widths: bool = True


RULES = {
    # XLA's int8 dot takes any shape; which pays is measured (`latency`).
    "cpu": Rules(),
    # cuBLASLt's int8 products, as torch._int_mm guards them (aten/native/cuda/Blas.cpp): more than
    # 16 rows, the others multiples of 8. XLA would pad and copy up to multiples of 4
    # (gpu/cublas_padding_requirements.h).
    "gpu": Rules(alignment=8, min_rows=17),
    # XLA lays int8 out in padded tiles of 32 x 128 whatever the shape (Pallas TPU guide); not
    # measured here.
    "tpu": Rules(),
}


class Convolution(NamedTuple):
    """Geometry of a convolution: x's shape and the fields of `nn.Conv`, as given there."""

    shape: tuple[int, ...]
    kernel_size: Any
    strides: Any
    padding: Any
    kernel_dilation: Any
    input_dilation: Any
    groups: int


class Einsum(NamedTuple):
    """Geometry of a product of two activations."""

    equation: str
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One site's product in one denoiser call: rows x contraction x outputs MACs.

    `asymmetric`: the activation has a zero point. `online`: scales are taken as the product runs.
    """

    kind: str  # dense, conv, product
    rows: int
    contraction: int
    outputs: int
    bias: bool = False
    asymmetric: bool = False
    online: bool = False
    geometry: Convolution | Einsum | None = None


def operations(
    denoise: Denoise,
    params,
    sites: Sequence[Site],
    x_t,
    t,
    cond,
    *,
    asymmetric: Sequence[bool] | None = None,
    online: bool = False,
) -> dict[str, Operation]:
    """The operation of every site, by path; traces, never runs.

    x_t [B,H,W,C], t [] and cond [B] as the sampler calls `denoise` (shapes suffice; under guidance
    twice the images). `asymmetric` [L]: which sites read a zero point. Raises InputError on a site
    that the call does not reach, or of a kind without a product.
    """
    flags = [False] * len(sites) if asymmetric is None else asymmetric
    lopsided = {site.path: bool(flag) for site, flag in zip(sites, flags, strict=True)}
    found: dict[str, Operation] = {}

    def reduce(path, module, kind, args, out):
        if path in lopsided and kind in SHAPES:
            found[path] = SHAPES[kind](module, args, out, lopsided[path] and not online, online)

    jax.eval_shape(intercept.observe(denoise, reduce), params, x_t, t, cond)
    missing = [path for path in lopsided if path not in found]
    if missing:
        raise InputError(
            f"sites {missing} have no product in this call: list the sites again for this model "
            "and input, and leave embeddings out"
        )
    return {path: found[path] for path in lopsided}


def _dense(module, args, out, asymmetric: bool, online: bool) -> Operation:
    rows, depth = prod(args[0].shape[:-1]), args[0].shape[-1]
    bias = "bias" in module.variables["params"]
    return Operation("dense", rows, depth, out.shape[-1], bias, asymmetric, online)


def _conv(module, args, out, asymmetric: bool, online: bool) -> Operation:
    kernel = module.variables["params"]["kernel"].shape
    given = (module.kernel_size, module.strides, module.padding)
    dilations = (module.kernel_dilation, module.input_dilation)
    return Operation(
        "conv",
        prod(out.shape[:-1]),
        prod(kernel[:-1]),
        out.shape[-1],
        "bias" in module.variables["params"],
        asymmetric,
        online,
        Convolution(
            *_frozen((args[0].shape, *given, *dilations)), groups=module.feature_group_count
        ),
    )


def _product(module, args, out, asymmetric: bool, online: bool) -> Operation:
    del asymmetric  # a left zero point is always paid for
    operands, result = module.equation.split("->")
    left, right = operands.split(",")
    sizes = dict(zip(left, args[0].shape, strict=True)) | dict(
        zip(right, args[1].shape, strict=True)
    )
    outputs = prod(sizes[letter] for letter in result if letter not in left)
    return Operation(
        "product",
        prod(out.shape) // outputs,
        prod(sizes[letter] for letter in sizes if letter not in result),
        outputs,
        online=online,
        geometry=Einsum(module.equation, *(tuple(x.shape) for x in args[:2])),
    )


SHAPES = {"dense": _dense, "conv": _conv, "product": _product}


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def float_only(operation: Operation) -> str | None:
    """Why `operation` has no integer form, or None where it has one (`quantize.apply`)."""
    if operation.contraction > MAX_CONTRACTION:
        return f"a contraction of {operation.contraction} can overflow int32"
    g = operation.geometry
    if not isinstance(g, Convolution):
        return None
    if len(g.shape) != 4 or len(np.atleast_1d(g.kernel_size)) != 2:
        return "a convolution over other than two axes has no integer form"
    if g.groups != 1:
        return "a grouped convolution has no integer form"
    if any(np.any(np.asarray(d or 1) != 1) for d in (g.kernel_dilation, g.input_dilation)):
        return "a dilated convolution has no integer form"
    if isinstance(g.padding, str) and g.padding not in ("SAME", "SAME_LOWER", "VALID"):
        return f"{g.padding} padding has no integer form, only zeros have"
    return None


def executions(operation: Operation) -> tuple[str, ...]:
    """The names of all executions that `operation` has."""
    if float_only(operation):
        return FLOATS
    return (*FLOATS, "int8") if operation.kind == "product" else (*FLOATS, *INTEGERS)


def execution(operation: Operation, w_bits: int, a_bits: int) -> str:
    """How `operation` runs at a choice: "float32", or "int" and the packed width of its weight."""
    if w_bits == a_bits == FLOAT_BITS:
        return "float32"
    if operation.kind == "product":
        return "int8"
    return f"int{container_bits(w_bits)}"


def legal(
    operations: Mapping[str, Operation], choices: Sequence[Choice], rules: Rules
) -> tuple[np.ndarray, list[tuple[str, Choice, str]]]:
    """(bool [L,K], [(path, choice, reason)] of those ruled out). Float is always legal."""
    reasons = {
        (path, choice): reason
        for path, operation in operations.items()
        for choice in choices
        if (reason := _against(operation, choice, choices, rules))
    }
    allowed = [[(path, choice) not in reasons for choice in choices] for path in operations]
    shape = len(operations), len(choices)
    return np.array(allowed, bool).reshape(shape), [(*pair, why) for pair, why in reasons.items()]


def _against(operation: Operation, choice: Choice, choices, rules: Rules) -> str | None:
    """What speaks against `choice` for `operation`, or None."""
    w_bits, a_bits = choice
    if w_bits == FLOAT_BITS:
        return None
    if reason := float_only(operation):
        return reason
    if operation.rows < rules.min_rows:
        return f"{operation.rows} rows, integer products have at least {rules.min_rows} here"
    for name in ("contraction", "outputs"):
        if getattr(operation, name) % rules.alignment:
            size = getattr(operation, name)
            return f"{name} of {size}, integer products need multiples of {rules.alignment} here"
    room = container_bits(w_bits)
    if not rules.odd_widths and room != w_bits and (room, a_bits) in choices:
        return f"{w_bits} bits take the room of {room} on the device, and {room} is offered"
    return None


def restrict(
    operations: Mapping[str, Operation],
    choices: Sequence[Choice],
    allowed,
    name: str,
    *,
    odd_widths: bool = True,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """(`allowed` [L,K] less what RULES[name] rule out, [{site, choice, reason}] for the report).

    `allowed` already honours pins. Raises InputError on an unknown name, and on a site that is
    left without a choice (a pin, or float not offered).
    """
    if name not in RULES:
        raise unknown_name("plan.legality", name, RULES)
    rules = RULES[name]._replace(odd_widths=odd_widths and RULES[name].odd_widths)
    allowed = np.asarray(allowed, bool)
    mask, reasons = legal(operations, choices, rules)
    paths = list(operations)
    for path, before, after in zip(paths, allowed, allowed & mask, strict=True):
        if before.any() and not after.any():
            why = "; ".join(dict.fromkeys(reason for site, _, reason in reasons if site == path))
            raise InputError(
                f"site {path!r} has no legal choice left on {name!r}: {why}. Let it stay in float "
                "(a pin at 32, or plan.keep_float=True and no pin on it), or set plan.legality to "
                "another device"
            )
    ruled_out = [
        {"site": path, "choice": list(choice), "reason": reason}
        for path, choice, reason in reasons
        if allowed[paths.index(path), list(choices).index(choice)]
    ]
    return allowed & mask, ruled_out
