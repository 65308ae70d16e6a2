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


def _option(
    name: str,
    data_type: str,
    meaning: str,
    text: str | None = None,
    tokens: str | None = None,
    *,
    dims: tuple[int, ...] = (1,),
    metavar: str | None = None,
    required: bool = False,
) -> RequestOption:
    """An option; its inputs, older names behind the present one, are named as it is, and alike, if nothing is said."""
    text = name if text is None else text
    tokens = text if tokens is None else tokens
    return RequestOption(name, data_type, meaning, tuple(text.split()), tuple(tokens.split()), dims, metavar, required)


_ANY, _WORDS = (-1,), (2, -1)

REQUEST_OPTIONS = (
    _option(
        "prompt", "STRING", "the prompt, up to the engine's `max_input_len` tokens", "text_input", "", required=True
    ),
    _option("prompt", "INT32", "the prompt's token ids", "", "input_ids", dims=_ANY, required=True),
    _option("input_lengths", "INT32", "how many `input_ids` are the prompt's", "", "input_lengths", required=True),
    _option(
        "max_tokens",
        "INT32",
        "most tokens to generate; the answer also ends at the engine's `max_seq_len`",
        tokens="request_output_len",
        metavar="N",
        required=True,
    ),
    _option(
        "messages", "STRING", "a conversation as JSON in the place of `text_input`, which is then empty", tokens=""
    ),
    _option(
        "chat_template_kwargs",
        "STRING",
        "for a conversation: what else the model's chat template knows (`tools`, `enable_thinking`), a JSON object",
        tokens="",
    ),
    _option("temperature", "FP32", "divides the logits; 0 is greedy", metavar="T"),
    _option("top_k", "INT32", "sample among so many likeliest tokens; 0 is all", tokens="runtime_top_k", metavar="N"),
    _option("top_p", "FP32", "sample among the fewest tokens that reach it", tokens="runtime_top_p", metavar="P"),
    _option("min_p", "FP32", "drop tokens below this share of the likeliest one's probability", metavar="P"),
    _option("seed", "UINT64", "of the request's own random generator", "seed random_seed", metavar="N"),
    _option("stop", "STRING", "strings that end the answer", "stop_words", "", dims=_ANY, metavar="TEXT"),
    _option(
        "stop",
        "INT32",
        "words of token ids that end the answer: the ids of all words, then where each word ends, padded with -1",
        "",
        "stop_words_list",
        dims=_WORDS,
    ),
    _option("bad", "STRING", "strings that must not be generated", "bad_words", "", dims=_ANY, metavar="TEXT"),
    _option("bad", "INT32", "words of token ids that must not be generated", "", "bad_words_list", dims=_WORDS),
    _option("logit_bias", "STRING", "words whose tokens' logits are changed", "embedding_bias_words", "", dims=_ANY),
    _option("logit_bias_weights", "FP32", "by how much, for each word", "embedding_bias_weights", "", dims=_ANY),
    _option("logit_bias", "FP32", "added to the logits, one number a token id", "", "embedding_bias", dims=_ANY),
    _option("end_id", "INT32", "token that ends the answer; absent is the model's own, -1 is none", metavar="N"),
    _option("pad_id", "INT32", "of no effect: nothing is padded"),
    _option("min_tokens", "INT32", "no end before so many tokens", "min_tokens min_length", metavar="N"),
    _option("repetition_penalty", "FP32", "above 1 makes seen tokens less likely", metavar="X"),
    _option("presence_penalty", "FP32", "subtracted from the logits of tokens in the answer", metavar="X"),
    _option("frequency_penalty", "FP32", "subtracted once for each time that a token is in the answer", metavar="X"),
    _option("n", "INT32", "sequences for each prompt", "num_return_sequences"),
    _option("adaptive_k_policy", "STRING", "the engine's policy that decides k; absent is its default", metavar="NAME"),
    _option("user", "STRING", "whose request it is, for a server's A/B test", "adaptive_k_user", metavar="NAME"),
    _option("stream", "BOOL", "responses after each step instead of one at the end", tokens="streaming"),
    _option("exclude_input_in_output", "BOOL", "leave the prompt out of the output; a stream never has it"),
    _option("return_log_probs", "BOOL", "return `cum_log_probs` and `output_log_probs`"),
    _option("return_context_logits", "BOOL", "return `context_logits`"),
    _option("return_generation_logits", "BOOL", "return `generation_logits`"),
    _option(
        "return_perf_metrics",
        "BOOL",
        "return the request's times, KV-cache and speculation figures",
        "return_perf_metrics return_kv_cache_reuse_stats",
    ),
    _option("return_num_input_tokens", "BOOL", "return `num_input_tokens`"),
    _option("return_num_output_tokens", "BOOL", "return `num_output_tokens`"),
    _option("return_k", "BOOL", "return k and entropy of each token and layer", "return_adaptive_k"),
    _option("return_engine", "BOOL", "return `adaptive_k_engine`, generate nothing", "return_adaptive_k_engine"),
    _option("end_request", "BOOL", "end the running request that has this one's request id", "stop"),
    _option("beam_width", "INT32", "accepted at 1: beam search is refused"),
    _option("length_penalty", "FP32", "accepted at 0 and 1: it acts on beam search", tokens="len_penalty"),
    _option("early_stopping", "BOOL", "of no effect: it acts on beam search", "", "early_stopping"),
)
"""Each option in each of its forms, in the order of the documentation."""

