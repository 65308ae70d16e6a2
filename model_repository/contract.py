# SPDX-License-Identifier: Apache-2.0
"""The tensors of the served models: names, types and shapes of TensorRT-LLM's Triton repository, and ours.

Source: `all_models/inflight_batcher_llm/{ensemble,tensorrt_llm_bls,tensorrt_llm}/config.pbtxt` of TensorRT-LLM's Triton
backend (1.2 line, with the names of inputs since 0.16). Inputs are those of `request_options`. The `config.pbtxt` files
beside this module are what `shipped_configs` returns from these tables, so a server and the request parser cannot
disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from adaptive_k_moe.request_options import REQUEST_OPTIONS, UNSUPPORTED_OPTIONS

ENSEMBLE = "ensemble"
"""The model that holds the engine."""

BLS = "tensorrt_llm_bls"
"""The other name of the model that takes text; it forwards to `ENSEMBLE`."""

TOKENS = "tensorrt_llm"
"""The model that takes and gives token ids; it forwards to `ENSEMBLE`."""

MODELS = (ENSEMBLE, BLS, TOKENS)
"""All models of a server."""

KV_CACHE_PARAMETER = "max_tokens_in_paged_kv_cache"
"""The model's parameter, named as TensorRT-LLM's, of how many tokens the KV cache holds."""

MAX_BATCH_SIZE = 64
"""Most prompts in one request. Requests are batched in flight by the runtime, whatever this is."""


class Tensor(NamedTuple):
    """One tensor of a model; `dims` leave out the batch axis that every tensor has in front."""

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    required: bool = False


PERF_METRICS = (
    *(Tensor(f"kv_cache_{what}_blocks", "INT32") for what in ("alloc_new", "reused", "alloc_total")),
    *(Tensor(f"{what}_time_ns", "INT64") for what in ("arrival", "first_scheduled", "first_token", "last_token")),
    Tensor("acceptance_rate", "FP32"),
    Tensor("total_accepted_draft_tokens", "INT32"),
    Tensor("total_draft_tokens", "INT32"),
)
"""What a request that asks for its performance metrics gets."""

_OUTPUTS = (
    Tensor("cum_log_probs", "FP32", (-1,)),
    Tensor("output_log_probs", "FP32", (-1, -1)),
    Tensor("context_logits", "FP32", (-1, -1)),
    Tensor("generation_logits", "FP32", (-1, -1, -1)),
    *(Tensor(name, "INT32") for name in ("batch_index", "sequence_index", "num_input_tokens", "num_output_tokens")),
    *PERF_METRICS,
    *(
        Tensor(f"adaptive_k_{what}", "FP32")
        for what in ("avg_k", "compute_saved_ratio", "avg_reads", "reads_per_token")
    ),
    Tensor("adaptive_k_k", "INT32", (-1, -1)),
    Tensor("adaptive_k_entropy", "FP32", (-1, -1)),
    *(Tensor(name, "STRING") for name in ("adaptive_k_followed", "adaptive_k_variant", "adaptive_k_engine")),
)


def inputs_of(model: str) -> list[Tensor]:
    """The inputs of a served model, those that are refused by name at the end."""
    return [
        Tensor(name, option.data_type, option.dims, option.required)
        for option in (*REQUEST_OPTIONS, *UNSUPPORTED_OPTIONS)
        for name in (option.tokens if model == TOKENS else option.text)
    ]


def outputs_of(model: str) -> list[Tensor]:
    """The outputs of a served model."""
    if model == TOKENS:
        return [Tensor("output_ids", "INT32", (-1, -1)), Tensor("sequence_length", "INT32", (-1,)), *_OUTPUTS]
    return [Tensor("text_output", "STRING", (-1,)), *_OUTPUTS]


def input_table() -> str:
    """The inputs as the table in `docs/serving.md`, in Markdown."""
    lines = [
        f"| `{ENSEMBLE}`, `{BLS}` | `{TOKENS}` | type | meaning |",
        "| --- | --- | --- | --- |",
    ]
    sizes: dict[tuple[int, ...], str] = {(1,): "", (-1,): ", n", (2, -1): " [2, n]"}
    for option in REQUEST_OPTIONS:
        tokens = "same" if option.text == option.tokens else _in_words(option.tokens)
        data_type = f"{option.data_type.lower()}{sizes[option.dims]}"
        meaning = f"{option.help}{'; required' * option.required}"
        lines.append(f"| {_in_words(option.text)} | {tokens} | {data_type} | {meaning} |")
    return "\n".join(lines) + "\n"


def _in_words(names: Sequence[str]) -> str:
    older = f" (older: {', '.join(f'`{name}`' for name in names[1:])})" if names[1:] else ""
    return f"`{names[0]}`{older}" if names else "none"


def shipped_configs() -> dict[str, str]:
    """The `config.pbtxt` of each model as it stands in this package, with the engine left to be named."""
    engine = {"engine_dir": "${engine_dir}"}
    return {model: render_config(model, engine if model == ENSEMBLE else None) for model in MODELS}


def render_config(model: str, parameters: Mapping[str, str] | None = None, *, decoupled: bool = True) -> str:
    """The `config.pbtxt` of a served model.

    Args:
        model: one of `MODELS`.
        parameters: the model's parameters, name to value.
        decoupled: whether a request may have any number of responses. If not, it has one, and unary calls are allowed.
    """
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        "# Written by adaptive_k_moe.model_repository.contract.",
        f'name: "{model}"',
        'backend: "python"',
        f"max_batch_size: {MAX_BATCH_SIZE}",
        f"model_transaction_policy {{ decoupled: {str(decoupled).lower()} }}",
        # One instance: a second one would be a second engine in memory.
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
        *_render_tensors("input", inputs_of(model)),
        *_render_tensors("output", outputs_of(model)),
    ]
    for key, value in (parameters or {}).items():
        lines += [
            "parameters {",
            f"  key: {_quoted(key)}",
            f"  value {{ string_value: {_quoted(value)} }}",
            "}",
        ]
    return "\n".join(lines) + "\n"


def _render_tensors(field: str, tensors: Sequence[Tensor]) -> list[str]:
    lines = []
    for name, data_type, dims, required in tensors:
        tail = " optional: true" if field == "input" and not required else ""
        sizes = ", ".join(map(str, dims))
        lines.append(f'{field} [ {{ name: "{name}" data_type: TYPE_{data_type} dims: [ {sizes} ]{tail} }} ]')
    return lines


def _quoted(text: str) -> str:
    """A protobuf text-format string; bytes outside printable ASCII are escaped, so any path survives."""
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}"
        for byte in text.encode("utf-8", "surrogateescape")
    )
    return f'"{escaped}"'
