# SPDX-License-Identifier: Apache-2.0
"""The session on an NVIDIA GPU.

``session.py`` is the session; ``plan.py`` turns a step into executions of the engine, ``slots.py`` says where each
sequence's caches lie, ``buffers.py`` holds what lies on both sides of the bus. All of it speaks to the GPU through
``cuda.py`` (CUDA's runtime) and ``engine.py`` (TensorRT) alone.
"""

from adaptive_k_moe.runtime.session.tensorrt.session import TensorRtSession

__all__ = ["TensorRtSession"]
