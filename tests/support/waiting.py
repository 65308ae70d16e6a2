# SPDX-License-Identifier: Apache-2.0
"""Waiting for what comes in its own time, which on a busy machine is many times that of an idle one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def eventually(condition: Callable[[], Any], seconds: float = 60.0) -> bool:
    """Whether a condition comes true in this time; it returns as soon as it does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
