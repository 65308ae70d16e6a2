# SPDX-License-Identifier: Apache-2.0
"""The operators compiled for ARM, emulated, are held to the oracles by the tests of this machine's (`make arm`)."""

# ruff: noqa: F403
from __future__ import annotations

from collections.abc import Iterator

import pytest
from emulated import Emulated, missing
from test_mamba import *
from test_moe import *
from test_routing import *
from test_sharing import *

from adaptive_k_moe import plugin
from adaptive_k_moe.plugin import instruction_set

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module", autouse=True)
def emulated() -> Iterator[Emulated]:
    """Calls of the operators go to the emulator, those about shapes and tables to this machine's module."""
    native, program = plugin._plugin, Emulated()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("instruction_set", "moe", "route", "mamba2"):
            patch.setattr(native, name, getattr(program, name))
        yield program
    program.close()


def test_the_operators_are_those_for_arm(emulated: Emulated) -> None:
    assert emulated.instruction_set() == instruction_set() == "portable"
