# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of `checkpoints.py` as llama.cpp's file, in bfloat16 or float32; needs llama.cpp's `gguf` package.

PYTHONPATH=LLAMA_CPP/gguf-py python benchmarks/_peers/write_gguf.py mixtral CHECKPOINT BF16|F32 OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open

from checkpoints import MAX_TOKENS, SHAPES, Shape

EXPERTS = {
    "Mixtral": ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    "Qwen3Moe": ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}


def rotated_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in the order in which llama.cpp's `llama` kind rotates them: pairs beside one another."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write(shape: Shape, checkpoint: Path, kind: str, output: Path) -> None:
    """Write the file; matrices in `kind`, vectors and routers in float32, as llama.cpp's own converter does."""
    writer = gguf.GGUFWriter(output, shape.gguf_architecture)
    writer.add_context_length(MAX_TOKENS)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_expert_count(shape.num_experts)
    writer.add_expert_used_count(shape.num_experts_per_tok)
    writer.add_vocab_size(shape.vocab_size)
    if shape.gguf_architecture != "llama":
        writer.add_expert_feed_forward_length(shape.intermediate_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if kind == "BF16" else gguf.LlamaFileType.ALL_F32)
    special = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + [f"t{index}".encode() for index in range(len(special), shape.vocab_size)])
    writer.add_token_scores([0.0] * shape.vocab_size)
    types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    writer.add_token_types(types + [gguf.TokenType.NORMAL] * (shape.vocab_size - len(types)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    def add(name: str, tensor: torch.Tensor) -> None:
        if kind == "BF16" and tensor.ndim > 1 and "ffn_gate_inp" not in name:
            raw = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint8)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.float().contiguous().numpy())

    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        tensor = file.get_tensor
        add("token_embd.weight", tensor("model.embed_tokens.weight"))
        add("output_norm.weight", tensor("model.norm.weight"))
        add("output.weight", tensor("lm_head.weight"))
        block, names = EXPERTS[shape.hf_class]
        for index in range(shape.num_hidden_layers):
            source, target = f"model.layers.{index}", f"blk.{index}"
            attention = f"{source}.self_attn"
            for name, heads in (("q", shape.num_attention_heads), ("k", shape.num_key_value_heads)):
                weight = tensor(f"{attention}.{name}_proj.weight")
                interleaved = shape.gguf_architecture == "llama"
                add(f"{target}.attn_{name}.weight", rotated_pairs(weight, heads) if interleaved else weight)
                if shape.hf_class == "Qwen3Moe":
                    add(f"{target}.attn_{name}_norm.weight", tensor(f"{attention}.{name}_norm.weight"))
            add(f"{target}.attn_v.weight", tensor(f"{attention}.v_proj.weight"))
            add(f"{target}.attn_output.weight", tensor(f"{attention}.o_proj.weight"))
            add(f"{target}.attn_norm.weight", tensor(f"{source}.input_layernorm.weight"))
            add(f"{target}.ffn_norm.weight", tensor(f"{source}.post_attention_layernorm.weight"))
            add(f"{target}.ffn_gate_inp.weight", tensor(f"{source}.{block}.gate.weight"))
            for role, name in names.items():
                experts = [tensor(f"{source}.{block}.experts.{e}.{name}.weight") for e in range(shape.num_experts)]
                add(f"{target}.ffn_{role}_exps.weight", torch.stack(experts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    name, checkpoint, kind, output = sys.argv[1:]
    write(SHAPES[name], Path(checkpoint), kind, Path(output))
