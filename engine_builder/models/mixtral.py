# SPDX-License-Identifier: Apache-2.0
"""Mixtral: softmax router whose chosen weights are renormalised, SwiGLU experts in every layer."""

from __future__ import annotations

from adaptive_k_moe.engine_builder.checkpoint import HfConfig
from adaptive_k_moe.engine_builder.models.decoder import Decoder


class Mixtral(Decoder):
    """``MixtralForCausalLM``."""

    defaults = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
    understands = frozenset({"sliding_window"})
    hub_moe = "block_sparse_moe"
    hub_expert = ("w1", "w3", "w2")

    @classmethod
    def read_sliding_window(cls, config: HfConfig) -> int | None:
        """See `Decoder.read_sliding_window`."""
        return None if config.optional("sliding_window", int) is None else config.positive("sliding_window")
