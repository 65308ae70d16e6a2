# SPDX-License-Identifier: Apache-2.0
"""Targets: what becomes of the one ONNX graph before it lies in the engine directory."""

from __future__ import annotations

from pathlib import Path

from adaptive_k_moe.engine_config import BuildConfig, PretrainedConfig

__all__ = ["lower"]


def lower(directory: Path, model: PretrainedConfig, build_config: BuildConfig) -> None:
    """Turn ``model.onnx`` in `directory` into the target's files, in place.

    Raises:
        BuildError: the target cannot run this model.
    """
    if build_config.target == "openvino":
        from adaptive_k_moe.engine_builder.targets.openvino import lower_for_openvino

        lower_for_openvino(directory, model, build_config)
    # The target "onnx" is the graph as it stands.
