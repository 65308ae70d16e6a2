# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for tests: random models of odd shapes, written by `transformers`, and the bundled model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SUPPORT = REPOSITORY / "tests" / "support"  # for scripts in processes of their own
BUNDLED_MODELS = sorted((REPOSITORY / "examples" / "models").iterdir())
"""Checkpoints of the trained models in the repository; each has a policy file of its name beside them."""

MIXTRAL_SMALL = REPOSITORY / "examples" / "models" / "mixtral-small"

# Small sizes that share nothing: no dimension is a multiple of another where it need not be.
_BASE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
    # Wide enough that logits differ and greedy choices are not near ties.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_QWEN = {"num_experts": 7, "moe_intermediate_size": 28, "intermediate_size": 72}

# The family's name in `transformers`, and what it has besides the base.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 5, "intermediate_size": 56, "sliding_window": None}),
    "qwen2_moe": ("Qwen2Moe", {**_QWEN, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3Moe", {**_QWEN, "head_dim": 20}),
    "olmoe": ("Olmoe", {"num_experts": 9, "intermediate_size": 28, "pad_token_id": 0}),
}


@dataclass(frozen=True)
class Shape:
    """A named variation of a family's base configuration."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    family: str = "mixtral"

    def __str__(self) -> str:
        return f"{self.family}: {self.name}"


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


def _shapes(family: str, **named: dict[str, Any]) -> list[Shape]:
    return [Shape(name.replace("_", " "), changes, family) for name, changes in named.items()]


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
    *_shapes(
        "qwen2_moe",
        plain={},
        renormalised={"norm_topk_prob": True},
        no_bias_one_KV_head_tied={"qkv_bias": False, "num_key_value_heads": 1, "tie_word_embeddings": True},
        every_second_layer_sparse={"decoder_sparse_step": 2, "num_hidden_layers": 4},
        dense_layers_named={"mlp_only_layers": [0, 2], "num_hidden_layers": 4, "decoder_sparse_step": 1},
        only_layer_3_sparse={"mlp_only_layers": [1], "num_hidden_layers": 4, "decoder_sparse_step": 2},
        head_dim_16_and_gelu={"head_dim": 16, "hidden_act": "gelu", "mlp_only_layers": [1]},
    ),
    *_shapes(
        "qwen3_moe",
        plain={},
        renormalised={"norm_topk_prob": True},
        bias_one_KV_head_tied={"attention_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": True},
        every_second_layer_sparse={"decoder_sparse_step": 2, "num_hidden_layers": 4},
        dense_layers_named={"mlp_only_layers": [0, 2], "num_hidden_layers": 3},
        no_GQA_35_experts_top_8={"num_key_value_heads": 4, "num_experts": 35, "num_experts_per_tok": 8},
        yarn={"rope_parameters": ROPES["yarn"], "norm_topk_prob": True},
    ),
    *_shapes(
        "olmoe",
        plain={},
        renormalised={"norm_topk_prob": True},
        # Cuts off a good part of the states: their size is about 1.
        clipped={"clip_qkv": 0.7},
        clipped_bias_one_KV_head_tied={
            "clip_qkv": 0.9,
            "attention_bias": True,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
        no_GQA_3_heads_one_layer={"num_key_value_heads": 3, "num_attention_heads": 3, "num_hidden_layers": 1},
        top_1={"num_experts_per_tok": 1},
    ),
]

PLAIN = [Shape("plain", {}, family) for family in FAMILIES]
"""One shape a family."""


def make_checkpoint(directory: Path, shape: Shape, *, fused: bool = False, **options: Any) -> Path:
    """Write a randomly initialised model; the seed is fixed, so equal shapes give equal weights.

    Args:
        directory: where to.
        shape: the family and what differs from its base configuration.
        fused: in transformers 5's own layout (all experts in one tensor) instead of the hub's.
        options: for `save_pretrained`.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    name, base = FAMILIES[shape.family]
    config = getattr(transformers, f"{name}Config")(**{**_BASE, **base, **shape.changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if "norm" in parameter:
                weight.uniform_(0.5, 1.5)  # a norm weight of ones would hide a norm that forgets it
            elif parameter.endswith("bias"):
                weight.normal_(0.0, 0.5)  # as would a bias of zeros
    model.save_pretrained(directory, save_original_format=not fused, **options)
    return directory


def make_mixtral(directory: Path, **changes: Any) -> Path:
    """Write a randomly initialised Mixtral; see `make_checkpoint`."""
    return make_checkpoint(directory, Shape("changed", changes))


CONFIGS = REPOSITORY / "tests" / "configs"
"""Configs of published models, as their repositories on the hub have them; ``_name_or_path`` names each."""


def hub_tensors(config_path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors in the hub's layout, by `transformers`, which allocates nothing."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    config = transformers.AutoConfig.from_pretrained(config_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tensors = revert_weight_conversion(model, model.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def make_sparse_checkpoint(
    directory: Path, config_path: Path, *, changes: dict[str, Any] | None = None, shard_size: int = 5 * 10**9
) -> dict[str, tuple[int, ...]]:
    """Write a published model's checkpoint in bfloat16 with zeros for weights, which take no room on the disk.

    Args:
        directory: where to.
        config_path: one of `CONFIGS`.
        changes: fields to set otherwise, to make it smaller.
        shard_size: bytes after which another shard begins.

    Returns:
        Names and shapes of its tensors.
    """
    directory.mkdir(parents=True)
    content = json.loads(config_path.read_text()) | (changes or {})
    (directory / "config.json").write_text(json.dumps(content))
    tensors = hub_tensors(directory / "config.json")
    shards: list[dict[str, Any]] = [{}]
    sizes = [0]
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        if sizes[-1] and sizes[-1] + size > shard_size:
            shards.append({})
            sizes.append(0)
        offsets = [sizes[-1], sizes[-1] + size]
        shards[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
        sizes[-1] += size
    weight_map = {}
    for index, (shard, size) in enumerate(zip(shards, sizes, strict=True)):
        file_name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        header = json.dumps(shard).encode()
        header += b" " * (-len(header) % 8)
        with (directory / file_name).open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(stream.tell() + size)
        weight_map |= dict.fromkeys(shard, file_name)
    index_content = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_content))
    return tensors
