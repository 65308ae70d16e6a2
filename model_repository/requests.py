# SPDX-License-Identifier: Apache-2.0
"""Input tensors of one Triton request -> what the runtime is asked for, one `GenerationRequest` a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from adaptive_k_moe.errors import RequestError
from adaptive_k_moe.model_repository.contract import UNSUPPORTED_INPUTS
from adaptive_k_moe.runtime.chat_template import Message, check_messages
from adaptive_k_moe.runtime.outputs import Enrollment
from adaptive_k_moe.runtime.sampling_params import SamplingParams

Inputs = Mapping[str, npt.NDArray[Any]]

_UNSUPPORTED = {tensor.name for tensor in UNSUPPORTED_INPUTS}
# Headers of the W3C trace context. The server is started so that gRPC's come as parameters; they can be given as
# parameters, too.
_TRACE_HEADERS = ("traceparent", "tracestate")
# A field of Triton's own that its `generate` endpoints also pass on.
_REQUEST_ID = "id"
# Of the inputs that are not supported, those whose zero says "not used".
_OFF_AT_ZERO = {"num_draft_tokens", "use_draft_logits", "prompt_vocab_size"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt of a Triton request, checked.

    Attributes:
        prompt: the text, or the messages of a conversation.
        chat_template_kwargs: what else the model's chat template is given for the messages.
        batch_index: its place among the request's prompts.
        sampling_params: how its tokens are chosen and which policy they follow.
        streaming: whether an answer goes out after each step, or once at the end.
        repeat_prompt: whether `text_output` starts with the prompt (never when streaming).
        return_adaptive_k: whether k and entropy of each token and layer are returned.
        return_perf_metrics: whether the request's times are returned.
        return_num_input_tokens: whether the prompt's length in tokens is returned.
        return_num_output_tokens: whether the answer's length in tokens is returned.
        user: whose it is, for A/B tests; None is nobody's.
        enrollment: its place in an A/B test; None if it is in none.
    """

    prompt: str | list[Message]
    chat_template_kwargs: dict[str, Any] | None = None
    batch_index: int
    sampling_params: SamplingParams
    streaming: bool = False
    repeat_prompt: bool = False
    return_adaptive_k: bool = False
    return_perf_metrics: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False
    user: str | None = None
    enrollment: Enrollment | None = None


def asks_to_stop(inputs: Inputs) -> bool:
    """Whether the request only ends another one, the one with the same request id."""
    return _is_on("stop", inputs)


def asks_about_engine(inputs: Inputs) -> bool:
    """Whether the request only asks what is served."""
    return _is_on("return_adaptive_k_engine", inputs)


def trace_headers(parameters: Mapping[str, Any]) -> dict[str, str]:
    """The W3C trace context among a request's parameters; header names come in lower case."""
    lower = {name.lower(): value for name, value in parameters.items()}
    return {name: str(lower[name]) for name in _TRACE_HEADERS if name in lower}


def parse_request(inputs: Inputs, parameters: Mapping[str, Any] | None = None) -> list[GenerationRequest]:
    """The prompts of a request.

    Args:
        inputs: the tensors that were sent, by name, each shaped [batch, ...] (the server has checked
            types and shapes against the model's configuration).
        parameters: the request's parameters. Triton's `generate` endpoints put every JSON field there
            that is no input's name, so a misspelt option shows up here.

    Raises:
        RequestError: a value is out of range, an option is not supported, or a field is unknown.
    """
    for name in parameters or {}:
        if not name.startswith("triton_") and name.lower() not in (*_TRACE_HEADERS, _REQUEST_ID):
            raise RequestError(f"{name!r} is not an input of this model: remove it or check its spelling.")
    for name in _UNSUPPORTED & inputs.keys():
        if not _is_off(name, inputs[name]):
            raise RequestError(f"the input {name!r} is not supported by this server: leave it out.")
    return [_parse_prompt(inputs, row) for row in range(len(inputs["text_input"]))]


