# SPDX-License-Identifier: Apache-2.0
"""OLMoE: queries and keys normed over all heads together, clipping, chosen weights as the softmax left them."""

from __future__ import annotations

from adaptive_k_moe.engine_builder.checkpoint import HfConfig
from adaptive_k_moe.engine_builder.models.decoder import Decoder
from adaptive_k_moe.model_config import AttentionConfig


class Olmoe(Decoder):
    """``OlmoeForCausalLM``."""

    defaults = {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    }
    understands = frozenset({"attention_bias", "clip_qkv", "norm_topk_prob"})

    @classmethod
    def read_attention(cls, config: HfConfig) -> AttentionConfig:
        """See `Decoder.read_attention`."""
        bias, clip = config.get("attention_bias", bool, False), config.optional("clip_qkv", float)
        if clip is not None and not clip > 0:
            raise config.error("clip_qkv", clip, "above 0")
        return AttentionConfig(qkv_bias=bias, output_bias=bias, qk_norm="projection", clip_qkv=clip)
