# SPDX-License-Identifier: Apache-2.0
"""Builds the interpreter's library once and loads it."""

from __future__ import annotations

import pytest
from cuda_build import build_interpreter
from cuda_launcher import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Interpreter:
    """The kernels in the interpreter."""
    return Interpreter(str(build_interpreter()))
