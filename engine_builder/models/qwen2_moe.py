# SPDX-License-Identifier: Apache-2.0
"""Qwen1.5-MoE and Qwen2-MoE: a gated shared expert beside the routed ones, and biases on queries, keys and values."""

from __future__ import annotations

from adaptive_k_moe.engine_builder.checkpoint import HfConfig
from adaptive_k_moe.engine_builder.models.decoder import Decoder
from adaptive_k_moe.errors import BuildError
from adaptive_k_moe.model_config import AttentionConfig, SharedExpertConfig


class Qwen2Moe(Decoder):
    """``Qwen2MoeForCausalLM``."""

    defaults = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    }
    understands = frozenset(
        {
            "decoder_sparse_step",
            "mlp_only_layers",
            "norm_topk_prob",
            "qkv_bias",
            "shared_expert_intermediate_size",
            "sliding_window",
            "use_sliding_window",
        }
    )
    expert_size_field = "moe_intermediate_size"

    @classmethod
    def read_attention(cls, config: HfConfig) -> AttentionConfig:
        """See `Decoder.read_attention`."""
        return AttentionConfig(qkv_bias=config.get("qkv_bias", bool, True))

    @classmethod
    def read_shared_expert(cls, config: HfConfig, activation: str) -> SharedExpertConfig:
        """See `Decoder.read_shared_expert`."""
        size = cls._positive(config, "shared_expert_intermediate_size")
        return SharedExpertConfig(intermediate_size=size, activation=activation, gated=True)

    @classmethod
    def read_sliding_window(cls, config: HfConfig) -> int | None:
        """See `Decoder.read_sliding_window`; only some layers have it, which `make_mask` refuses."""
        kinds = config.optional("layer_types", list)
        if not config.get("use_sliding_window", bool, False) or (kinds and set(kinds) == {"full_attention"}):
            return None
        return config.positive("sliding_window", 4096)

    def make_mask(self) -> str:
        """See `Decoder.make_mask`: one mask for all layers, so a window that only some have must not matter."""
        window, length = self.model.sliding_window, self.build_config.max_seq_len
        if window is not None and length > window:
            raise BuildError(
                f"use_sliding_window: some layers see only {window} tokens, which is not supported for "
                f"{self.model.architecture}: build with --max_seq_len {window} or less."
            )
        return super().make_mask()
