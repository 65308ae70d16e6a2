# SPDX-License-Identifier: Apache-2.0
"""Triton models that serve an engine, and the command that runs a server with them.

`ensemble/`, `tensorrt_llm_bls/` and `tensorrt_llm/` are the models as Triton reads them; their tensors are those of
TensorRT-LLM's Triton repository (`contract`). `TritonServer` runs a server with them for one engine.
"""

from adaptive_k_moe.model_repository.server import TritonServer

__all__ = ["TritonServer"]
