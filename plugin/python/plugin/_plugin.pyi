# SPDX-License-Identifier: Apache-2.0
"""The compiled module. The package's functions check what they hand to it, and say what comes back."""

from typing import Any

def __getattr__(name: str) -> Any: ...
