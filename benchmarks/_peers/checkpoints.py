# SPDX-License-Identifier: Apache-2.0
"""The checkpoints that are compared, with random weights from a fixed seed: shapes, bytes, files.

python benchmarks/_peers/checkpoints.py mixtral DIRECTORY
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_TOKENS = 2048
"""Of a sequence: what each stack is told to make room for at most."""


@dataclass(frozen=True)
class Shape:
    """A model of a published kind, small enough for any machine and large enough to live in no cache.

    Attributes:
        title: what a table calls it.
        hf_class: `transformers`' names begin with it.
        gguf_architecture: llama.cpp's name of the kind.
        intermediate_size: of one expert.
    """

    title: str
    hf_class: str
    gguf_architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_experts: int
    num_experts_per_tok: int
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 64
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5

    @property
    def expert_weights(self) -> int:
        """Of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def other_weights(self) -> int:
        """That every step reads beside experts: attention, routers, the head."""
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads)
        layer = self.hidden_size * (heads * self.head_dim + self.num_experts)
        return self.num_hidden_layers * layer + self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All of it, the norms' few left out."""
        experts = self.num_hidden_layers * self.num_experts * self.expert_weights
        return experts + self.other_weights + self.vocab_size * self.hidden_size

    def weights_read(self, tokens: int) -> float:
        """Expected number of weights that a step of so many tokens must read, each choosing experts evenly."""
        distinct = self.num_experts * (1 - (1 - self.num_experts_per_tok / self.num_experts) ** tokens)
        return self.num_hidden_layers * distinct * self.expert_weights + self.other_weights

    def operations(self, tokens: int, logits: int) -> float:
        """Floating-point operations of the products of a step that computes so many tokens and rows of logits.

        A multiply-add is two. Attention's own products are not among them.
        """
        head = self.vocab_size * self.hidden_size
        experts = self.num_hidden_layers * self.num_experts_per_tok * self.expert_weights
        return 2.0 * (tokens * (experts + self.other_weights - head) + logits * head)


SHAPES = {
    "mixtral": Shape(
        "Mixtral, 791 M parameters: 8 layers of 8 experts of 3584, top-2",
        "Mixtral",
        "llama",
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=8,
        num_experts=8,
        num_experts_per_tok=2,
    ),
    # A fraction of Qwen3-30B-A3B's width and depth; a vocabulary that does not outweigh so few layers.
    "qwen3_moe": Shape(
        "Qwen3-MoE, 430 M parameters: 4 layers of 128 experts of 256, top-8",
        "Qwen3Moe",
        "qwen3moe",
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=256,
        num_hidden_layers=4,
        num_experts=128,
        num_experts_per_tok=8,
    ),
}


def write_checkpoint(shape: Shape, directory: Path) -> None:
    """A Hugging Face checkpoint in bfloat16 with a tokenizer, which some stacks ask for and none uses."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    names: dict[str, Any] = {"num_local_experts" if shape.hf_class == "Mixtral" else "num_experts": shape.num_experts}
    if shape.hf_class != "Mixtral":
        names |= {"moe_intermediate_size": shape.intermediate_size, "norm_topk_prob": True}
    config = getattr(transformers, f"{shape.hf_class}Config")(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        num_experts_per_tok=shape.num_experts_per_tok,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=shape.rms_norm_eps,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        **names,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{shape.hf_class}ForCausalLM")(config)
    model.to(torch.bfloat16).save_pretrained(directory)
    words = {f"t{index}": index for index in range(shape.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t0"
    ).save_pretrained(directory)


if __name__ == "__main__":
    write_checkpoint(SHAPES[sys.argv[1]], Path(sys.argv[2]))
