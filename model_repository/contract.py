# SPDX-License-Identifier: Apache-2.0
"""The tensors of the served models: names, types and shapes of TensorRT-LLM's Triton repository, and ours.

Source: `all_models/inflight_batcher_llm/{ensemble,tensorrt_llm_bls}/config.pbtxt` of TensorRT-LLM's Triton
backend (1.2 line; `random_seed` and `min_length` are the older names of `seed` and `min_tokens`). The
`config.pbtxt` files beside this module are what `shipped_configs` returns from these tables, so a server and the
request parser cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

ENSEMBLE = "ensemble"
"""The model that holds the engine."""

BLS = "tensorrt_llm_bls"
"""The other name that TensorRT-LLM's clients use; it forwards to `ENSEMBLE`."""

KV_CACHE_PARAMETER = "max_tokens_in_paged_kv_cache"
"""The model's parameter, named as TensorRT-LLM's, of how many tokens the KV cache holds."""

MAX_BATCH_SIZE = 64
"""Most prompts in one request. Requests are batched in flight by the runtime, whatever this is."""


class Tensor(NamedTuple):
    """One tensor of a model; `dims` leave out the batch axis that every tensor has in front."""

    name: str
    data_type: str
    dims: tuple[int, ...]


def _scalars(data_type: str, *names: str) -> list[Tensor]:
    return [Tensor(name, data_type, (1,)) for name in names]


REQUIRED_INPUTS = [Tensor("text_input", "TYPE_STRING", (1,)), Tensor("max_tokens", "TYPE_INT32", (1,))]

OPTIONAL_INPUTS = [
    Tensor("stop_words", "TYPE_STRING", (-1,)),
    Tensor("bad_words", "TYPE_STRING", (-1,)),
    *_scalars("TYPE_INT32", "end_id", "pad_id", "top_k"),
    *_scalars("TYPE_FP32", "top_p", "temperature", "length_penalty", "repetition_penalty"),
    *_scalars("TYPE_INT32", "min_tokens", "min_length"),
    *_scalars("TYPE_FP32", "presence_penalty", "frequency_penalty"),
    *_scalars("TYPE_UINT64", "seed", "random_seed"),
    *_scalars("TYPE_BOOL", "return_log_probs", "return_context_logits", "return_generation_logits"),
    *_scalars("TYPE_BOOL", "return_perf_metrics", "return_num_input_tokens", "return_num_output_tokens"),
    *_scalars("TYPE_BOOL", "exclude_input_in_output", "stream"),
    *_scalars("TYPE_INT32", "beam_width", "num_return_sequences"),
    # A conversation as JSON, in the place of `text_input`, and what else the chat template is to know.
    *_scalars("TYPE_STRING", "messages", "chat_template_kwargs"),
    # Ends the running request that has the same request id; from TensorRT-LLM's `tensorrt_llm` model.
    *_scalars("TYPE_BOOL", "stop"),
    *_scalars("TYPE_STRING", "adaptive_k_policy", "adaptive_k_user"),
    # The second one asks about the engine and for no answer.
    *_scalars("TYPE_BOOL", "return_adaptive_k", "return_adaptive_k_engine"),
]

# Declared so that a client that sends one is told which it is, not that Triton knows no such input.
UNSUPPORTED_INPUTS = [
    *_scalars("TYPE_STRING", "decoder_text_input", "image_url_input"),
    Tensor("image_input", "TYPE_FP16", (-1, 3, -1, -1)),
    Tensor("image_bytes_input", "TYPE_UINT8", (-1, -1, -1, -1)),
    Tensor("video_bytes_input", "TYPE_UINT8", (-1, -1, -1, -1)),
    Tensor("prompt_embedding_table", "TYPE_FP16", (-1, -1)),
    *_scalars("TYPE_INT32", "prompt_vocab_size"),
    *_scalars("TYPE_UINT64", "prompt_table_extra_id"),
    Tensor("embedding_bias_words", "TYPE_STRING", (-1,)),
    Tensor("embedding_bias_weights", "TYPE_FP32", (-1,)),
    *_scalars("TYPE_INT32", "num_draft_tokens"),
    *_scalars("TYPE_BOOL", "use_draft_logits"),
    *_scalars("TYPE_UINT64", "lora_task_id"),
    Tensor("lora_weights", "TYPE_FP16", (-1, -1)),
    Tensor("lora_config", "TYPE_INT32", (-1, 3)),
    *_scalars("TYPE_STRING", "guided_decoding_guide_type", "guided_decoding_guide"),
]

INPUTS = [*REQUIRED_INPUTS, *OPTIONAL_INPUTS, *UNSUPPORTED_INPUTS]

OUTPUTS = [
    Tensor("text_output", "TYPE_STRING", (-1,)),
    Tensor("cum_log_probs", "TYPE_FP32", (-1,)),
    Tensor("output_log_probs", "TYPE_FP32", (-1, -1)),
    Tensor("context_logits", "TYPE_FP32", (-1, -1)),
    Tensor("generation_logits", "TYPE_FP32", (-1, -1, -1)),
    *_scalars("TYPE_INT32", "batch_index", "sequence_index", "num_input_tokens", "num_output_tokens"),
    *_scalars("TYPE_INT64", "arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns"),
    *_scalars("TYPE_FP32", "adaptive_k_avg_k", "adaptive_k_compute_saved_ratio"),
    Tensor("adaptive_k_k", "TYPE_INT32", (-1, -1)),
    Tensor("adaptive_k_entropy", "TYPE_FP32", (-1, -1)),
    *_scalars("TYPE_STRING", "adaptive_k_variant", "adaptive_k_engine"),
]


def shipped_configs() -> dict[str, str]:
    """The `config.pbtxt` of each model as it stands in this package, with the engine left to be named."""
    return {ENSEMBLE: render_config(ENSEMBLE, {"engine_dir": "${engine_dir}"}), BLS: render_config(BLS)}


def render_config(model: str, parameters: Mapping[str, str] | None = None) -> str:
    """The `config.pbtxt` of a served model.

    Args:
        model: `ENSEMBLE` or `BLS`.
        parameters: the model's parameters, name to value.
    """
    required = {tensor.name for tensor in REQUIRED_INPUTS}
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        "# Written by adaptive_k_moe.model_repository.contract.",
        f'name: "{model}"',
        'backend: "python"',
        f"max_batch_size: {MAX_BATCH_SIZE}",
        "model_transaction_policy { decoupled: true }",
        # One instance: a second one would be a second engine in memory.
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
        *_render_tensors("input", INPUTS, optional={tensor.name for tensor in INPUTS} - required),
        *_render_tensors("output", OUTPUTS, optional=set()),
    ]
    for key, value in (parameters or {}).items():
        lines += [
            "parameters {",
            f"  key: {_quoted(key)}",
            f"  value {{ string_value: {_quoted(value)} }}",
            "}",
        ]
    return "\n".join(lines) + "\n"


def _render_tensors(field: str, tensors: Sequence[Tensor], optional: set[str]) -> list[str]:
    lines = []
    for tensor in tensors:
        dims = ", ".join(str(size) for size in tensor.dims)
        tail = " optional: true" if tensor.name in optional else ""
        lines.append(f'{field} [ {{ name: "{tensor.name}" data_type: {tensor.data_type} dims: [ {dims} ]{tail} }} ]')
    return lines


def _quoted(text: str) -> str:
    """A protobuf text-format string; bytes outside printable ASCII are escaped, so any path survives."""
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}"
        for byte in text.encode("utf-8", "surrogateescape")
    )
    return f'"{escaped}"'
