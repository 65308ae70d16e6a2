# SPDX-License-Identifier: Apache-2.0
"""Dependencies between the packages point one way, as docs/architecture.md says; imports inside functions count."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# What each package may use besides itself and the root's modules.
ALLOWED = {
    "adaptive_k_moe": set(),
    "client": set(),
    "engine_builder": {"plugin"},
    "torch_binding": {"torch", "vllm", "engine_builder", "plugin"},  # itself by its installed name first
    "runtime": {"plugin", "torch"},
    "observability": {"runtime", "client"},
    "model_repository": {"runtime", "observability"},
    "calibration": {"engine_builder", "runtime", "plugin", "torch"},
}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_uses_only_those_below_it(package: str) -> None:
    packages = {*ALLOWED, "plugin", "torch", "vllm"} - {"adaptive_k_moe"}
    found = set()
    files = list((REPOSITORY / package).rglob("*.py"))
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("adaptive_k_moe"):
                parts = node.module.split(".")
                names = parts[1:2] or [alias.name for alias in node.names]
                found |= {(name, path.name) for name in names if name in packages and name != package}
    assert files
    assert {name for name, _ in found} <= ALLOWED[package], found
