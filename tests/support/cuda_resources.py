# SPDX-License-Identifier: Apache-2.0
"""What each kernel in libadaptive_k_cuda.so needs of a multiprocessor, read from the library itself.

`python tests/support/cuda_resources.py` prints the table; with `--update` it becomes the one in resources.json that
the test holds the library to. Needs cuobjdump (the nvidia-cuda-cuobjdump wheel, or a CUDA toolkit).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "build" / "cuda" / "libadaptive_k_cuda.so"
TABLE = ROOT / "tests" / "cuda" / "resources.json"

# Threads of a block and the dynamic shared memory that a launch asks for, by the kernel's name; the others
# are CUTLASS's.
BLOCKS = {
    "route_and_plan_kernel": (512, 16 * 2328 + 10368 + 1280),
    "share_kernel": (512, 10368 + 4608),
    "route_by_warp": (128, 4 * 2328),
    "route_by_block": (128, 8520),
    "plan_one_chunk": (512, 10368),
    "plan_count": (512, 10368),
    "plan_scan": (512, 0),
    "plan_place": (512, 10368),
    "decode_product": (128, 256),
    "decode_integers_product": (128, 2048),
    "gather_kernel": (128, 0),
    "activate_kernel": (128, 0),
    "combine_kernel": (128, 0),
    "list_tiles": (512, 64),
    "copy_states": (256, 0),
    "mamba_convolve_kernel": (128, 0),
    "mamba_recur_kernel": (128, 2568),
    "mamba_chunks_kernel<64>": (128, 28672),
    "mamba_chunks_kernel<128>": (128, 45056),
    "mamba_chunks_kernel<256>": (128, 77824),
    "mixed_product<int8, 128 rows>": (256, 73728),
    "mixed_product<int4, 128 rows>": (256, 61440),
    "mixed_product<int8, 32 rows>": (256, 49152),
    "mixed_product<int4, 32 rows>": (256, 32768),
    "cutlass_sm80<128x128x32>": (128, 65536),
    "cutlass_sm80<32x128x64>": (128, 81920),
}

# Of a multiprocessor: threads, blocks, shared memory in KiB (a block takes one more than it asks for).
MULTIPROCESSOR = {
    "sm_80": (2048, 32, 164),
    "sm_86": (1536, 16, 100),
    "sm_89": (1536, 24, 100),
    "sm_90a": (2048, 32, 228),
    "sm_100a": (2048, 32, 228),
    "sm_120a": (1536, 24, 100),
}
REGISTERS = 65536

ELEMENTS = {
    "4Half": "float16",
    "8BFloat16": "bfloat16",
    "f": "float32",
    "6half_t": "float16",
    "10bfloat16_t": "bfloat16",
}
FORMATS = {0: "element", 4: "int8", 5: "int4"}


def tool(name: str) -> str | None:
    """The path of cuobjdump or nvdisasm: beside this Python's packages, or on PATH."""
    for base in sys.path:
        candidate = Path(base) / "nvidia" / "cu13" / "bin" / name
        if candidate.exists():
            return str(candidate)
    return shutil.which(name)


def cuobjdump(*arguments: str) -> str:
    program = tool("cuobjdump")
    if program is None:
        raise FileNotFoundError("cuobjdump is not installed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    # It calls nvdisasm by name.
    path = f"{Path(program).parent}:/usr/bin:/bin"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True, env={"PATH": path})
    return done.stdout


def kernel_name(mangled: str) -> str:
    """A readable name that does not change with the compiler's mangling of types."""
    tile = re.search(r"GemmShapeILi(\d+)ELi(\d+)ELi(\d+)E", mangled)
    element = re.search(r"(6half_t|10bfloat16_t)", mangled)
    if "11GemmGrouped" in mangled and tile and element:
        return f"cutlass_sm80<{'x'.join(tile.groups())}, {ELEMENTS[element[1]]}>"
    if "13GemmUniversal" in mangled and element:
        family = "sm90" if "MainloopSm90" in mangled else "sm100"
        tile = re.search(r"ILi(\d+)EEEN\w{1,3}_ILi(\d+)EEEN\w{1,3}_ILi(\d+)EEEEEENS_(?:6half_t|10bfloat16_t)", mangled)
        shape = "x".join(tile.groups()) if tile else "?"
        return f"cutlass_{family}<{shape}, {ELEMENTS[element[1]]}>"
    if fill := re.search(r"\d+(fill_sm80|fill_cutlass3)I", mangled):
        return fill[1]
    ours = re.search(
        r"\d+(route_and_plan_kernel|share_kernel|route_by_warp|route_by_block|plan_one_chunk|plan_count|plan_scan|plan_place|list_tiles|copy_states)",
        mangled,
    )
    if ours:
        return ours[1]
    if ours := re.search(
        r"\d+(mamba_(?:convolve|recur|chunks)_kernel)I(?:NS\w?_)?(4Half|8BFloat16|f)E?(?:Li(\d+))?", mangled
    ):
        name, kind, size = ours.groups()
        words = [ELEMENTS[kind]]
        if name == "mamba_convolve_kernel":
            words.append("4 taps" if size == "4" else "any taps")
        elif size:
            words.append(size)
        return f"{name}<{', '.join(words)}>"
    ours = re.search(
        r"\d+(decode_product|decode_integers_product|mixed_product|gather_kernel|activate_kernel|combine_kernel)I(.*)",
        mangled,
    )
    if ours is None:
        return mangled
    name, rest = ours.groups()
    element = re.match(r"(?:NS\w?_)?(4Half|8BFloat16|f)", rest)
    words = [ELEMENTS[element[1]]] if element else []
    if weights := re.search(r"WeightFormatE(\d)E", rest):
        words.append(FORMATS[int(weights[1])])
    if rows := re.search(r"WeightFormatE\dELi(\d+)E", rest):
        words.append(f"{rows[1]} rows")
    if direction := re.search(r"ELb([01])E", rest):
        words.append("up" if direction[1] == "1" else "down")
    if name == "combine_kernel":
        words.append("from float32" if re.match(r"(?:NS\w?_\w+E|f)f", rest) else "from its own")
    return f"{name}<{', '.join(words)}>"


