# SPDX-License-Identifier: Apache-2.0
"""Requests and answers as Triton's gRPC messages. No connection is made here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype, serialize_byte_tensor, triton_to_np_dtype

from adaptive_k_moe.arguments import check_arguments, kinds_of
from adaptive_k_moe.client.options import GenerateOptions, Prompt
from adaptive_k_moe.client.results import Chunk, Completion, EngineDescription
from adaptive_k_moe.errors import ClientError
from adaptive_k_moe.request_options import DEFAULT_MAX_TOKENS, OPTIONS_BY_NAME, RequestOption

_NUMBERS = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32}


def encode_request(model_name: str, prompt: Prompt, options: GenerateOptions, *, stream: bool) -> Any:
    """A `ModelInferRequest` for one prompt.

    Raises:
        ClientError: an option is unknown or its value cannot be sent.
    """
    kinds = kinds_of(GenerateOptions)
    given: Any = {name: value for name, value in options.items() if value is not None}
    for name, value in options.items():
        if name not in kinds:
            raise ClientError(f"generate() has no option {name!r}.")
        option = OPTIONS_BY_NAME.get(name)
        if name in given and (option is None or option.data_type not in _NUMBERS):  # those say what they can hold
            check_arguments(ClientError, kinds[name], **{name: value})
    text, messages = (prompt, None) if isinstance(prompt, str) else ("", _messages(prompt))
    asked: dict[str, Any] = {
        "prompt": text,
        "messages": messages,
        "stream": stream,
        "exclude_input_in_output": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "return_k": True,
        "max_tokens": DEFAULT_MAX_TOKENS,
        **given,
    }
    if asked.get("temperature") and not {"top_k", "top_p", "min_p"} & asked.keys():
        # The server follows TensorRT-LLM, where a temperature alone is still greedy.
        asked["top_p"] = 1.0
    if template := asked.pop("chat_template_kwargs", None):
        asked["chat_template_kwargs"] = _json("chat_template_kwargs", dict(template))
    if bias := asked.pop("logit_bias", None):
        asked |= {"logit_bias": list(bias), "logit_bias_weights": list(bias.values())}
    tensors = {
        option.text[0]: _tensor(option, asked[name])
        for name, option in OPTIONS_BY_NAME.items()
        if option.text and asked.get(name) is not None and asked[name] != []
    }
    return _request(model_name, tensors, given.get("request_id", ""))


def encode_engine_question(model_name: str) -> Any:
    """A `ModelInferRequest` that asks what is served."""
    required = {"text_input": _strings(""), "max_tokens": np.array([[1]], np.int32)}
    return _request(model_name, {**required, "return_adaptive_k_engine": _flag(True)})


def decode_chunk(response: Any) -> Chunk | None:
    """The piece of an answer that a `ModelStreamInferResponse` brings; None if it brings nothing.

    Raises:
        ClientError: it brings the server's refusal.
    """
    tensors = _tensors(response)
    if "text_output" not in tensors:
        return None
    k, entropy = tensors.get("adaptive_k_k"), tensors.get("adaptive_k_entropy")
    log_probs, variant = tensors.get("output_log_probs"), tensors.get("adaptive_k_variant")
    reads, share, followed = (
        tensors.get(f"adaptive_k_{name}") for name in ("avg_reads", "reads_per_token", "followed")
    )
    return Chunk(
        text=tensors["text_output"].ravel()[0].decode(),
        num_output_tokens=int(tensors["num_output_tokens"].item()),
        avg_k=float(tensors["adaptive_k_avg_k"].item()),
        compute_saved_ratio=float(tensors["adaptive_k_compute_saved_ratio"].item()),
        k=None if k is None else k[0],
        entropy=None if entropy is None else entropy[0],
        num_input_tokens=int(tensors["num_input_tokens"].item()),
        log_probs=None if log_probs is None else log_probs[0, 0],
        variant=None if variant is None else variant.item().decode(),
        avg_reads=None if reads is None else float(reads.item()),
        reads_per_token=None if share is None else float(share.item()),
        followed=None if followed is None else json.loads(followed.item()),
    )


def decode_engine(response: Any) -> EngineDescription | None:
    """What a `ModelStreamInferResponse` says of the engine; None if it says nothing.

    Raises:
        ClientError: it brings the server's refusal.
    """
    tensors = _tensors(response)
    if "adaptive_k_engine" not in tensors:
        return None
    content = json.loads(tensors["adaptive_k_engine"].item())
    return EngineDescription(**{field.name: content[field.name] for field in fields(EngineDescription)})


def join(chunks: Sequence[Chunk]) -> Completion:
    """The whole answer from its pieces, of which there is one where nothing was streamed.

    Raises:
        ClientError: there is no piece.
    """
    if not chunks:
        raise ClientError("the server ended the request without an answer.")
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        num_output_tokens=sum(chunk.num_output_tokens for chunk in chunks),
        avg_k=chunks[-1].avg_k,
        compute_saved_ratio=chunks[-1].compute_saved_ratio,
        k=_concatenate([chunk.k for chunk in chunks]),
        entropy=_concatenate([chunk.entropy for chunk in chunks]),
        num_input_tokens=chunks[-1].num_input_tokens,
        log_probs=_concatenate([chunk.log_probs for chunk in chunks]),
        variant=chunks[-1].variant,
        avg_reads=chunks[-1].avg_reads,
        reads_per_token=chunks[-1].reads_per_token,
        followed=chunks[-1].followed,
    )


def explain(error: Any, url: str, timeout: float | None) -> ClientError:
    """A failed call in one sentence.

    Args:
        error: the `grpc.RpcError`.
        url: the server.
        timeout: what the call was allowed, in seconds.
    """
    code, details = error.code(), " ".join((error.details() or "").split())
    details = details.rpartition("last error: ")[2].removeprefix("UNKNOWN: ")  # gRPC's, under its own wrapping
    match code:
        case grpc.StatusCode.UNAVAILABLE if "handshake" in details.lower() or "ssl" in details.lower():
            return ClientError(f"no secure connection to {url}: {details}")
        case grpc.StatusCode.UNAVAILABLE:
            return ClientError(f"the server at {url} cannot be reached, or broke off: {details}")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return ClientError(f"the server at {url} did not finish its answer within {timeout or 0:g} s.")
        case grpc.StatusCode.CANCELLED:
            return ClientError(f"the request to {url} was cancelled.")
        case _:
            return ClientError(f"the server refused the request: {details or code.name}")


def _request(model_name: str, tensors: Mapping[str, npt.NDArray[Any]], request_id: str = "") -> Any:
    request = service_pb2.ModelInferRequest(model_name=model_name, id=request_id)
    for name, array in tensors.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        raw = serialize_byte_tensor(array).item() if array.dtype == object else array.tobytes()
        request.raw_input_contents.append(raw)
    return request


def _tensors(response: Any) -> dict[str, npt.NDArray[Any]]:
    """The output tensors of a `ModelStreamInferResponse`, by name."""
    if response.error_message:
        raise ClientError(f"the server refused the request: {response.error_message}")
    answer = response.infer_response
    return {
        output.name: _array(output, raw)
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=False)
    }


def _messages(prompt: Any) -> str:
    """A conversation as JSON; whether its messages are good for the model is the server's to say."""
    if isinstance(prompt, Sequence) and prompt and all(isinstance(message, Mapping) for message in prompt):
        return _json("messages", list(prompt))
    raise ClientError(f"the prompt is {type(prompt).__name__}: give a string, or a list of messages.")


