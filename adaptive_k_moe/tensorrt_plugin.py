# SPDX-License-Identifier: Apache-2.0
"""Makes our operators known to TensorRT, for the builder and for the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adaptive_k_moe.errors import DependencyError
from adaptive_k_moe.libraries import find_library

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
    return find_library(PLUGIN_NAME, PLUGIN_VARIABLE, "TensorRT plugin", "build it (docs/tensorrt_plugin.md)")
