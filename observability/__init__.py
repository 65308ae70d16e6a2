# SPDX-License-Identifier: Apache-2.0
"""Seeing what an engine does: metrics, structured logs, OpenTelemetry spans, traces of k, A/B tests.

The parts are modules, imported when they are first asked for::

    from adaptive_k_moe.observability import ab_test, debugger, get_logger, metrics
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = ("ab_test", "debugger", "metrics")
_FUNCTIONS = {"get_logger": "logs"}

__all__ = ["ab_test", "debugger", "get_logger", "metrics"]  # found by __getattr__


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