def _json(name: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ClientError(f"{name} must be plain data, as JSON has it: {error}.") from None


def _tensor(option: RequestOption, value: Any) -> npt.NDArray[Any]:
    """The input of an option: [1, 1], or [1, n] of a list."""
    if option.data_type == "BOOL":
        return _flag(value)
    values = value if option.dims == (-1,) and not isinstance(value, str) else [value]
    if option.data_type == "STRING":
        return _strings(*values)
    numbers = [_number(option.name, number, _NUMBERS[option.data_type]) for number in values]
    return np.concatenate(numbers, axis=1)


def _number(name: str, value: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    # NumPy would let a number wrap around, or cut its fraction off.
    try:
        exact = np.dtype(dtype).kind == "f" or (
            int(value) == value and np.can_cast(np.min_scalar_type(int(value)), dtype)
        )
        if exact:
            return np.array([[value]], dtype)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ClientError(f"{name} is {value!r}: it must be a number of type {np.dtype(dtype).name}.")


def _flag(value: bool) -> npt.NDArray[Any]:
    return np.array([[bool(value)]])


def _strings(*values: str) -> npt.NDArray[Any]:
    try:
        return np.array([[value.encode() for value in values]], dtype=object)
    except UnicodeEncodeError as error:
        raise ClientError(f"{error.object[:40]!r} is not text that can be sent: {error.reason}.") from None


def _array(output: Any, raw: bytes) -> npt.NDArray[Any]:
    if output.datatype == "BYTES":
        flat: npt.NDArray[Any] = deserialize_bytes_tensor(raw)
    else:
        flat = np.frombuffer(raw, triton_to_np_dtype(output.datatype))
    return flat.reshape(tuple(output.shape))


def _concatenate(parts: Sequence[npt.NDArray[Any] | None]) -> npt.NDArray[Any] | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None