def block_of(name: str) -> tuple[int, int] | None:
    """Threads and dynamic shared memory of a kernel, where they are known."""
    for key, block in BLOCKS.items():
        base, _, argument = key.rstrip(">").partition("<")
        if name.split("<")[0] == base and argument in name:
            return block
    return None


def occupancy(arch: str, registers: int, threads: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once. Registers come in units of 256 a warp."""
    most_threads, most_blocks, kib = MULTIPROCESSOR[arch]
    a_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // a_warp // (threads // 32)
    return min(most_blocks, most_threads // threads, by_registers, (kib << 10) // (shared + 1024))


def read(library: Path = LIBRARY) -> dict[str, dict[str, dict[str, Any]]]:
    """For each architecture and kernel: registers, stack (bytes that spill or are indexed), blocks at once."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    arch = ""
    name = ""
    for line in cuobjdump("-res-usage", str(library)).splitlines():
        if found := re.match(r"arch = (\w+)", line.strip()):
            arch = found[1]
        elif found := re.match(r"Function (\w+):", line.strip()):
            name = kernel_name(found[1])
        elif found := re.match(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line.strip()):
            registers, stack, shared, local = map(int, found.groups())
            if int(arch[3:].rstrip("a")) >= 90 and shared >= 1024:
                shared -= 1024  # what the system keeps of every block; occupancy() counts it for all
            entry: dict[str, Any] = {"registers": registers, "stack": stack + local}
            if (block := block_of(name)) and arch in MULTIPROCESSOR:
                threads, dynamic = block
                entry["threads"] = threads
                entry["shared"] = shared + dynamic
                entry["blocks"] = occupancy(arch, registers, threads, shared + dynamic)
            if arch in MULTIPROCESSOR:
                table.setdefault(arch, {})[name] = entry
    return {arch: dict(sorted(kernels.items())) for arch, kernels in sorted(table.items())}


# An instruction: its address, its name without the predicate, and what follows.
Instruction = tuple[int, str, str]


def code(library: Path, arch: str) -> dict[str, list[Instruction]]:
    """The machine code of an architecture's kernels."""
    found: dict[str, list[Instruction]] = {}
    name = ""
    for line in cuobjdump("-arch", arch, "-sass", str(library)).splitlines():
        if function := re.search(r"Function : (\w+)", line):
            name = kernel_name(function[1])
            found.setdefault(name, [])
        elif one := re.match(
            r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)([^;]*);",
            line,
        ):
            found[name].append((int(one[1], 16), one[2], one[3]))
    return found


def innermost_loops(kernel: list[Instruction]) -> list[list[Instruction]]:
    """What lies between the target of a jump back and the jump, where no other loop is inside."""
    spans = [
        (int(target[1], 16), at)
        for at, name, rest in kernel
        if name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", rest)) and int(target[1], 16) < at
    ]
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[one for one in kernel if first <= one[0] <= last] for first, last in inner]


def instructions_per_weight(kernel: list[Instruction], weights_of_a_load: int) -> list[float]:
    """For each loop that streams weights by 16-byte loads past the L1 cache: instructions a weight, of one lane."""
    loops = [
        (len(loop), sum(name.startswith("LDG.E.NA.128") for _, name, _ in loop)) for loop in innermost_loops(kernel)
    ]
    return [length / (loads * weights_of_a_load) for length, loads in loops if loads]


def instructions_per_product(kernel: list[Instruction]) -> float:
    """Of the loop with the most mma.sync: instructions for each of them, their copies and scales included."""
    loops = [(sum(name.startswith("HMMA") for _, name, _ in loop), len(loop)) for loop in innermost_loops(kernel)]
    products, length = max(loops)
    return length / products


def compiler() -> str | None:
    """The release of the nvcc that is installed; registers are allocated anew with each."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"release ([\d.]+)", done.stdout)
    return found[1] if found else None


def main() -> None:
    table = read()
    for arch, kernels in table.items():
        print(f"\n{arch:44} registers  stack  threads  shared  blocks")
        for name, entry in kernels.items():
            columns = [entry.get(key, "") for key in ("registers", "stack", "threads", "shared", "blocks")]
            print(f"{name:44} {columns[0]:9} {columns[1]:6} {columns[2]!s:>8} {columns[3]!s:>7} {columns[4]!s:>7}")
    if "--update" in sys.argv:
        TABLE.write_text(json.dumps({"nvcc": compiler(), "kernels": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
