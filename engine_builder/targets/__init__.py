# SPDX-License-Identifier: Apache-2.0
"""Targets: what becomes of the one ONNX graph before it lies in the engine directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adaptive_k_moe.engine_config import BuildConfig
from adaptive_k_moe.model_config import PretrainedConfig

__all__ = ["lower"]


def lower(
    directory: Path,
    model: PretrainedConfig,
    build_config: BuildConfig,
    *,
    timing_cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Turn ``model.onnx`` in `directory` into the target's files, in place.

    Args:
        directory: where the graph lies.
        model: its sizes and dtype.
        build_config: the engine's target and sizes.
        timing_cache: file of kernel timings, which TensorRT's builder reads and writes.
        progress: called with the name of each phase of TensorRT's builder.

    Raises:
        BuildError: the target cannot run this model.
    """
    if build_config.target == "openvino":
        from adaptive_k_moe.engine_builder.targets.openvino import lower_for_openvino

        lower_for_openvino(directory, model, build_config)
    elif build_config.target == "tensorrt":
        from adaptive_k_moe.engine_builder.targets.tensorrt import lower_for_tensorrt

        lower_for_tensorrt(directory, model, build_config, timing_cache=timing_cache, progress=progress)
    elif build_config.target == "torch":
        from adaptive_k_moe.engine_builder.targets.torch import lower_for_torch

        lower_for_torch(directory, model)
    # The target "onnx" is the graph as it stands.
