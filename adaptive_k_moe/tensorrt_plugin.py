# SPDX-License-Identifier: Apache-2.0
"""Makes our operators known to TensorRT, for the builder and for the runtime."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from adaptive_k_moe.errors import DependencyError

PLUGIN_VARIABLE = "ADAPTIVE_K_TENSORRT_LIBRARY"
PLUGIN_NAME = "libadaptive_k_tensorrt.so"


def load_plugin(trt: Any) -> None:
    """Load the plugin's library, unless TensorRT knows its operators.

    Args:
        trt: the module ``tensorrt``.

    Raises:
        DependencyError: the library is not there, or TensorRT cannot load it.
    """
    registry = trt.get_plugin_registry()
    if registry.get_creator("AdaptiveKMoe", "1", "adaptive_k") is None:
        library = plugin_library()
        if registry.load_library(str(library)) is None:
            raise DependencyError(f"TensorRT cannot load the plugin {library}.")


def plugin_library() -> Path:
    """The plugin's library: where the environment says, or in the installed package.

    Raises:
        DependencyError: it is not there.
    """
    # Found and not imported: the package's own libraries, for CPUs, are not needed beside a GPU.
    spec = importlib.util.find_spec("adaptive_k_moe.plugin")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or []]
    named = os.environ.get(PLUGIN_VARIABLE)
    candidates = [Path(named)] if named else [folder / PLUGIN_NAME for folder in folders]
    for library in candidates:
        if library.is_file():
            return library
    raise DependencyError(
        f"the TensorRT plugin {candidates[0] if candidates else PLUGIN_NAME} is not there: build it "
        f"(docs/tensorrt_plugin.md) and name it in {PLUGIN_VARIABLE}."
    )
