# SPDX-License-Identifier: Apache-2.0
"""The session of the target "torch", on a GPU or a CPU.

``graph.py`` runs the engine's graph as functions of torch, ``attention.py`` is its attention over paged keys and
values, ``decode.py`` replays steps of decode, and ``session.py`` ties them to caches, states and policies.
"""

import adaptive_k_moe.torch  # noqa: F401  # registers torch.ops.adaptive_k, or says that torch is missing
from adaptive_k_moe.runtime.session.torch.session import TorchSession

__all__ = ["TorchSession"]
