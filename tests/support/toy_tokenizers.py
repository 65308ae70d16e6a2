# SPDX-License-Identifier: Apache-2.0
"""Two small tokenizers of the kinds that matter: byte-level BPE, and BPE with spaces and byte fallback."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from adaptive_k_moe.runtime.tokenizer import Tokenizer

_TEXT = [
    "the quick brown fox jumps over the lazy dog and the cat sat on the mat",
    "expert routing decides how many experts run for each token of the text",
    "grüße aus köln, naïve café, 你好世界, привет мир, emoji 😀😁🎉",
] * 5


@cache
def byte_level() -> Tokenizer:
    """As GPT-2's: every byte has a token, so characters may be cut anywhere."""
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return Tokenizer(tokenizer, eos_token="<eos>")


@cache
def byte_fallback() -> Tokenizer:
    """As Llama's and Mixtral's: a word carries its space, and unknown characters are bytes."""
    tokenizer = HfTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # Word by word, as a trainer of SentencePiece: no token spans two words.
    tokenizer.train_from_iterator([f"▁{word}" for line in _TEXT[:2] for word in line.split()] * 3, trainer)
    # The bytes are ordinary tokens: only the first three are special.
    content = tokenizer.to_str()
    import json

    data = json.loads(content)
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < 3]
    return Tokenizer(HfTokenizer.from_str(json.dumps(data)), eos_token="</s>", unk_token="<unk>")


ALL = {"byte_level": byte_level, "byte_fallback": byte_fallback}
