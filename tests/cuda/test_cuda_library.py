# SPDX-License-Identifier: Apache-2.0
"""What can be read off the compiled library without a GPU: its architectures, that no kernel spills, what each
needs of a multiprocessor, and that the machine code holds the instructions that the design is about.

`make cuda` builds the library. Where nvcc is installed, ADAPTIVE_K_REQUIRE_CUDA=1 makes its absence a failure.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import cuda_resources as resources
import pytest
from cuda_cases import make_inputs
from cuda_launcher import POINTERS, Interpreter, Layer, Library
from cuda_mamba import CASES, make, run

ARCHITECTURES = {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"}


@pytest.fixture(scope="module")
def library() -> Path:
    """The built library, no older than its sources."""
    required = bool(os.environ.get("ADAPTIVE_K_REQUIRE_CUDA"))
    reason = ""
    if not resources.LIBRARY.exists():
        where = "" if shutil.which("nvcc") else " (nvcc is not installed here)"
        reason = f"{resources.LIBRARY.relative_to(resources.ROOT)} is not built: make cuda{where}"
    else:
        folders = ("plugin/cuda", "plugin/operator")
        sources = [
            path for folder in folders for path in (resources.ROOT / folder).rglob("*") if path.suffix in (".cu", ".h")
        ]
        newest = max(sources, key=lambda path: path.stat().st_mtime)
        if newest.stat().st_mtime > resources.LIBRARY.stat().st_mtime:
            reason = f"the library is older than {newest.relative_to(resources.ROOT)}: make cuda"
    if not reason and resources.tool("cuobjdump") is None:
        reason = "cuobjdump is not installed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    if reason:
        (pytest.fail if required else pytest.skip)(reason)
    return resources.LIBRARY


@pytest.fixture(scope="module")
def table(library: Path) -> dict[str, dict[str, dict[str, int]]]:
    return resources.read(library)


def test_holds_every_architecture_and_ptx(library: Path) -> None:
    listed = resources.cuobjdump("--list-elf", "--list-ptx", str(library))
    assert set(re.findall(r"\.(sm_\w+)\.cubin", listed)) == ARCHITECTURES
    assert set(re.findall(r"\.(sm_\w+)\.ptx", listed)) == {"sm_90"}


def test_no_kernel_spills(table: dict[str, dict[str, dict[str, int]]]) -> None:
    """Nothing on a stack. Routing may have a frame of a few bytes: its double-precision division is a call."""
    assert set(table) == ARCHITECTURES
    allowed = {"route_and_plan_kernel": 16, "route_by_block": 8}
    spilling = [
        (arch, name, entry["stack"])
        for arch, kernels in table.items()
        for name, entry in kernels.items()
        if entry["stack"] > allowed.get(name, 0)
    ]
    assert spilling == []


def test_resources_are_those_of_the_table(table: dict[str, dict[str, dict[str, int]]]) -> None:
    """Registers, shared memory and occupancy. After a change that means to alter them: cuda_resources.py --update."""
    expected = json.loads(resources.TABLE.read_text())
    if resources.compiler() not in (None, expected["nvcc"]):
        pytest.skip(f"the table is of nvcc {expected['nvcc']}, here is {resources.compiler()}")
    assert table == expected["kernels"]


def test_blocks_of_the_table_are_those_of_the_launches(interpreter: Interpreter) -> None:
    """Threads and shared memory, from which the occupancy follows, as the launcher asks for them."""
    for layer in (
        Layer(3, 32, 32, 4, path="decode"),
        Layer(3, 32, 32, 200, path="decode"),
        Layer(100, 32, 32, 4, path="decode"),
        Layer(200, 32, 32, 200, path="prefill"),
        Layer(3, 32, 32, 4, path="decode", weights="int8"),
        Layer(3, 32, 32, 4, path="prefill", weights="int8"),
        Layer(3, 32, 32, 4, path="prefill", weights="int4"),
        Layer(200, 32, 32, 4, path="prefill", weights="int8"),
        Layer(200, 32, 32, 4, path="prefill", weights="int4"),
    ):
        inputs, _ = make_inputs(layer, 0)
        interpreter.run(layer, inputs)
    for case in (CASES[5], CASES[8], CASES[11]):  # states of up to 64, 128 and 256
        given, _ = make(case, "float16")
        run(interpreter, case, given, "float16", in_place=False)
    declared = {(name.split("<")[0], *block) for name, block in resources.BLOCKS.items() if "cutlass" not in name}
    assert interpreter.launches() == declared


def test_each_architecture_has_its_products(table: dict[str, dict[str, dict[str, int]]]) -> None:
    for arch, kernels in table.items():
        families = {name.split("<")[0] for name in kernels if name.startswith("cutlass_")}
        assert families == {{"sm_90a": "cutlass_sm90", "sm_100a": "cutlass_sm100"}.get(arch, "cutlass_sm80")}
        for element in ("float16", "bfloat16"):
            assert (
                sum(f", {element}>" in name for name in kernels if name.startswith("cutlass_")) == 2
            )  # few rows, many rows


def instructions(library: Path, arch: str) -> dict[str, Counter[str]]:
    """How often each kernel of an architecture has each instruction."""
    found: dict[str, Counter[str]] = {}
    name = ""
    for line in resources.cuobjdump("-arch", arch, "-sass", str(library)).splitlines():
        if function := re.search(r"Function : (\w+)", line):
            name = resources.kernel_name(function[1])
            found.setdefault(name, Counter())
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", line):
            found[name][instruction[1]] += 1
    return found


@pytest.fixture(scope="module")
def hopper(library: Path) -> dict[str, Counter[str]]:
    return instructions(library, "sm_90a")


def count(kernel: Counter[str], pattern: str) -> int:
    return sum(times for name, times in kernel.items() if re.fullmatch(pattern, name))


def test_decode_streams_weights_by_128_bit_loads(hopper: dict[str, Counter[str]]) -> None:
    kernels = {name: code for name, code in hopper.items() if name.startswith("decode_")}
    assert len(kernels) == 18
    assert sum(name.startswith("decode_integers_product") for name in kernels) == 8
    for name, code in kernels.items():
        # Four weight rows (integers: two a lane), in each of the variants for one, two and more tokens.
        assert count(code, r"LDG\.E\.NA\.128\.CONSTANT.*") >= 12, name
        assert count(code, r"(LDL|STL).*") == 0, name


def test_hopper_prefill_is_wgmma_and_tma(hopper: dict[str, Counter[str]]) -> None:
    kernels = {name: code for name, code in hopper.items() if name.startswith("cutlass_sm90")}
    assert len(kernels) == 4
    for name, code in kernels.items():
        assert count(code, r"HGMMA\..*") >= 4, name
        assert count(code, r"UTMALDG\..*") >= 2, name
        assert count(code, r"HMMA\..*") == 0, name


def test_quantised_prefill_is_tensor_cores_and_asynchronous_copies(hopper: dict[str, Counter[str]]) -> None:
    kernels = {name: code for name, code in hopper.items() if name.startswith("mixed_product")}
    assert len(kernels) == 8
    for name, code in kernels.items():
        assert count(code, r"HMMA\.16816\.F32.*") >= (64 if "128 rows" in name else 16), name
        assert count(code, r"LDGSTS\.E.*128.*") >= 3, name
        assert count(code, r"LDS\.128") >= 4, name


# Instructions of the loops over the weights, at most: a weight in decode with so many tokens an expert, and a product
# of the tensor cores (mma.sync) in prefill with tiles of so many rows. docs/cuda.md says what they leave of a GPU.
MOST_PER_WEIGHT = {"int4": (3.1, 3.5, 4.8), "int8": (4.6, 5.1, 9.8)}  # to 2, 4 and 8 tokens
MOST_PER_PRODUCT = 13.2


def test_integers_take_few_instructions(library: Path) -> None:
    """Before the pairs: 5.7, 7.1 and 9.9 a weight of int4 for 1, 2 and 4 tokens, 30 a product in prefill."""
    code = resources.code(library, "sm_90a")
    for weights, most in MOST_PER_WEIGHT.items():
        for name in (name for name in code if name.startswith("decode_integers_product") and weights in name):
            found = sorted(resources.instructions_per_weight(code[name], 32 if weights == "int4" else 16))
            assert len(found) == 3, name
            assert all(one <= limit for one, limit in zip(found, most, strict=True)), (name, found)
    for name in (name for name in code if name.startswith("mixed_product") and "128 rows" in name):
        assert resources.instructions_per_product(code[name]) <= MOST_PER_PRODUCT, name


def test_the_scan_in_decode_moves_the_state_by_128_bits(hopper: dict[str, Counter[str]]) -> None:
    kernels = {name: code for name, code in hopper.items() if name.startswith("mamba_recur")}
    assert len(kernels) == 3
    for name, code in kernels.items():
        # Eight rows are loaded before the first is used, and each is written once.
        assert count(code, r"LDG\.E\.128.*") >= 8, name
        assert count(code, r"STG\.E\.128.*") >= 8, name
        assert count(code, r"LDG\.E\.(NA\.)?128\.CONSTANT.*") == 0, f"{name} reads what it writes as if constant"


def test_the_chunked_scan_is_tensor_cores_and_asynchronous_copies(hopper: dict[str, Counter[str]]) -> None:
    kernels = {name: code for name, code in hopper.items() if name.startswith("mamba_chunks")}
    assert len(kernels) == 6
    for name, code in kernels.items():
        assert count(code, r"HMMA\.16816\.F32.*") >= 24, name
        assert count(code, r"LDSM\.16\.MT88\.4") >= 4, name
        assert count(code, r"LDSM\.16\.M88\.4") >= 4, name
        assert count(code, r"LDGSTS\.E.*128.*") >= 2, name


def test_no_atomics_on_floats(hopper: dict[str, Counter[str]]) -> None:
    """Sums by atomics would depend on the order in which blocks run."""
    for name, code in hopper.items():
        assert count(code, r"(RED|ATOM|ATOMG|ATOMS)\..*F(16|32|64).*") == 0, name


def test_blackwell_prefill_is_tcgen05(library: Path) -> None:
    code = instructions(library, "sm_100a")
    kernels = {name: code for name, code in code.items() if name.startswith("cutlass_sm100")}
    assert len(kernels) == 4
    for name, counts in kernels.items():
        assert count(counts, r"UTCHMMA.*") >= 1, name
        assert count(counts, r"UTMALDG\..*") >= 2, name


def test_without_a_gpu_the_library_loads_and_says_no(library: Path) -> None:
    """Checks and sizes need no device; a launch without one returns an error instead of ending the process."""
    loaded = Library(str(library))
    layer = Layer(4, 64, 64, 8, policies=1, choices=1)
    assert loaded.check(layer) is None
    assert "at most 512" in (loaded.check(Layer(4, 64, 64, 513, policies=1, choices=1)) or "")
    assert loaded.workspace_size(layer) > 0
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert loaded.launch(layer, dict.fromkeys(POINTERS, 1 << 20), 1 << 20) != 0


def test_only_the_interface_is_exported(library: Path) -> None:
    import subprocess

    symbols = subprocess.run(["nm", "-D", "--defined-only", "-C", library], capture_output=True, text=True, check=True)
    names = {line.split(maxsplit=2)[2].split("(")[0] for line in symbols.stdout.splitlines()}
    ours = {name for name in names if "adaptive_k" in name}
    assert {"adaptive_k::cuda::check", "adaptive_k::cuda::launch", "adaptive_k::cuda::workspace_size"} <= ours
    assert {name for name in ours if not name.startswith("adaptive_k_cuda_")} == {
        "adaptive_k::cuda::check",
        "adaptive_k::cuda::launch",
        "adaptive_k::cuda::workspace_size",
    }