def _parse_prompt(inputs: Inputs, row: int) -> GenerationRequest:
    def value(name: str, default: Any = None) -> Any:
        return inputs[name][row].ravel()[0].item() if name in inputs else default

    def text(name: str) -> str:
        return _decode(name, inputs[name][row].ravel()[0])

    def flag(name: str) -> bool:
        return bool(value(name, False))

    def words(name: str) -> list[str] | None:
        # An empty string is how clients say that they have none.
        found = [_decode(name, item) for item in inputs[name][row].ravel()] if name in inputs else []
        return [word for word in found if word] or None

    if (beam_width := value("beam_width", 1)) > 1:
        raise RequestError(f"beam_width is {beam_width}: beam search is not supported, leave it at 1.")
    if (length_penalty := value("length_penalty", 1.0)) not in (0.0, 1.0):
        raise RequestError(
            f"length_penalty is {length_penalty:g}: it acts on beam search, which is not supported; leave it out."
        )
    # TensorRT-LLM's rule: neither top_k nor top_p means greedy, whatever the temperature.
    top_k, top_p = value("top_k", 0), value("top_p", 0.0)
    if top_k == 0 and top_p == 0:
        top_k = 1
    policy = text("adaptive_k_policy") if "adaptive_k_policy" in inputs else None
    prompt: str | list[Message] = text("text_input")
    if "messages" in inputs and (messages := text("messages")):
        if prompt:
            raise RequestError("text_input and messages were both given: leave text_input empty for a conversation.")
        prompt = list(check_messages(_from_json("messages", messages)))
    chat_template_kwargs = None
    if "chat_template_kwargs" in inputs and (given := text("chat_template_kwargs")):
        if isinstance(prompt, str):
            raise RequestError("chat_template_kwargs is for a conversation: give messages, too, or leave it out.")
        chat_template_kwargs = _from_json("chat_template_kwargs", given)
    streaming = flag("stream")
    return GenerationRequest(
        prompt=prompt,
        chat_template_kwargs=chat_template_kwargs,
        batch_index=row,
        sampling_params=SamplingParams(
            max_tokens=value("max_tokens"),
            temperature=value("temperature", 1.0),
            top_k=top_k,
            top_p=top_p if top_p != 0 else 1.0,
            repetition_penalty=value("repetition_penalty", 1.0),
            presence_penalty=value("presence_penalty", 0.0),
            frequency_penalty=value("frequency_penalty", 0.0),
            min_tokens=value("min_tokens", value("min_length", 0)),
            seed=value("seed", value("random_seed")),
            n=value("num_return_sequences", 1),
            stop=words("stop_words"),
            bad=words("bad_words"),
            end_id=value("end_id"),
            pad_id=value("pad_id"),
            logprobs=0 if flag("return_log_probs") else None,
            return_context_logits=flag("return_context_logits"),
            return_generation_logits=flag("return_generation_logits"),
            adaptive_k_policy=policy or None,
        ),
        streaming=streaming,
        repeat_prompt=isinstance(prompt, str) and not streaming and not flag("exclude_input_in_output"),
        return_adaptive_k=flag("return_adaptive_k"),
        return_perf_metrics=flag("return_perf_metrics"),
        return_num_input_tokens=flag("return_num_input_tokens"),
        return_num_output_tokens=flag("return_num_output_tokens"),
        user=(text("adaptive_k_user") or None) if "adaptive_k_user" in inputs else None,
    )


def _is_on(name: str, inputs: Inputs) -> bool:
    return name in inputs and bool(inputs[name].any())


def _from_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is not JSON: {error}.") from None


def _is_off(name: str, tensor: npt.NDArray[Any]) -> bool:
    if tensor.dtype == object:
        return not any(tensor.ravel())
    return tensor.size == 0 or (name in _OFF_AT_ZERO and not tensor.any())


def _decode(name: str, item: Any) -> str:
    if isinstance(item, str):
        return item
    try:
        return str(item, "utf-8")
    except UnicodeDecodeError:
        raise RequestError(f"{name} is not UTF-8 text.") from None
