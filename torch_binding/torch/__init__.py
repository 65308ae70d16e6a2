# SPDX-License-Identifier: Apache-2.0
"""The operators in torch, as `torch.ops.adaptive_k`, and in models of `transformers`.

``ops.py`` registers the operators, ``cuda_library.py`` launches them on GPUs, ``adapt.py`` puts them into a model,
``expert_parallel.py`` divides its experts among processes, and ``load.py`` loads a process's part of it.
"""

from adaptive_k_moe.errors import DependencyError

try:
    import torch  # noqa: F401
except ModuleNotFoundError:
    raise DependencyError("adaptive_k_moe.torch needs torch: pip install 'adaptive-k-moe[torch]'.") from None

from adaptive_k_moe.torch import ops
from adaptive_k_moe.torch.adapt import Adapted, Step, adapt
from adaptive_k_moe.torch.load import load_expert_parallel

__all__ = ["Adapted", "Step", "adapt", "load_expert_parallel", "ops"]
