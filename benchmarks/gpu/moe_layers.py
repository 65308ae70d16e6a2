# SPDX-License-Identifier: Apache-2.0
"""The layers of published models that the MoE benchmarks on a GPU run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MoeLayer:
    """A layer's shape and rules, named as the operator's."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    """Experts a token in the model as it was trained: the capacity of an engine whose policies name no more."""
    activation: str = "swiglu"
    scoring: str = "softmax"
    routed_scaling_factor: float = 1.0

    @property
    def weights(self) -> int:
        """Numbers in one expert."""
        return (3 if self.activation == "swiglu" else 2) * self.hidden * self.intermediate

    def ks(self) -> dict[str, list[int]]:
        """What tokens run: the model's own k, half of it, and both in turn."""
        half = max(1, self.top_k // 2)
        return {str(self.top_k): [self.top_k], str(half): [half], f"{half}/{self.top_k}": [half, self.top_k]}


LAYERS = {
    "mixtral": MoeLayer(4096, 14336, 8, 2),
    "qwen3-30b": MoeLayer(2048, 768, 128, 8),
    "nemotron": MoeLayer(2688, 1856, 128, 6, "relu2", "sigmoid", 2.5),
    # For the interpreter of CUDA kernels on a CPU, and for the peers there.
    "tiny": MoeLayer(64, 64, 6, 2),
    "tiny-ungated": MoeLayer(64, 128, 6, 4, "relu2", "sigmoid", 2.5),
}
MODELS = ("mixtral", "qwen3-30b", "nemotron")
TOKENS = "1,4,16,64,256,1024,4096"
