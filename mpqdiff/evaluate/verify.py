"""Proof of execution: what the compiled sampler really multiplies, is passed and keeps.

Read from the optimised HLO of the very executable that samples:
1. every site planned as integer has a product under its name scope (`intercept.scope`), and all
   its products take integers and give int32;
2. the bytes of the arrays passed equal the bytes the plan promised;
3. what the sampling loop carries, by element type, equals the recorded `resident_bytes`. XLA may
   hoist the unpacking of weights out of the loop; then packed weights are resident as int8.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mpqdiff.intercept import scope
from mpqdiff.sites import Site

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_SCOPE = re.compile(r"site\[([^\]]+)\]")
_KERNEL = re.compile(r"/product_(\w+?)_w(\d)/pallas_call")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16}
MULTIPLIES = ("dot", "convolution", "custom-call")
INTEGER = ("s2", "s4", "s8", "u2", "u4", "u8", "s16", "s32")


class Execution(NamedTuple):
    """What a compiled sampler does: products by site scope, loop carry by type, memory."""

    products: dict[str, list[tuple[str, tuple[str, ...]]]]  # scope -> (result, operand types)
    carry: dict[str, int]  # element type -> bytes, of the sampling loop, without x_t and cond
    peak_bytes: int

    @property
    def resident_bytes(self) -> int:
        """Bytes that the compiled sampling loop carries from step to step, images apart."""
        return sum(self.carry.values())


def _bytes(kind: str, shape: str) -> int:
    size = int(np.prod([int(n) for n in shape.split(",") if n] or [1]))
    found = re.search(r"\d+", kind)
    bits = _BITS.get(kind) or (int(found.group()) if found else 8)
    return -(-size * bits // 8)


def read(compiled, *, images: Sequence[tuple[int, ...]]) -> Execution:
    """Parse a compiled sampler. `images` are the shapes of x_t and cond, left out of the carry.

    Scalars, which are counters and constants, are left out too.
    """
    types: dict[str, str] = {}
    products: dict[str, list] = {}
    loops: list[str] = []
    for line in compiled.as_text().splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, kind, opcode, rest = match.groups()
        types[name] = kind
        if opcode == "while":
            loops.append(kind)
        found = _SCOPE.search(rest)
        kernel = _KERNEL.search(rest) if opcode == "custom-call" else None
        if found and kernel:
            integer = kernel.group(1) == "int8"
            operands = ("s8", f"s{kernel.group(2)}") if integer else ("?",)
            result = "s32" if integer else kind.split("[")[0]
            products.setdefault(found.group(1), []).append((result, operands))
        elif found and re.search(r'/(?:dot|conv)_general[^/"]*"', rest):
            # A one-row product is lowered to converts, a multiply and a reduce under its name:
            # their results tell; operands are read where one instruction multiplies.
            operands = re.findall(r"%([\w.\-]+)", rest.split("metadata=")[0].split(")")[0])
            operands = operands if opcode in MULTIPLIES else []
            seen = tuple(types.get(operand, "?").split("[")[0] for operand in operands)
            products.setdefault(found.group(1), []).append((kind.split("[")[0], seen))
    skipped = [",".join(map(str, shape)) for shape in images]
    carry: dict[str, int] = {}
    # XLA removes the loop of a one-step sampler; then nothing is carried.
    sizes = {kind: sum(_bytes(*array) for array in _ARRAY.findall(kind)) for kind in loops}
    widest = max(sizes, key=lambda kind: sizes[kind], default="")
    for kind, shape in _ARRAY.findall(widest):
        if shape in skipped:  # once: a bias may have the shape of the labels
            skipped.remove(shape)
        elif shape:
            carry[kind] = carry.get(kind, 0) + _bytes(kind, shape)
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Execution(products, carry, int(peak))


def check(
    execution: Execution,
    sites: Sequence[Site],
    *,
    promised_bytes: int,
    passed_bytes: int,
    resident_bytes: int | None = None,
) -> list[str]:
    """The complaints, each naming its site; empty when the program does what the plan says.

    `sites` are those planned as integer. `resident_bytes` is the recorded value, where there is.
    """
    complaints = []
    for site in sites:
        name = _SCOPE.search(scope(site.path))
        products = execution.products.get(name.group(1), []) if name else []
        if not products:
            complaints.append(f"site {site.path!r}: no product of its own in the compiled program")
        for result, operands in products:
            floats = [kind for kind in (result, *operands) if kind not in INTEGER]
            if floats:
                complaints.append(
                    f"site {site.path!r}: planned as integer, runs {operands} -> {result}"
                )
                break
    if promised_bytes != passed_bytes:
        complaints.append(f"bytes passed {passed_bytes}, promised by the plan {promised_bytes}")
    if resident_bytes is not None and resident_bytes != execution.resident_bytes:
        complaints.append(
            f"the compiled loop keeps {execution.resident_bytes} bytes ({execution.carry}), "
            f"recorded resident_bytes {resident_bytes}"
        )
    return complaints
