# SPDX-License-Identifier: Apache-2.0
"""Builds the interpreter's library once and loads it."""

from __future__ import annotations

import pytest
from cuda_build import ROOT, build
from cuda_launcher import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Interpreter:
    """The kernels in the interpreter."""
    build(ROOT / "plugin" / "testing" / "simt", ROOT / "build" / "simt", "-DCMAKE_BUILD_TYPE=Release")
    return Interpreter(str(ROOT / "build" / "simt" / "libadaptive_k_simt.so"))
