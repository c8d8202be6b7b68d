"""Every GPU kernel lowered for CUDA on a machine without a GPU, and what Triton is then given.

Nothing is compiled by XLA and nothing runs. With the package `triton` installed, its own compiler
makes machine code of the same text for Hopper, which shows registers, memory and instructions.
"""

import re
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jaxlib.mlir import ir
from jaxlib.triton import dialect

from mpqdiff.errors import InputError
from mpqdiff.kernels import gpu
from mpqdiff.kernels.attention_products import pv, qk
from mpqdiff.kernels.gram import gram
from mpqdiff.kernels.quantize_activations import quantize_activations
from mpqdiff.kernels.quantized_matmul import pallas_gpu, quantized_matmul
from mpqdiff.kernels.row_routing import gather_rows, scatter_rows
from mpqdiff.kernels.weight_only_matmul import weight_only_matmul
from mpqdiff.quantize.pack import packed_shape

# jax 0.12 says so at every lowering.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

TARGET = "__gpu$xla.gpu.triton"
SHARED_MEMORY = 227 * 2**10  # of a program on Hopper
on = jax.ShapeDtypeStruct


def layer(rows, inputs, outputs, bits, *, each=False, zero=False, online=False, **options):
    """`quantized_matmul` and its arguments; `each`: scales by token, `online`: of the kernel's."""
    column = (rows, 1) if each else ()
    arguments = (
        on((rows, inputs), options.pop("x_type", jnp.float32)),
        on(packed_shape((inputs, outputs), bits), jnp.int8),
        None if online else on(column, jnp.float32),
        on(column, jnp.int8) if zero else None,
        on((outputs,), jnp.float32),
        on((outputs,), jnp.int32) if zero else None,
        on((outputs,), jnp.float32),
    )
    return partial(quantized_matmul, w_bits=bits, **options), *arguments


def weight_only(rows, inputs, outputs, bits):
    """`weight_only_matmul` of bfloat16 tokens, and its arguments."""
    packed = on(packed_shape((inputs, outputs), bits), jnp.int8)
    run = partial(weight_only_matmul, w_bits=bits, activation="gelu")
    return run, on((rows, inputs), jnp.bfloat16), packed, *[on((outputs,), jnp.float32)] * 2


def attention(product, images, rows, others, heads, depth, *, zero=False):
    """`qk`, or `pv` with a zero point, and its arguments; scales of the step."""
    q, k = (on((images, count, heads, depth), jnp.float32) for count in (rows, others))
    left = q if product is qk else on((images, heads, rows, others), jnp.float32)
    scale, point = on((), jnp.float32), on((), jnp.int8) if zero else None
    return product, left, k, scale, point, scale


# By the tensor types of their products; the tiny and the odd ones fill no block.
INTEGER, BFLOAT16 = ("i8", "i8", "i32"), ("bf16", "bf16", "f32")
PRODUCTS = {
    "w8_gelu": (INTEGER, layer(256, 1152, 768, 8, activation="gelu")),
    "w8_prologue": (INTEGER, layer(256, 1152, 32, 8)),
    "w4_zero": (INTEGER, layer(256, 1152, 384, 4, zero=True)),
    "w4_prologue_tokens": (INTEGER, layer(128, 384, 32, 4, each=True, zero=True)),
    "w2_bfloat16": (INTEGER, layer(128, 1152, 384, 2, x_type=jnp.bfloat16, activation="silu")),
    "w4_online": (INTEGER, layer(128, 384, 256, 4, online=True)),
    "w4_odd": (INTEGER, layer(131, 1027, 301, 4, each=True, zero=True)),
    "w2_one_row": (INTEGER, layer(1, 1152, 384, 2)),
    "w4_tiny": (INTEGER, layer(5, 9, 3, 4, each=True)),
    "w4_only": (BFLOAT16, weight_only(128, 1152, 256, 4)),
    "w8_only_odd": (BFLOAT16, weight_only(50, 1027, 133, 8)),
}
PROLOGUE = {"w8_prologue", "w4_prologue_tokens", "w4_tiny"}  # x is quantised in the loop
# Those of DiT-XL/2 at two images, and odd ones: (its product, the integers it is given).
HEADS = {
    "qk": (attention(qk, 2, 256, 256, 16, 72), ["32x256x72"] * 2),
    "pv": (attention(pv, 2, 256, 256, 16, 72, zero=True), ["32x256x256", "32x72x256"]),
    "qk_odd": (attention(qk, 1, 77, 33, 3, 40, zero=True), ["3x77x40", "3x33x40"]),
    "pv_odd": (attention(pv, 3, 5, 257, 1, 7), ["3x5x257", "3x7x257"]),
}


