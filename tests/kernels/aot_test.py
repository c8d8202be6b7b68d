"""Every TPU kernel, and a quantised sampler, compiled for chips that this machine does not have.

The compiler is libtpu's (extra `aot`); nothing runs. See `aot_programs.py`, which is what runs in
the child process.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mpqdiff.quantize.pack import packed_shape

ACCELERATORS = {"v5e:2x2": "v5litepod-4", "v6e:2x2": "v6e-4", "v5e:16x16": "v5litepod-256"}
CHIPS = {"v5e:2x2": "TPU v5 lite", "v6e:2x2": "TPU v6 lite", "v5e:16x16": "TPU v5 lite"}
INTEGER = "i8 i8 i32 i32"  # left, right, accumulator, result
PRODUCTS = {"product_int8": [INTEGER], "product_bfloat16": ["bf16 bf16 f32 f32"]}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for a TPU needs libtpu: pip install 'mpqdiff[aot]'",
)


def _compiled(topology: str, dump: Path, *groups: str) -> dict:
    """What the child prints, compiling `groups` for `topology`."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": ACCELERATORS[topology],
        "LIBTPU_INIT_ARGS": f"--xla_mosaic_dump_to={dump}",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
    }
    child = [sys.executable, str(Path(__file__).with_name("aot_programs.py"))]
    done = subprocess.run(
        [*child, topology, str(dump), *groups], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["v5e:2x2", "v6e:2x2"])
def small(request, tmp_path_factory) -> dict:
    found = _compiled(request.param, tmp_path_factory.mktemp("mosaic"), "kernels", "sampler")
    assert found["chip"] == CHIPS[request.param]
    return found


def check_kernels(programs: dict) -> None:
    """One kernel each, integer products in integers, and nothing beside it: no copy of weights,
    no padding of tokens. Grams of [N,P,D] are given a copy as [N,P D], in which rows lie together.
    """
    for name, program in programs.items():
        (call,) = program["calls"]
        kernel = call.split("/")[-2]
        if kernel.startswith("product"):
            assert program["products"] == PRODUCTS[kernel.rsplit("_", 1)[0]], name
            assert kernel.endswith(re.search(r"w\d", name).group()), name
        if kernel != "gram":
            assert program["temporary_bytes"] <= program["argument_bytes"] // 100, name


def check_sampler(program: dict) -> None:
    """Every site is one kernel at its width, under its own name; the loop carries its packed
    weights and no other form of any weight is anywhere in the program."""
    assert program["complaints"] == []
    called = {}
    for call in program["calls"]:
        site, kernel = re.search(r"site\[([^\]]+)\].*/(product_\w+)/pallas_call", call).groups()
        assert called.setdefault(site, kernel) == kernel
    wanted = {
        path.replace("/", "."): f"product_int8_w{bits}"
        for path, (_, bits) in program["sites"].items()
    }
    assert called == wanted
    assert len(program["calls"]) == len(wanted)
    assert program["products"] == [INTEGER]

    packed = [packed_shape(shape, bits) for shape, bits in program["sites"].values()]
    (loop,) = program["loops"]
    carried = Counter(re.findall(r"\b(s8\[\d+,\d+\])", loop))
    expected = Counter(f"s8[{rows},{columns}]" for rows, columns in packed)
    table = carried - expected
    assert expected <= carried and sum(table.values()) == 1  # the zero points of the steps
    for shape, _ in program["sites"].values():
        opened = f"[{packed_shape(shape, 8)[0]},{shape[-1]}]"
        for kind in ("f32", "bf16", "s32", "s4"):
            found = kind + opened in program["arrays"]
            assert not found or (kind, opened) == ("f32", program["positions"])
        if f"s8{opened}" not in expected:
            assert f"s8{opened}" not in program["arrays"]
    # Tiles of 8 or 32 rows and 128 columns pad what is smaller than one.
    assert program["passed_bytes"] <= program["argument_bytes"] <= 1.1 * program["passed_bytes"]


def test_every_kernel_compiles_to_integer_products_alone(small):
    assert len(small["kernels"]) == 24
    check_kernels(small["kernels"])
    called = {
        name: program["calls"][0].split("/")[-2] for name, program in small["kernels"].items()
    }
    for operation in ("gather", "scatter"):
        names = [name for name in called if name.startswith(operation)]
        assert {called[name] for name in names} == {f"{operation}_rows"}
        assert not any(small["kernels"][name]["products"] for name in names)


def test_a_quantised_sampler_multiplies_packed_integers(small):
    check_sampler(small["sampler"]["pallas_tpu"])


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_the_whole_dit_xl(topology, tmp_path):
    found = _compiled(topology, tmp_path, "large", "xl")
    _log(topology, found)
    check_kernels(found["large"])
    ours, theirs = found["xl"]["pallas_tpu"], found["xl"]["kernels"]
    check_sampler(ours)
    assert len(ours["sites"]) == 5 * 28 + 5
    assert not theirs["calls"]


@pytest.mark.slow
def test_a_sampler_with_its_batch_over_256_chips(tmp_path):
    found = _compiled("v5e:16x16", tmp_path, "sharded")
    _log("v5e:16x16", found)
    program = found["sharded"]["pallas_tpu"]
    assert program["devices"] == 256
    check_sampler(program)


def _log(topology: str, found: dict) -> None:
    """A table to keep with the results (`pytest -s`)."""
    print(f"\n{found.pop('chip')} ({topology})")
    for group, programs in found.items():
        for name, program in programs.items():
            numbers = [program[key] for key in ("argument_bytes", "temporary_bytes", "code_bytes")]
            columns = "".join(f"{number:>14,}" for number in numbers)
            print(f"{group:<8} {name:<14} {len(program['calls']):>4}{columns}")
