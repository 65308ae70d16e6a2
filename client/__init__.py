# SPDX-License-Identifier: Apache-2.0
"""Asks a running server over gRPC. Needs `tritonclient[grpc]` and NumPy, and no engine.

Example::

    from adaptive_k_moe.client import Client

    with Client("localhost:8001") as client:
        for chunk in client.generate("Once upon", max_tokens=32, stream=True, adaptive_k_policy="balanced"):
            print(chunk.text, end="", flush=True)
"""

from adaptive_k_moe.client.aio import AsyncClient, AsyncCompletionStream
from adaptive_k_moe.client.results import Chunk, Completion, EngineDescription
from adaptive_k_moe.client.sync import Client, CompletionStream

__all__ = [
    "AsyncClient",
    "AsyncCompletionStream",
    "Chunk",
    "Client",
    "Completion",
    "CompletionStream",
    "EngineDescription",
]
