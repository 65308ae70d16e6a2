# SPDX-License-Identifier: Apache-2.0
"""Into TensorRT-LLM: its unified checkpoint, and the model file that puts our plugin into its graph.

``model.py`` is not imported by anything here: `trtllm-build --model_cls_file` loads it where TensorRT-LLM is.
"""

from adaptive_k_moe.engine_builder.tensorrt_llm.convert import convert

__all__ = ["convert"]
