# SPDX-License-Identifier: Apache-2.0
"""Random Nemotron-H checkpoints of odd shapes, written by `transformers`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BASE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "intermediate_size": 56,
    "mamba_num_heads": 6,
    "mamba_head_dim": 10,
    "ssm_state_size": 9,
    "n_groups": 3,
    "chunk_size": 16,
    "n_routed_experts": 10,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 36,
    "routed_scaling_factor": 2.5,
    "initializer_range": 0.2,
    "time_step_min": 0.01,
}


@dataclass(frozen=True)
class Nemotron:
    """A named variation: its layers as a pattern, and what differs from the base configuration."""

    name: str
    pattern: str
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


PLAIN = Nemotron("every kind of layer", "ME*-ME")
NEMOTRONS = [
    PLAIN,
    Nemotron("attention first", "*EM-"),
    Nemotron("no attention", "MEM-E"),
    Nemotron("no mamba", "E*-"),
    Nemotron("experts alone", "E"),
    Nemotron("groups of experts", "ME*E", {"n_routed_experts": 12, "n_group": 4, "topk_group": 2}),
    Nemotron("latent experts and biases", "ME*-", {"moe_latent_size": 28, "mlp_bias": True, "use_bias": True}),
    Nemotron("one group, narrow heads", "MEM*", {"n_groups": 1, "mamba_num_heads": 5, "mamba_head_dim": 7}),
    Nemotron(
        "wide heads, 2 taps, no bias",
        "ME*",
        {"mamba_head_dim": 72, "n_groups": 2, "conv_kernel": 2, "use_conv_bias": False, "ssm_state_size": 17},
    ),
    Nemotron("not renormalised, one KV head", "*ME", {"norm_topk_prob": False, "num_key_value_heads": 1}),
    Nemotron("steps at their limit", "MEM*", {"time_step_min": 0.7}),
    Nemotron("silu", "MEE-*", {"mlp_hidden_act": "silu"}),
    Nemotron("33 experts, top-6", "MEME*ME", {"n_routed_experts": 33, "num_experts_per_tok": 6}),
]

_KINDS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


def make_nemotron(directory: Path, shape: Nemotron = PLAIN, *, fused: bool = False, **options: Any) -> Path:
    """Write a randomly initialised model; the seed is fixed, so equal shapes give equal weights.

    Args:
        directory: where to.
        shape: what differs from the base configuration.
        fused: in transformers 5's own layout instead of the hub's.
        options: for `save_pretrained`.
    """
    import torch
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(0)
    config = NemotronHConfig(**{**_BASE, **shape.changes}, layers_block_type=[_KINDS[kind] for kind in shape.pattern])
    model = NemotronHForCausalLM(config)
    with torch.no_grad():
        for name, weight in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("A_log"):
                weight.uniform_(-2, 2)
            elif name.endswith(("dt_bias", "bias", "conv1d.weight", "mixer.D")):
                weight.normal_(0.0, 0.5)  # zeros or ones would hide that one is forgotten
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("out_proj.weight"):
                weight.normal_(0.0, 0.2)
    model.save_pretrained(directory, save_original_format=not fused, **options)
    return directory
