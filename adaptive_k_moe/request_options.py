# SPDX-License-Identifier: Apache-2.0
"""Everything that a request may ask for, once: its name, its tensors on a server, its type, its meaning.

The Triton models' inputs and their parser, the gRPC client, the options of `adaptive-k client` and
`adaptive-k generate`, and the tables in `docs/serving.md` are made from this table. Two kinds of models take requests:
those that take text (`ensemble` and `tensorrt_llm_bls`) and the one that takes token ids (`tensorrt_llm`).
TensorRT-LLM's Triton repository names some things differently in the two.
"""

from __future__ import annotations

from typing import NamedTuple

DEFAULT_MAX_TOKENS = 32
"""Most tokens of an answer where a request does not say; TensorRT-LLM's default."""


class RequestOption(NamedTuple):
    """One thing that a request may ask for.

    Attributes:
        name: in Python (`SamplingParams`, `Client.generate`) and on a command line; of two forms of one thing, such as
            stop words as text and as token ids, both have it.
        data_type: Triton's type of its tensor.
        help: the meaning, in one line.
        text: names of its input in the models that take text; the first is the present one, the others are older.
        tokens: likewise in the model that takes token ids.
        dims: shape of its tensor without the batch axis; -1 is any size.
        metavar: what stands for a value on a command line; None keeps it off the command lines.
        required: whether every request has to have it.
    """

    name: str
    data_type: str
    help: str = ""
    text: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    dims: tuple[int, ...] = (1,)
    metavar: str | None = None
    required: bool = False


def _both(name: str, data_type: str, meaning: str, *older: str, metavar: str | None = None) -> RequestOption:
    """An option whose input has its own name in both kinds of models."""
    return RequestOption(name, data_type, meaning, (name, *older), (name, *older), metavar=metavar)


_ANY = (-1,)

REQUEST_OPTIONS = (
    RequestOption(
        "prompt",
        "STRING",
        "the prompt, at most the engine's `max_input_len` tokens",
        ("text_input",),
        required=True,
    ),
    RequestOption("prompt", "INT32", "the prompt's token ids", tokens=("input_ids",), dims=_ANY, required=True),
    RequestOption(
        "input_lengths",
        "INT32",
        "how many of the `input_ids` are the prompt's",
        tokens=("input_lengths",),
        required=True,
    ),
    RequestOption(
        "max_tokens",
        "INT32",
        "most tokens to generate; the answer also ends at the engine's `max_seq_len`",
        ("max_tokens",),
        ("request_output_len",),
        metavar="N",
        required=True,
    ),
    RequestOption(
        "messages", "STRING", "a conversation as JSON in the place of `text_input`, which is then empty", ("messages",)
    ),
    RequestOption(
        "chat_template_kwargs",
        "STRING",
        "for a conversation: what else the model's chat template knows (`tools`, `enable_thinking`), a JSON object",
        ("chat_template_kwargs",),
    ),
    _both("temperature", "FP32", "divides the logits; 0 is greedy", metavar="T"),
    RequestOption(
        "top_k",
        "INT32",
        "sample among so many likeliest tokens; 0 is all of them",
        ("top_k",),
        ("runtime_top_k",),
        metavar="N",
    ),
    RequestOption(
        "top_p",
        "FP32",
        "sample among the fewest tokens that reach this probability",
        ("top_p",),
        ("runtime_top_p",),
        metavar="P",
    ),
    _both("min_p", "FP32", "drop tokens below this share of the likeliest one's probability", metavar="P"),
    _both("seed", "UINT64", "of the request's own random generator", "random_seed", metavar="N"),
    RequestOption("stop", "STRING", "strings that end the answer", ("stop_words",), dims=_ANY, metavar="TEXT"),
    RequestOption(
        "stop",
        "INT32",
        "words of token ids that end the answer: the ids of all words, then where each word ends, padded with -1",
        tokens=("stop_words_list",),
        dims=(2, -1),
    ),
    RequestOption("bad", "STRING", "strings that must not be generated", ("bad_words",), dims=_ANY, metavar="TEXT"),
    RequestOption(
        "bad",
        "INT32",
        "words of token ids that must not be generated, as in `stop_words_list`",
        tokens=("bad_words_list",),
        dims=(2, -1),
    ),
    RequestOption(
        "logit_bias",
        "STRING",
        "words whose tokens have something added to their logits",
        ("embedding_bias_words",),
        dims=_ANY,
    ),
    RequestOption(
        "logit_bias_weights", "FP32", "what that is, for each of the words", ("embedding_bias_weights",), dims=_ANY
    ),
    RequestOption(
        "logit_bias", "FP32", "added to the logits, one number a token id", tokens=("embedding_bias",), dims=_ANY
    ),
    _both("end_id", "INT32", "token that ends the answer; absent is the model's own, -1 is none", metavar="N"),
    _both("pad_id", "INT32", "of no effect: nothing is padded"),
    _both("min_tokens", "INT32", "no end before so many tokens", "min_length", metavar="N"),
    _both("repetition_penalty", "FP32", "above 1 makes seen tokens less likely", metavar="X"),
    _both("presence_penalty", "FP32", "subtracted from the logits of tokens in the answer", metavar="X"),
    _both("frequency_penalty", "FP32", "subtracted once for each time that a token is in the answer", metavar="X"),
    RequestOption("n", "INT32", "sequences for each prompt", ("num_return_sequences",), ("num_return_sequences",)),
    _both("adaptive_k_policy", "STRING", "the engine's policy that decides k; absent is its default", metavar="NAME"),
    RequestOption(
        "user",
        "STRING",
        "whose request it is, for a server's A/B test; absent is nobody's",
        ("adaptive_k_user",),
        ("adaptive_k_user",),
        metavar="NAME",
    ),
    RequestOption("stream", "BOOL", "responses after each step instead of one at the end", ("stream",), ("streaming",)),
    _both("exclude_input_in_output", "BOOL", "leave the prompt out of the output; a stream never has it"),
    _both("return_log_probs", "BOOL", "return `cum_log_probs` and `output_log_probs`"),
    _both("return_context_logits", "BOOL", "return `context_logits`"),
    _both("return_generation_logits", "BOOL", "return `generation_logits`"),
    _both(
        "return_perf_metrics",
        "BOOL",
        "return the request's times, KV-cache and speculation figures",
        "return_kv_cache_reuse_stats",
    ),
    _both("return_num_input_tokens", "BOOL", "return `num_input_tokens`"),
    _both("return_num_output_tokens", "BOOL", "return `num_output_tokens`"),
    RequestOption(
        "return_k",
        "BOOL",
        "return k and entropy of each token and layer",
        ("return_adaptive_k",),
        ("return_adaptive_k",),
    ),
    RequestOption(
        "return_engine",
        "BOOL",
        "return `adaptive_k_engine` and generate nothing",
        ("return_adaptive_k_engine",),
        ("return_adaptive_k_engine",),
    ),
    RequestOption(
        "end_request", "BOOL", "end the running request that has this one's request id", ("stop",), ("stop",)
    ),
    _both("beam_width", "INT32", "accepted at 1: beam search is refused"),
    RequestOption(
        "length_penalty",
        "FP32",
        "accepted at 0 and 1: it acts on beam search",
        ("length_penalty",),
        ("len_penalty",),
    ),
    RequestOption("early_stopping", "BOOL", "of no effect: it acts on beam search", tokens=("early_stopping",)),
)
"""Each option in each of its forms, in the order of the documentation."""

