# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for tests: random Mixtrals of odd shapes, written by `transformers`, and the bundled model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
MIXTRAL_SMALL = REPOSITORY / "examples" / "models" / "mixtral-small"

# Small sizes that share nothing: no dimension is a multiple of another where it need not be.
_BASE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
    "sliding_window": None,
    # Wide enough that logits differ and greedy choices are not near ties.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Shape:
    """A named variation of the base configuration."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
}

SHAPES = [
    Shape("five experts top-3"),
    Shape("one KV head, head_dim 24, tied", {"num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": True}),
    Shape("no GQA, one layer, top-1", {"num_key_value_heads": 4, "num_hidden_layers": 1, "num_experts_per_tok": 1}),
    Shape("one expert", {"num_local_experts": 1, "num_experts_per_tok": 1, "vocab_size": 67}),
    Shape("head_dim 40, 3 heads", {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 40}),
    Shape("33 experts top-8", {"num_local_experts": 33, "num_experts_per_tok": 8, "intermediate_size": 24}),
    Shape("gelu", {"hidden_act": "gelu"}),
    # transformers 5.23 needs head_dim spelled out for some rope types.
    *(Shape(f"{name} rope", {"rope_parameters": rope, "head_dim": 12}) for name, rope in ROPES.items()),
]


def make_mixtral(directory: Path, **changes: Any) -> Path:
    """Write a randomly initialised Mixtral; the seed is fixed, so equal changes give equal weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(**{**_BASE, **changes})
    model = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)  # a norm weight of ones would hide a norm that forgets it
    model.save_pretrained(directory)
    return directory
