# SPDX-License-Identifier: Apache-2.0
"""Where a benchmark's figures go: JSON that names the machine."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    """The processor's name, as Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_results(output: Path, content: dict[str, Any]) -> None:
    """Write the figures and what they were measured with, the machine among it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": cpu_name(), "machine": platform.platform()}
    output.write_text(json.dumps({**machine, **content}, indent=1) + "\n")
    print(f"Written to {output}")
