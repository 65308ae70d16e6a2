# SPDX-License-Identifier: Apache-2.0
"""Gated experts' weights in a checkpoint, whose layout is the hub's or that of transformers 5."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from adaptive_k_moe.engine_builder.checkpoint import CheckpointTensors
from adaptive_k_moe.model_config import PretrainedConfig

Array = npt.NDArray[Any]


class ExpertTensors:
    """Reads the experts of a layer one at a time.

    Args:
        tensors: the checkpoint's weights.
        model: its sizes.
        hub_moe: the MoE block's name in the hub's checkpoints; transformers 5 calls every one "mlp".
        hub_expert: an expert's gate, up and down projections in the hub's checkpoints, which keep a tensor for
            each; transformers 5 keeps one for all experts' gates and ups, and one for all downs.
    """

    def __init__(
        self, tensors: CheckpointTensors, model: PretrainedConfig, hub_moe: str, hub_expert: tuple[str, str, str]
    ) -> None:
        self._tensors = tensors
        self._model = model
        self._hub_moe = hub_moe
        self._hub_expert = hub_expert

    def name(self, layer: int, rest: str) -> str:
        """Name of a tensor of a MoE block in whichever layout the checkpoint has; the hub's if in neither."""
        own = f"model.layers.{layer}.mlp.{rest}"
        return own if own in self._tensors else f"model.layers.{layer}.{self._hub_moe}.{rest}"

    def gate_and_up(self, layer: int) -> Iterator[tuple[Array, Array]]:
        """Each expert's gate and up, [I, H] both."""
        model, size = self._model, self._model.moe.intermediate_size
        fused = self.name(layer, "experts.gate_up_proj")
        if fused in self._tensors:
            for both in self._tensors.rows(fused, (model.num_experts, 2 * size, model.hidden_size)):
                yield both[:size], both[size:]
            return
        gate, up, _ = self._hub_expert
        for expert in range(model.num_experts):
            yield self._projection(layer, expert, gate), self._projection(layer, expert, up)

    def down(self, layer: int) -> Iterator[Array]:
        """Each expert's down, [H, I]."""
        model, size = self._model, self._model.moe.intermediate_size
        shape = (model.hidden_size, size)
        fused = self.name(layer, "experts.down_proj")
        if fused in self._tensors:
            yield from self._tensors.rows(fused, (model.num_experts, *shape))
            return
        for expert in range(model.num_experts):
            name = self.name(layer, f"experts.{expert}.{self._hub_expert[2]}.weight")
            yield self._tensors.read(name, shape)

    def _projection(self, layer: int, expert: int, projection: str) -> Array:
        model = self._model
        name = self.name(layer, f"experts.{expert}.{projection}.weight")
        return self._tensors.read(name, (model.moe.intermediate_size, model.hidden_size))
