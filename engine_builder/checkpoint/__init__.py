# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints as they lie on disk: ``config.json`` and safetensors, single or sharded."""

from adaptive_k_moe.engine_builder.checkpoint.config import HfConfig
from adaptive_k_moe.engine_builder.checkpoint.tensors import CheckpointTensors

__all__ = ["CheckpointTensors", "HfConfig"]
