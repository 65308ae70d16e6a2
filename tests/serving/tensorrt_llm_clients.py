# SPDX-License-Identifier: Apache-2.0
"""Requests and readers as TensorRT-LLM's own Triton clients have them (0.19 to 1.2), in our words.

What counts is what would break those programs: the names, types and shapes of the tensors that they send, that they ask
for the outputs that they need, that they close the stream to wait for its answers (so no final response without tensors
is asked for), and the expressions by which they read an answer: `[0].decode()` of a text, `[0][0]` of a number or of
token ids, a figure in every response of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

PERF_METRICS = (
    "kv_cache_alloc_new_blocks",
    "kv_cache_reused_blocks",
    "kv_cache_alloc_total_blocks",
    "arrival_time_ns",
    "first_scheduled_time_ns",
    "first_token_time_ns",
    "last_token_time_ns",
    "acceptance_rate",
    "total_accepted_draft_tokens",
    "total_draft_tokens",
)

_DTYPES: dict[type, Any] = {bool: np.bool_, int: np.int32, float: np.float32, str: object}


def tensor(value: Any) -> Any:
    """[1, n] of a list, [1, 1] of a number or a text; an array is as it is."""
    if isinstance(value, np.ndarray):
        return value
    row = value if isinstance(value, list) else [value]
    return np.array([row], _DTYPES[type(row[0])])


def ask(
    url: str,
    model: str,
    inputs: dict[str, Any],
    outputs: Sequence[str] | None = None,
    *,
    request_id: str = "",
    meanwhile: Callable[[Any], None] | None = None,
    cancel: bool = False,
) -> list[Any]:
    """The responses of one stream; `meanwhile` is called with the client before the stream is closed.

    Raises:
        InferenceServerException: the server refused.
    """
    answers: list[Any] = []
    with grpcclient.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: answers.append(result if error is None else error))
        send(client, model, inputs, outputs, request_id=request_id)
        if meanwhile is not None:
            meanwhile(client)
        client.stop_stream(cancel_requests=cancel)
    for answer in answers:
        if isinstance(answer, InferenceServerException):
            raise answer
    return answers


def wire(inputs: dict[str, Any]) -> list[Any]:
    """Inputs as they are sent."""
    sent = []
    for name, value in inputs.items():
        array = tensor(value)
        sent.append(grpcclient.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        sent[-1].set_data_from_numpy(array)
    return sent


def send(client: Any, model: str, inputs: dict[str, Any], outputs: Sequence[str] | None = None, **options: Any) -> None:
    """Put a request on the client's open stream."""
    wanted = None if outputs is None else [grpcclient.InferRequestedOutput(name) for name in outputs]
    client.async_stream_infer(model, wire(inputs), outputs=wanted, **options)


def text_request(prompt: str, max_tokens: int, *, stream: bool, **options: Any) -> dict[str, Any]:
    """The inputs that `end_to_end_grpc_client.py` sends for one prompt."""
    return {
        "text_input": prompt,
        "max_tokens": max_tokens,
        "stream": stream,
        "beam_width": 1,
        "temperature": 1.0,
        "exclude_input_in_output": False,
        **options,
    }


def read_texts(answers: Sequence[Any], *, stream: bool, prompts: int = 1, sequences: int = 1) -> list[list[str]]:
    """Texts by prompt and sequence, as `end_to_end_grpc_client.py` puts them together."""
    texts = [[""] * sequences for _ in range(prompts)]
    for answer in answers:
        batch_index, sequence_index = answer.as_numpy("batch_index"), answer.as_numpy("sequence_index")
        row = 0 if batch_index is None else batch_index[0][0]
        column = 0 if sequence_index is None else sequence_index[0][0]
        text = answer.as_numpy("text_output")[0].decode("utf-8")
        texts[row][column] = texts[row][column] + text if stream else text
    return texts


def read_perf_metrics(answers: Sequence[Any]) -> dict[str, Any]:
    """The figures of the last response; every response has to have them."""
    return [{name: answer.as_numpy(name)[0][0] for name in PERF_METRICS} for answer in answers][-1]


def token_request(input_ids: list[int], max_tokens: int, *, stream: bool, **options: Any) -> dict[str, Any]:
    """The inputs that `inflight_batcher_llm_client.py` sends."""
    return {
        "input_ids": input_ids,
        "input_lengths": len(input_ids),
        "request_output_len": max_tokens,
        "beam_width": 1,
        "temperature": 1.0,
        "streaming": stream,
        "end_id": -1,
        "pad_id": 50256,
        "runtime_top_k": 1,
        "runtime_top_p": 0.0,
        **options,
    }


def stop_request() -> dict[str, Any]:
    """What `inflight_batcher_llm_client.py` sends to end the request of the same id; the ids are not initialised."""
    return {"input_ids": [123456789], "input_lengths": 0, "request_output_len": 0, "stop": True}


def read_token_ids(
    answers: Sequence[Any], *, stream: bool, input_ids: list[int], exclude_input: bool = False, sequences: int = 1
) -> list[list[int]]:
    """Token ids of prompt and answer (or of the answer) by sequence, as `inflight_batcher_llm_client.py` reads them."""
    found: list[list[int]] = [[] if exclude_input or not stream else list(input_ids) for _ in range(sequences)]
    lengths: list[Any] = [None] * sequences
    for answer in answers:
        output_ids = answer.as_numpy("output_ids")
        sequence_index = answer.as_numpy("sequence_index")
        index = 0 if sequence_index is None else sequence_index[0][0]
        lengths[index] = answer.as_numpy("sequence_length")[0][0]
        if not stream or lengths[index] > 0:
            found[index] += list(output_ids[0][0])
    return [ids if stream else ids[:length] for ids, length in zip(found, lengths, strict=True)]