OPTIONS_BY_NAME = {option.name: option for option in REQUEST_OPTIONS if option.text}
"""Each option in its first form, which is that of the models that take text."""


_ALL_MODELS, _TEXT, _TOKENS = (True, True), (True, False), (False, True)
_MATRIX = (-1, -1)

UNSUPPORTED_OPTIONS = tuple(
    RequestOption(name, data_type, "", (name,) * text, (name,) * tokens, dims)
    for (text, tokens), data_type, dims, names in (
        (_ALL_MODELS, "FP16", _MATRIX, "prompt_embedding_table lora_weights"),
        (_ALL_MODELS, "INT32", (1,), "prompt_vocab_size"),
        (_ALL_MODELS, "INT32", (-1, 3), "lora_config"),
        (_ALL_MODELS, "UINT64", (1,), "lora_task_id"),
        (_ALL_MODELS, "STRING", (1,), "guided_decoding_guide_type guided_decoding_guide"),
        (_TEXT, "STRING", (1,), "decoder_text_input image_url_input"),
        (_TEXT, "FP16", (-1, 3, -1, -1), "image_input"),
        (_TEXT, "UINT8", (-1, -1, -1, -1), "image_bytes_input video_bytes_input"),
        (_TEXT, "INT32", (1,), "num_draft_tokens"),
        (_TEXT, "BOOL", (1,), "use_draft_logits"),
        (_TEXT, "UINT64", (1,), "prompt_table_extra_id"),
        (_TOKENS, "INT32", _ANY, "draft_input_ids decoder_input_ids"),
        (_TOKENS, "INT32", (1,), "decoder_input_lengths encoder_output_lengths runtime_top_p_reset_ids"),
        (_TOKENS, "INT32", (1,), "lookahead_window_size lookahead_ngram_size lookahead_verification_set_size"),
        (_TOKENS, "INT32", (1,), "retention_decode_priority retention_decode_duration_ms"),
        (_TOKENS, "INT32", _ANY, "retention_token_range_starts retention_token_range_ends"),
        (_TOKENS, "INT32", _ANY, "retention_token_range_priorities retention_token_range_durations_ms"),
        (_TOKENS, "FP32", (1,), "draft_acceptance_threshold beam_search_diversity_rate"),
        (_TOKENS, "FP32", (1,), "runtime_top_p_min runtime_top_p_decay"),
        (_TOKENS, "FP32", _ANY, "mrope_rotary_cos_sin"),
        (_TOKENS, "FP32", _MATRIX, "draft_logits"),
        (_TOKENS, "FP16", _MATRIX, "encoder_input_features"),
        (_TOKENS, "INT64", (1,), "mrope_position_deltas"),
        (_TOKENS, "UINT64", _ANY, "prompt_table_extra_ids"),
        (_TOKENS, "BOOL", _MATRIX, "cross_attention_mask"),
        (_TOKENS, "BOOL", (1,), "skip_cross_attn_blocks"),
        (_TOKENS, "UINT8", _ANY, "context_phase_params"),
    )
    for name in names.split()
)
"""Inputs of TensorRT-LLM's models that are declared, so that the refusal of a client that sends one names it."""
