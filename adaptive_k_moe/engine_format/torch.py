# SPDX-License-Identifier: Apache-2.0
"""The engine file of the target "torch": the one graph, whose attention reads and writes a paged cache.

`PagedAttention(query [1, heads, T, D], key [1, KV heads, T, D], value) -> [1, heads, T, D]`, domain `adaptive_k`, is
attention of a step's packed tokens. Its attributes are `layer`, `scale` and `sliding_window` (0 is none); where the
cache lies, and who sees what, is the session's.
"""

from __future__ import annotations

ENGINE_ONNX = "rank0.onnx"
"""The engine's file in its directory; its weights lie beside it."""

PAGED_ATTENTION = "PagedAttention"
