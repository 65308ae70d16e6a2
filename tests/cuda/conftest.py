# SPDX-License-Identifier: Apache-2.0
"""Builds the interpreter's library once and loads it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_launcher import Interpreter

ROOT = Path(__file__).resolve().parents[2]


def build(source: Path, directory: Path, *options: str) -> None:
    """Configures and builds a CMake project; the compiler's words are in the error of a failure."""
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", str(source), "-B", str(directory), *ninja, *options],
        ["cmake", "--build", str(directory), "--parallel", str(min(os.cpu_count() or 1, 4))],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.fail(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


@pytest.fixture(scope="session")
def interpreter() -> Interpreter:
    """The kernels in the interpreter."""
    build(ROOT / "plugin" / "testing" / "simt", ROOT / "build" / "simt", "-DCMAKE_BUILD_TYPE=Release")
    return Interpreter(str(ROOT / "build" / "simt" / "libadaptive_k_simt.so"))
