# SPDX-License-Identifier: Apache-2.0
"""Tests that need an NVIDIA GPU; elsewhere each is skipped with the reason."""

from __future__ import annotations

import os
from collections.abc import Generator
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


_used: list[Gpu] = []  # by this process: none or one


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    _used.append(Gpu())
    return _used[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A lost context would fail every later test of this process: a worker of pytest-xdist ends, and is replaced."""
    result = yield
    if _used and (error := _used[0].driver.broken()):
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        item.session.shouldstop = f"the GPU's context is lost: {error}"
    return result
