# SPDX-License-Identifier: Apache-2.0
"""Tests that need an NVIDIA GPU; elsewhere each is skipped with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_device import Gpu, missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    reason = missing()
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    return Gpu()
