# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE: queries and keys normed head by head, a head size of its own, no shared expert."""

from __future__ import annotations

from adaptive_k_moe.engine_builder.checkpoint import HfConfig
from adaptive_k_moe.engine_builder.models.decoder import Decoder
from adaptive_k_moe.model_config import AttentionConfig


class Qwen3Moe(Decoder):
    """``Qwen3MoeForCausalLM``."""

    defaults = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "moe_intermediate_size": 768,
    }
    understands = frozenset(
        {
            "attention_bias",
            "decoder_sparse_step",
            "mlp_only_layers",
            "norm_topk_prob",
            "sliding_window",
            "use_sliding_window",
        }
    )
    expert_size_field = "moe_intermediate_size"

    @classmethod
    def read_attention(cls, config: HfConfig) -> AttentionConfig:
        """See `Decoder.read_attention`."""
        bias = config.get("attention_bias", bool, False)
        return AttentionConfig(qkv_bias=bias, output_bias=bias, qk_norm="head")

    @classmethod
    def read_sliding_window(cls, config: HfConfig) -> int | None:
        """See `Decoder.read_sliding_window`."""
        return config.positive("sliding_window", 4096) if config.get("use_sliding_window", bool, False) else None