def routing(operation, places, taken, features, dtype, **options):
    """`gather_rows` or `scatter_rows` of two images, and its arguments."""
    rows = (on((2, taken, features), dtype),) if operation is scatter_rows else ()
    x, index = on((2, places, features), dtype), on((2, taken), jnp.int32)
    return partial(operation, **options), x, index, *rows


OTHERS = {
    "quantize": (quantize_activations, on((1024, 384), jnp.float32)),
    "quantize_odd": (quantize_activations, on((3, 50, 1027), jnp.bfloat16)),
    "gram": (gram, on((64, 16, 384), jnp.float32)),
    "gram_odd": (gram, on((101, 33, 31), jnp.bfloat16)),
    "gather": routing(gather_rows, 256, 128, 1152, jnp.float32),
    "gather_odd": routing(gather_rows, 77, 31, 33, jnp.int8),
    "scatter": routing(scatter_rows, 256, 128, 1152, jnp.bfloat16),
    "scatter_odd": routing(scatter_rows, 77, 31, 33, jnp.int8),
    "scatter_add": routing(scatter_rows, 256, 512, 1152, jnp.bfloat16, add=True),
    "scatter_add_odd": routing(scatter_rows, 77, 301, 33, jnp.int8, add=True),
}
# The layers of DiT-XL/2 at 32 images of 256 tokens.
LARGE = {
    "qkv_w8": layer(8192, 1152, 3456, 8),
    "fc1_w4_gelu": layer(8192, 1152, 4608, 4, activation="gelu"),
    "fc2_w4_zero": layer(8192, 4608, 1152, 4, zero=True, x_type=jnp.bfloat16),
    "adaln_w4": layer(32, 1152, 6912, 4),
    "qk": attention(qk, 32, 256, 256, 16, 72),
    "pv": attention(pv, 32, 256, 256, 16, 72, zero=True),
}


def triton_calls(function, *arguments) -> list[dict]:
    """The Triton kernels of `function` lowered for CUDA: their text, operands, warps and stages."""
    with gpu.compiling_for_gpu():
        program = jax.jit(partial(function, implementation="pallas_gpu"))
        lowered = program.trace(*arguments).lower(lowering_platforms=("cuda",))
    found = []

    def visit(operation):
        if operation.name == "stablehlo.custom_call":
            config = operation.attributes["mhlo.backend_config"]
            assert ir.StringAttr(operation.attributes["call_target_name"]).value == TARGET
            context = ir.Context()
            dialect.register_dialect(context)
            text = str(ir.Module.parse(config["ir"].value_bytes, context))
            numbers = {name: config[name].value for name in ("num_warps", "num_stages")}
            given = [str(operand.type) for operand in operation.operands]
            found.append(numbers | {"text": text, "given": given})
        return ir.WalkResult.ADVANCE

    module = lowered.compiler_ir("stablehlo")
    assert module is not None
    module.operation.walk(visit)
    return found


def products(text: str) -> list[tuple[str, ...]]:
    """(left, right, sum) element types of every product in a kernel's text."""
    tensor = r"tensor<\d+x\d+x(\w+)>"
    dots = rf"= tt\.dot .*: {tensor} \* {tensor} -> {tensor}"
    found = re.findall(dots, text)
    assert len(found) == text.count("tt.dot ")
    return found


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_given_to_triton_in_integers(name):
    types, program = PRODUCTS[name]
    calls = triton_calls(*program)
    assert len(calls) == 1 + ("online" in name)  # a kernel for each token's own scale first
    planes = {"w8": 1, "w4": 2, "w2": 4}[name[:2]]
    assert products(calls[-1]["text"]) == [types] * planes
    packed = program[2].shape
    assert f"tensor<{packed[1]}x{packed[0]}xi8>" in calls[-1]["given"]
    loop = calls[-1]["text"].split("scf.for")[1].split("scf.yield")[0]
    assert ("arith.mulf" in loop) == (name in PROLOGUE)


