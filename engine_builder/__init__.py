# SPDX-License-Identifier: Apache-2.0
"""From a Hugging Face checkpoint to an engine directory.

``checkpoint/`` reads, ``models/`` and ``graph/`` write one ONNX graph, ``targets/`` lowers it.
"""

from adaptive_k_moe.engine_builder.build import build

__all__ = ["build"]
