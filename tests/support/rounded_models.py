# SPDX-License-Identifier: Apache-2.0
"""Random models whose rows int8 and int4 weights allow, and models of `transformers` with weights rounded to them."""

from __future__ import annotations

from typing import Any

import torch

from checkpoints import Shape
from nemotron_models import Nemotron

PRECISIONS = [("int8", 8, None), ("int4", 4, 32)]
"""The builder's word, bits and group size."""

# Rows of 64 to 192 values, heads that TensorRT has kernels for.
WIDE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
QWEN = {**WIDE, "moe_intermediate_size": 32}
SHAPES = [
    Shape("GQA", WIDE),
    Shape("tied, one KV head", {**WIDE, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    Shape("shared expert, dense layer", {**QWEN, "shared_expert_intermediate_size": 160, "mlp_only_layers": [0]},
          "qwen2_moe"),
    Shape("norms of heads", QWEN, "qwen3_moe"),
    Shape("clipped", {"hidden_size": 128, "intermediate_size": 64, "num_key_value_heads": 4, "clip_qkv": 0.7}, "olmoe"),
]  # fmt: skip
NEMOTRON = Nemotron(
    "latent experts", "ME*-",
    {"hidden_size": 64, "head_dim": 16, "mamba_num_heads": 6, "mamba_head_dim": 16, "intermediate_size": 96,
     "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64, "moe_latent_size": 32},
)  # fmt: skip


def rounded(weight: torch.Tensor, bits: int, group: int | None, scales: torch.dtype) -> torch.Tensor:
    """What a weight stands for once it is quantised with scales of a type, written with torch alone."""
    rows = weight.reshape(*weight.shape[:-1], -1, group or weight.shape[-1])
    largest = rows.abs().amax(-1, keepdim=True)
    candidates = []
    for shrink in (1.0,) if bits == 8 else (1.0, 0.95, 0.9, 0.85):
        scale = (largest * shrink / (127 if bits == 8 else 7)).to(scales).float()
        scale[scale == 0] = 1  # the padding token's row in an embedding
        candidates.append((rows / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale)
    stacked = torch.stack(candidates)
    best = (stacked - rows).square().double().sum(-1, keepdim=True).argmin(0, keepdim=True)
    return stacked.gather(0, best.expand(1, *rows.shape))[0].reshape(weight.shape)


def quantise_reference(
    bits: int, group: int | None, scales: torch.dtype, model: Any, *, vocabulary: bool = False
) -> None:
    """Replace the weights that a build quantises in a model of `transformers`.

    With `vocabulary` also embedding and head, as a build for CPUs does: int8, a scale a row, whatever `bits` is.
    """
    excluded = ("lm_head", "shared_expert_gate", "gate")
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] not in excluded:
                module.weight.copy_(rounded(module.weight, bits, group, scales))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3 and ".experts." in name:
                parameter.copy_(rounded(parameter, bits, group, scales))
        tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}  # one where they are tied
        for table in tables if vocabulary else ():
            table.copy_(rounded(table, 8, None, scales))
