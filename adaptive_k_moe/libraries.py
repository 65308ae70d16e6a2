# SPDX-License-Identifier: Apache-2.0
"""Finds the compiled libraries for GPUs, which are built apart from the package."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from adaptive_k_moe.errors import DependencyError


def find_library(name: str, variable: str, title: str, build: str) -> Path:
    """A library: where the environment says, or in the installed package.

    Args:
        name: its file's.
        variable: of the environment, with its path.
        title: what errors call it.
        build: how it is built, for the error.

    Raises:
        DependencyError: it is not there.
    """
    # Found and not imported: the package's own libraries, for CPUs, are not needed beside a GPU.
    spec = importlib.util.find_spec("adaptive_k_moe.plugin")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or []]
    named = os.environ.get(variable)
    candidates = [Path(named)] if named else [folder / name for folder in folders]
    for library in candidates:
        if library.is_file():
            return library
    raise DependencyError(
        f"the {title} {candidates[0] if candidates else name} is not there: {build} and name it in {variable}."
    )