OPTIONS_BY_NAME = {option.name: option for option in REQUEST_OPTIONS if option.text}
"""Each option in its first form, which is that of the models that take text."""


def _unsupported(data_type: str, *names: str, dims: tuple[int, ...] = (1,), where: str = "both") -> list[RequestOption]:
    return [
        RequestOption(
            name,
            data_type,
            text=() if where == "tokens" else (name,),
            tokens=() if where == "text" else (name,),
            dims=dims,
        )
        for name in names
    ]


UNSUPPORTED_OPTIONS = (
    *_unsupported("STRING", "decoder_text_input", "image_url_input", where="text"),
    *_unsupported("FP16", "image_input", dims=(-1, 3, -1, -1), where="text"),
    *_unsupported("UINT8", "image_bytes_input", "video_bytes_input", dims=(-1, -1, -1, -1), where="text"),
    *_unsupported("INT32", "num_draft_tokens", where="text"),
    *_unsupported("BOOL", "use_draft_logits", where="text"),
    *_unsupported("UINT64", "prompt_table_extra_id", where="text"),
    *_unsupported("FP16", "prompt_embedding_table", dims=(-1, -1)),
    *_unsupported("INT32", "prompt_vocab_size"),
    *_unsupported("UINT64", "lora_task_id"),
    *_unsupported("FP16", "lora_weights", dims=(-1, -1)),
    *_unsupported("INT32", "lora_config", dims=(-1, 3)),
    *_unsupported("STRING", "guided_decoding_guide_type", "guided_decoding_guide"),
    *_unsupported("INT32", "draft_input_ids", "decoder_input_ids", dims=_ANY, where="tokens"),
    *_unsupported("INT32", "decoder_input_lengths", "encoder_output_lengths", where="tokens"),
    *_unsupported("FP32", "draft_logits", dims=(-1, -1), where="tokens"),
    *_unsupported("FP16", "encoder_input_features", dims=(-1, -1), where="tokens"),
    *_unsupported("FP32", "draft_acceptance_threshold", "beam_search_diversity_rate", where="tokens"),
    *_unsupported("FP32", "runtime_top_p_min", "runtime_top_p_decay", where="tokens"),
    *_unsupported("INT32", "runtime_top_p_reset_ids", where="tokens"),
    *_unsupported("UINT64", "prompt_table_extra_ids", dims=_ANY, where="tokens"),
    *_unsupported("BOOL", "cross_attention_mask", dims=(-1, -1), where="tokens"),
    *_unsupported("BOOL", "skip_cross_attn_blocks", where="tokens"),
    *_unsupported("FP32", "mrope_rotary_cos_sin", dims=_ANY, where="tokens"),
    *_unsupported("INT64", "mrope_position_deltas", where="tokens"),
    *_unsupported("UINT8", "context_phase_params", dims=_ANY, where="tokens"),
    *_unsupported("INT32", "retention_token_range_starts", "retention_token_range_ends", dims=_ANY, where="tokens"),
    *_unsupported("INT32", "retention_token_range_priorities", dims=_ANY, where="tokens"),
    *_unsupported("INT32", "retention_token_range_durations_ms", dims=_ANY, where="tokens"),
    *_unsupported("INT32", "retention_decode_priority", "retention_decode_duration_ms", where="tokens"),
    *_unsupported("INT32", "lookahead_window_size", "lookahead_ngram_size", where="tokens"),
    *_unsupported("INT32", "lookahead_verification_set_size", where="tokens"),
)
"""Inputs of TensorRT-LLM's models that are declared, so that a client that sends one is told which it is."""
