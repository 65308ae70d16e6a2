# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ that tests run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build(source: Path, directory: Path, *options: str) -> None:
    """Configures and builds a CMake project; the compiler's words are in the error of a failure.

    Processes that share the tests wait here for each other's builds.
    """
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    directory.mkdir(parents=True, exist_ok=True)
    with alone(directory / "lock"):
        for command in (
            ["cmake", "-S", str(source), "-B", str(directory), *ninja, *options],
            ["cmake", "--build", str(directory), "--parallel", str(min(os.cpu_count() or 1, 4))],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.fail(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def build_interpreter() -> Path:
    """The library of the CUDA kernels and the interpreter that runs them."""
    directory = ROOT / "build" / "simt"
    build(ROOT / "plugin" / "testing" / "simt", directory, "-DCMAKE_BUILD_TYPE=Release")
    return directory / "libadaptive_k_simt.so"


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Lets one caller at a time in, of all threads and processes that name this file."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
