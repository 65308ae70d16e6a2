# SPDX-License-Identifier: Apache-2.0
"""What the runtime reports of a prompt -> the output tensors of the responses that tell the client."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.engine_config import EngineConfig
from adaptive_k_moe.model_repository.contract import PERF_METRICS
from adaptive_k_moe.model_repository.requests import GenerationRequest
from adaptive_k_moe.policy import PolicyTables
from adaptive_k_moe.runtime.outputs import CompletionOutput, RequestMetrics, RequestOutput

Outputs = dict[str, npt.NDArray[Any]]


class ResponseBuilder:
    """The responses of one prompt: pieces when it streams, else one a sequence at the end.

    It runs on the engine's thread after each step, so it touches only what is new in that step, and it
    copies what it keeps, so the runtime may go on changing its outputs.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._tokens_sent = [0] * request.sampling_params.n
        self._ended = [False] * request.sampling_params.n
        self._context_logits_sent = False

    def build(self, output: RequestOutput) -> list[Outputs]:
        """The responses that an output of the runtime calls for: at most one a sequence."""
        if not self._request.streaming and not output.finished:
            return []
        fresh = []
        for completion in output.outputs:
            sent = self._tokens_sent[completion.index]
            ending = completion.finish_reason is not None and not self._ended[completion.index]
            if len(completion.token_ids) > sent or completion.text_diff or ending:
                fresh.append((completion, sent))
                self._tokens_sent[completion.index] = len(completion.token_ids)
                self._ended[completion.index] = completion.finish_reason is not None
        return [self._tensors(output, completion, sent) for completion, sent in fresh]

    def _tensors(self, output: RequestOutput, completion: CompletionOutput, sent: int) -> Outputs:
        request = self._request
        tensors: Outputs = {
            **(self._token_ids(output, completion, sent) if request.returns_token_ids else self._text(completion)),
            "batch_index": _scalar(request.batch_index, np.int32),
            "sequence_index": _scalar(completion.index, np.int32),
            "adaptive_k_avg_k": _scalar(output.avg_k, np.float32),
            "adaptive_k_compute_saved_ratio": _scalar(output.compute_saved_ratio, np.float32),
        }
        if output.avg_reads is not None and output.reads_per_token is not None:
            tensors["adaptive_k_avg_reads"] = _scalar(output.avg_reads, np.float32)
            tensors["adaptive_k_reads_per_token"] = _scalar(output.reads_per_token, np.float32)
        if output.followed_by_load is not None:
            tensors["adaptive_k_followed"] = _string(json.dumps(output.followed_by_load))
        if output.variant is not None:
            tensors["adaptive_k_variant"] = _string(output.variant)
        if request.return_adaptive_k:
            tensors["adaptive_k_k"] = completion.k[None, sent:].astype(np.int32)
            tensors["adaptive_k_entropy"] = completion.entropy[None, sent:].astype(np.float32)
        if completion.logprobs is not None:
            chosen = zip(completion.token_ids[sent:], completion.logprobs[sent:], strict=True)
            tensors["cum_log_probs"] = _scalar(completion.cumulative_logprob or 0.0, np.float32)
            tensors["output_log_probs"] = np.array([[[of[token] for token, of in chosen]]], np.float32)
        if completion.generation_logits is not None:
            tensors["generation_logits"] = completion.generation_logits[None, None, sent:].astype(np.float32)
        if output.context_logits is not None and not self._context_logits_sent:
            tensors["context_logits"] = output.context_logits[None].astype(np.float32)
            # A stream of text says it once, and of several whole sequences each has it. Readers of token ids keep
            # what the last response brought.
            self._context_logits_sent = request.streaming and not request.returns_token_ids
        if request.return_num_input_tokens:
            tensors["num_input_tokens"] = _scalar(len(output.prompt_token_ids), np.int32)
        if request.return_num_output_tokens:
            tensors["num_output_tokens"] = _scalar(len(completion.token_ids) - sent, np.int32)
        if request.return_perf_metrics:
            tensors |= _perf_metrics(output.metrics)
        return tensors

    def _text(self, completion: CompletionOutput) -> Outputs:
        request = self._request
        text = completion.text_diff if request.streaming else completion.text
        text = f"{request.prompt}{text}" if request.repeat_prompt else text
        # Without the batch axis that other outputs have: TensorRT-LLM's clients read `text_output[0].decode()`.
        return {"text_output": np.array([text.encode()], dtype=object)}

    def _token_ids(self, output: RequestOutput, completion: CompletionOutput, sent: int) -> Outputs:
        token_ids = completion.token_ids[sent:]
        if completion.finish_reason == "stop" and completion.stop_reason is None:
            token_ids = token_ids[:-1]  # the end token is, as in TensorRT-LLM, not part of the answer
        if self._request.repeat_prompt:
            token_ids = [*output.prompt_token_ids, *token_ids]
        return {
            "output_ids": np.array([[token_ids]], np.int32),
            "sequence_length": _scalar(len(token_ids), np.int32),
        }


def describe_engine(config: EngineConfig, policies: PolicyTables) -> Outputs:
    """The response that tells what is served: the policies that a request may name, and the experts' numbers."""
    model = config.pretrained_config
    description = {
        "policies": policies.names,
        "default_policy": policies.names[policies.default],
        "num_moe_layers": model.num_moe_layers,
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.num_experts_per_tok,
    }
    return {"adaptive_k_engine": _string(json.dumps(description))}


def _perf_metrics(metrics: RequestMetrics) -> Outputs:
    """Figures of one request. There is neither reuse of KV blocks nor speculation, so theirs are 0."""
    known: dict[str, float] = {
        "kv_cache_alloc_new_blocks": metrics.num_kv_blocks,
        "kv_cache_alloc_total_blocks": metrics.num_kv_blocks,
    }
    for name in ("arrival_time", "first_scheduled_time", "first_token_time", "last_token_time"):
        known[f"{name}_ns"] = round((getattr(metrics, name) or 0.0) * 1e9)
    dtypes = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
    return {name: _scalar(known.get(name, 0), dtypes[data_type]) for name, data_type, *_ in PERF_METRICS}


def _scalar(value: float, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.array([[value]], dtype)


def _string(text: str) -> npt.NDArray[Any]:
    return np.array([[text.encode()]], dtype=object)