@pytest.mark.parametrize("name", HEADS)
def test_products_of_attention_are_given_to_triton_in_integers(name):
    program, given = HEADS[name]
    (call,) = triton_calls(*program)
    assert products(call["text"]) == [INTEGER]
    # The sums are the same if only one side is masked, but the other would read beyond its array.
    loads = re.findall(r"tt\.load (.*) : tensor<\w+x!tt\.ptr<i8>>", call["text"])
    assert len(loads) == 2
    assert all("," in load for load in loads) or "odd" not in name
    assert call["given"][:2] == [f"tensor<{shape}xi8>" for shape in given]
    columns = given[1].rsplit("x", 1)[0]
    zero = [f"tensor<{columns}xi32>"] if program[4] is not None else []
    assert call["given"][2:] == [*zero, f"tensor<{columns.split('x')[0]}xf32>"]


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_kernels_lower(name):
    (call,) = triton_calls(*OTHERS[name])
    f32 = [("f32", "f32", "f32")]
    assert products(call["text"]) == (f32 if name.startswith("gram") else [])


def test_a_gpu_is_asked_for_by_name_and_refused_elsewhere():
    x, weight, ones = jnp.ones((2, 8)), jnp.ones((8, 4), jnp.int8), jnp.ones(4)
    index = jnp.zeros((1, 1), jnp.int32)
    requests = {
        "quantized_matmul": lambda **name: quantized_matmul(
            x, weight, 1.0, None, ones, None, None, **name
        ),
        "weight_only_matmul": lambda **name: weight_only_matmul(x, weight, ones, None, **name),
        "quantize_activations": lambda **name: quantize_activations(x, **name),
        "gram": lambda **name: gram(x, **name),
        "attention_products": lambda **name: qk(x[:, :, None, None], x[:, :, None, None], **name),
        "gather_rows": lambda **name: gather_rows(x[None], index, **name),
        "scatter_rows": lambda **name: scatter_rows(x[None], index, x[None, :1], **name),
    }
    for name, request in requests.items():
        with pytest.raises(InputError, match=f"{name}: .*needs a GPU .*back end is 'cpu'"):
            request(implementation="pallas_gpu")
    with pytest.raises(InputError, match="needs a GPU"):
        pallas_gpu.accumulate(weight.T, weight[:, :1])


def test_a_jax_without_triton_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr("jax.experimental.pallas.triton", raising=False)
    with pytest.raises(InputError, match=r"has no jax\.experimental\.pallas\.triton"):
        gram(jnp.ones((2, 3)), implementation="pallas_gpu_interpret")


@pytest.mark.parametrize(
    ("rows", "channels", "block"),
    [(8192, 1152, (128, 256)), (8192, 32, (64, 32)), (32, 6912, (32, 64)), (1, 6912, (16, 64))],
)
def test_blocks_are_the_largest_that_leave_enough_programs(rows, channels, block):
    assert pallas_gpu._block(rows, channels) == block


@pytest.mark.parametrize("name", LARGE)
def test_hoppers_own_integer_instruction_within_its_registers(name, tmp_path):
    triton = pytest.importorskip("triton", minversion="3.9")
    triton_ir = import_module("triton._C.libtriton").ir
    target = import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    backend = import_module("triton.backends.nvidia.compiler").CUDABackend(target)
    (call,) = triton_calls(*LARGE[name])
    path = tmp_path / "kernel.ttir"
    path.write_text(call["text"])
    options = {key: call[key] for key in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    context = triton_ir.context()
    triton_ir.load_dialects(context)
    backend.load_dialects(context)
    module = triton_ir.parse_mlir_module(str(path), context)
    module.context = context
    path.write_text(str(backend.make_ttir(module, {}, backend.parse_options(options), 90)))
    kernel = triton.compile(str(path), target=target, options=options)
    assert re.findall(r"wgmma\.mma_async\S*\.s32\.s8\.s8", kernel.asm["ptx"])
    assert kernel.metadata.shared <= SHARED_MEMORY
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(reader), "-res-usage", str(tmp_path / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "STACK:0" in usage and "LOCAL:0" in usage  # no register is spilled
