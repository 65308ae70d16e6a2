# SPDX-License-Identifier: Apache-2.0
"""Builds the stand-in for a GPU's driver and for the compiled library."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cuda_build import alone, build_interpreter

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def stand_in() -> Path:
    """A library with the driver's functions and the kernels', which run in the interpreter."""
    simt = build_interpreter().parent
    library, source = simt / "libstand_in.so", Path(__file__).with_name("stand_in.cpp")
    with alone(simt / "lock"):
        # The interpreter is built anew where a header has changed that this one shares with it.
        newest = max(path.stat().st_mtime for path in (source, simt / "libadaptive_k_simt.so"))
        if not library.exists() or library.stat().st_mtime < newest:
            folders = [f"-I{ROOT / folder}" for folder in ("plugin", "plugin/testing")]
            command = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-DADAPTIVE_K_SIMT", *folders, str(source)]
            command += ["-o", str(library), f"-L{simt}", "-ladaptive_k_simt", "-Wl,-rpath,$ORIGIN", "-ldl"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    return library
