# SPDX-License-Identifier: Apache-2.0
"""The device, and the library for it: the one that was built before, else it is compiled here.

    PYTHONPATH=tests/support python tests/gpu/first_run/library.py OUT_DIR

Adds the rows `device` and `library` to OUT_DIR/results.jsonl; the latter's `path` is the library.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_device import DRIVER, LIBRARY, ROOT, CudaError, Driver
from rows import FAILED, PASSED, Rows

PACKAGES = ("torch", "triton", "transformers", "numpy", "ml_dtypes", "pytest", "pytest-xdist", "pytest-timeout")
CUTLASS = ROOT / "build" / "cutlass"
BUILT = ROOT / "build" / "cuda_here" / "libadaptive_k_cuda.so"


def versions() -> dict[str, str]:
    """Of Python and of the packages that the stages use, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def loads(library: Path) -> str | None:
    """Why the library does not load, or None."""
    try:
        return None if hasattr(ctypes.CDLL(str(library)), "adaptive_k_cuda_launch") else "lacks adaptive_k_cuda_launch"
    except OSError as wrong:
        return str(wrong)


def cannot_compile(nvcc: str | None) -> str | None:
    """What the machine lacks to compile the library, or None."""
    lacking = []
    if nvcc is None:
        lacking.append("nvcc (CUDA 13's toolkit)")
    if shutil.which("cmake") is None:
        lacking.append("cmake")
    if not (
        os.environ.get("ADAPTIVE_K_CUTLASS_DIR") or CUTLASS.exists() or importlib.util.find_spec("cutlass_library")
    ):
        lacking.append("CUTLASS's headers (build/cutlass, ADAPTIVE_K_CUTLASS_DIR or the package nvidia-cutlass)")
    return ", ".join(lacking) or None


def compile_library(capability: str, nvcc: str) -> str | None:
    """Compiles for one compute capability into BUILT; what went wrong, or None."""
    number = capability.replace(".", "")
    cutlass = os.environ.get("ADAPTIVE_K_CUTLASS_DIR") or (str(CUTLASS) if CUTLASS.exists() else "")
    options = [
        *("-DADAPTIVE_K_CUDA=ON", "-DADAPTIVE_K_OPENVINO=OFF", "-DADAPTIVE_K_PYTHON=OFF"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CUDA_COMPILER={nvcc}"),
        # Hopper's and Blackwell's products need the instructions of exactly that architecture.
        f"-DADAPTIVE_K_CUDA_ARCHITECTURES={number}{'a' if int(number) >= 90 else ''}",
        f"-DADAPTIVE_K_CUTLASS_DIR={cutlass}",
    ]
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(BUILT.parent), *ninja, *options],
        ["cmake", "--build", str(BUILT.parent), "--target", "adaptive_k_cuda", "--parallel", str(os.cpu_count() or 1)],
    ):
        wrong = ""
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as program:
            for line in program.stdout or ():
                print(line, end="", flush=True)
                if "error" in line.lower():
                    wrong = wrong or line.strip()
        if program.returncode:
            return f"{' '.join(command[:3])} failed: {wrong or 'see log.txt'}"
    return loads(BUILT)


def find_or_compile(capability: str) -> tuple[Path | None, str]:
    """The library and how it came about, or None and why there is none."""
    notes = []
    for library in (LIBRARY,) if "ADAPTIVE_K_CUDA_LIBRARY" in os.environ else (LIBRARY, BUILT):
        if library.exists():
            wrong = loads(library)
            if wrong is None:
                return library, "built before"
            notes.append(f"{library} does not load ({wrong})")
        else:
            notes.append(f"{library} is not there")
    nvcc = shutil.which("nvcc") or next(iter(map(str, Path("/usr/local").glob("cuda*/bin/nvcc"))), None)
    lacking = cannot_compile(nvcc)
    if lacking or nvcc is None:
        return None, f"{notes[0]}, and it cannot be compiled here without {lacking}: see docs/hardware.md"
    wrong = compile_library(capability, nvcc)
    return (None, f"{notes[0]}, and {wrong}") if wrong else (BUILT, "compiled here")


def main() -> None:
    rows = Rows(Path(sys.argv[1]))
    try:
        driver = Driver()
        rows.add(
            "library", "device", PASSED, name=driver.name, capability=driver.capability, driver=driver.version(),
            free_gb=round(driver.free_memory() / 1e9, 1), versions=versions(), host=platform.platform(),
        )  # fmt: skip
    except (CudaError, OSError) as wrong:
        error = str(wrong) if isinstance(wrong, CudaError) else f"no NVIDIA driver here ({DRIVER}): {wrong}"
        rows.add("library", "device", FAILED, error=error, versions=versions(), host=platform.platform())
        raise SystemExit(1) from None
    library, how = find_or_compile(driver.capability)
    if library is None:
        rows.add("library", "library", FAILED, error=how)
        raise SystemExit(1)
    data = library.read_bytes()
    rows.add("library", "library", PASSED, path=str(library), how=how, sha256=hashlib.sha256(data).hexdigest())


if __name__ == "__main__":
    main()
