# SPDX-License-Identifier: Apache-2.0
"""Mixtral: softmax router whose chosen weights are renormalised, SwiGLU experts in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from adaptive_k_moe.engine_builder.checkpoint import HfConfig
from adaptive_k_moe.engine_builder.models.decoder import Decoder, expert_shapes
from adaptive_k_moe.engine_config import Dtype, MoeConfig, PretrainedConfig

# Hugging Face's activation of the gate to the operator's activation of the pair.
_ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu"}


class Mixtral(Decoder):
    """``MixtralForCausalLM`` in both layouts: one tensor an expert (the hub's) and fused (transformers 5)."""

    @classmethod
    def read_config(cls, config: HfConfig, dtype: Dtype) -> PretrainedConfig:
        """See `Decoder.read_config`."""
        hidden_act = config.get("hidden_act", str, "silu")
        if hidden_act not in _ACTIVATIONS:
            raise config.error("hidden_act", hidden_act, f"one of {sorted(_ACTIVATIONS)}")
        heads, hidden_size = config.positive("num_attention_heads", 32), config.positive("hidden_size", 4096)
        kv_heads = config.positive("num_key_value_heads", heads)
        if heads % kv_heads:
            raise config.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
        num_layers, num_experts = config.positive("num_hidden_layers", 32), config.positive("num_local_experts", 8)
        top_k = config.positive("num_experts_per_tok", 2)
        if top_k > num_experts:
            raise config.error("num_experts_per_tok", top_k, f"at most num_local_experts ({num_experts})")
        positions = config.positive("max_position_embeddings", 131072)
        return PretrainedConfig(
            architecture=config.architecture,
            dtype=dtype,
            vocab_size=config.positive("vocab_size", 32000),
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=config.optional("head_dim", int) or hidden_size // heads,
            max_position_embeddings=positions,
            rms_norm_eps=config.get("rms_norm_eps", float, 1e-5),
            tie_word_embeddings=config.get("tie_word_embeddings", bool, False),
            sliding_window=config.optional("sliding_window", int),
            rope=config.rope(default_theta=1e6, max_position_embeddings=positions),
            moe=MoeConfig(
                num_experts=num_experts,
                num_experts_per_tok=top_k,
                intermediate_size=config.positive("intermediate_size", 14336),
                activation=_ACTIVATIONS[hidden_act],
                layers=list(range(num_layers)),
            ),
            bos_token_id=config.token_id("bos_token_id"),
            eos_token_ids=config.token_ids("eos_token_id"),
            pad_token_id=config.token_id("pad_token_id"),
        )

    def make_moe(self, layer: int, hidden: str) -> str:
        """See `Decoder.make_moe`."""
        g, m = self.graph, self.model
        name = f"model.layers.{layer}.moe"
        tokens = g.node("Reshape", [hidden, g.constant([-1, m.hidden_size])], f"{name}.tokens")
        # The router decides everything, so it stays float32 whatever the engine's dtype is.
        gate = f"model.layers.{layer}.mlp.gate"
        if f"{gate}.weight" not in self.tensors:
            gate = self._hub_name(layer, "gate")
        logits = self.linear(
            gate, tokens, m.hidden_size, m.num_experts, dtype="float32", output=f"{name}.router_logits"
        )
        up_shape, down_shape = expert_shapes(m)
        up = g.weight(f"{name}.gate_up", m.dtype, up_shape, self._gate_up(layer))
        down = g.weight(f"{name}.down", m.dtype, down_shape, self._down(layer))
        output = self.make_experts(layer, tokens, logits, up, down)
        shape = g.node("Shape", [hidden], f"{name}.shape")
        return g.node("Reshape", [output, shape], f"{name}.out")

    def _gate_up(self, layer: int) -> Iterator[npt.NDArray[Any]]:
        shape, _ = expert_shapes(self.model)
        fused = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        if fused in self.tensors:
            yield from self.tensors.rows(fused, shape)
            return
        half = (self.model.moe.intermediate_size, self.model.hidden_size)
        for expert in range(self.model.num_experts):
            yield self.tensors.read(self._hub_name(layer, f"experts.{expert}.w1.weight"), half)
            yield self.tensors.read(self._hub_name(layer, f"experts.{expert}.w3.weight"), half)

    def _down(self, layer: int) -> Iterator[npt.NDArray[Any]]:
        _, shape = expert_shapes(self.model)
        fused = f"model.layers.{layer}.mlp.experts.down_proj"
        if fused in self.tensors:
            yield from self.tensors.rows(fused, shape)
            return
        for expert in range(self.model.num_experts):
            yield self.tensors.read(self._hub_name(layer, f"experts.{expert}.w2.weight"), shape[1:])

    @staticmethod
    def _hub_name(layer: int, rest: str) -> str:
        return f"model.layers.{layer}.block_sparse_moe.{rest}"
