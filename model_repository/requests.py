# SPDX-License-Identifier: Apache-2.0
"""Input tensors of one Triton request -> what the runtime is asked for, one `GenerationRequest` a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from adaptive_k_moe.errors import RequestError
from adaptive_k_moe.request_options import REQUEST_OPTIONS, UNSUPPORTED_OPTIONS
from adaptive_k_moe.runtime.chat_template import Message, check_messages
from adaptive_k_moe.runtime.outputs import Enrollment
from adaptive_k_moe.runtime.sampling_params import SamplingParams

Inputs = Mapping[str, npt.NDArray[Any]]

_UNSUPPORTED = {name for option in UNSUPPORTED_OPTIONS for name in (*option.text, *option.tokens)}
_TEXT_INPUTS = {option.name: option.text[0] for option in REQUEST_OPTIONS if option.text}
# Headers of the W3C trace context. The server is started so that gRPC's come as parameters; they can be given as
# parameters, too.
_TRACE_HEADERS = ("traceparent", "tracestate")
# A field of Triton's own that its `generate` endpoints also pass on, and what TensorRT-LLM's client of `tensorrt_llm`
# says beside the input `streaming`.
_MEANINGLESS = ("id", "Streaming")
# Of the inputs that are not supported, those whose zero says "not used".
_OFF_AT_ZERO = {"num_draft_tokens", "use_draft_logits", "prompt_vocab_size", "beam_search_diversity_rate"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt of a Triton request, checked.

    Attributes:
        prompt: the text, the token ids, or the messages of a conversation.
        chat_template_kwargs: what else the model's chat template is given for the messages.
        batch_index: its place among the request's prompts.
        sampling_params: how its tokens are chosen and which policy they follow.
        streaming: whether an answer goes out after each step, or once at the end.
        returns_token_ids: whether the answer is token ids and not text, as the prompt is.
        repeat_prompt: whether the answer starts with the prompt (never when streaming).
        return_adaptive_k: whether k and entropy of each token and layer are returned.
        return_perf_metrics: whether the request's times, KV-cache and speculation figures are returned.
        return_num_input_tokens: whether the prompt's length in tokens is returned.
        return_num_output_tokens: whether the answer's length in tokens is returned.
        user: whose it is, for A/B tests; None is nobody's.
        enrollment: its place in an A/B test; None if it is in none.
    """

    prompt: str | list[int] | list[Message]
    chat_template_kwargs: dict[str, Any] | None = None
    batch_index: int
    sampling_params: SamplingParams
    streaming: bool = False
    returns_token_ids: bool = False
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
        if not (name.startswith("triton_") or name.lower() in _TRACE_HEADERS or name in _MEANINGLESS):
            raise RequestError(f"{name!r} is not an input of this model: remove it or check its spelling.")
    for name, tensor in inputs.items():
        if name in _UNSUPPORTED and not _is_off(name, tensor):
            raise RequestError(f"the input {name!r} is not supported by this server: leave it out.")
    # By the option that each is; a present name, which comes last, goes before an older one.
    options = {
        option.name: inputs[name]
        for option in REQUEST_OPTIONS
        for name in reversed((*option.text, *option.tokens))
        if name in inputs
    }
    return [_parse_prompt(options, row) for row in range(len(options["prompt"]))]


def _parse_prompt(options: Inputs, row: int) -> GenerationRequest:
    def value(name: str, default: Any = None) -> Any:
        return options[name][row].ravel()[0].item() if name in options else default

    def text(name: str) -> str:
        return _decode(_TEXT_INPUTS[name], options[name][row].ravel()[0]) if name in options else ""

    def flag(name: str) -> bool:
        return bool(value(name, False))

    if (beam_width := value("beam_width", 1)) > 1:
        raise RequestError(f"beam_width is {beam_width}: beam search is not supported, leave it at 1.")
    if (length_penalty := value("length_penalty", 1.0)) not in (0.0, 1.0):
        raise RequestError(
            f"length_penalty is {length_penalty:g}: it acts on beam search, which is not supported; leave it out."
        )
    # TensorRT-LLM's rule: neither top_k nor top_p means greedy, whatever the temperature. It has no min_p here.
    top_k, top_p, min_p = value("top_k", 0), value("top_p", 0.0), value("min_p", 0.0)
    if top_k == 0 and top_p == 0 and min_p == 0:
        top_k = 1
    returns_token_ids = options["prompt"].dtype != object
    prompt: str | list[int] | list[Message]
    prompt = _token_ids(options["prompt"][row], value("input_lengths")) if returns_token_ids else text("prompt")
    if messages := text("messages"):
        if prompt:
            raise RequestError("text_input and messages were both given: leave text_input empty for a conversation.")
        prompt = list(check_messages(_from_json("messages", messages)))
    chat_template_kwargs = None
    if given := text("chat_template_kwargs"):
        if not messages:
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
            min_p=min_p,
            repetition_penalty=value("repetition_penalty", 1.0),
            presence_penalty=value("presence_penalty", 0.0),
            frequency_penalty=value("frequency_penalty", 0.0),
            min_tokens=value("min_tokens", 0),
            seed=value("seed"),
            n=value("n", 1),
            stop=_words("stop", options, row),
            bad=_words("bad", options, row),
            logit_bias=_logit_bias(options, row),
            end_id=value("end_id"),
            pad_id=value("pad_id"),
            logprobs=0 if flag("return_log_probs") else None,
            return_context_logits=flag("return_context_logits"),
            return_generation_logits=flag("return_generation_logits"),
            adaptive_k_policy=text("adaptive_k_policy") or None,
        ),
        streaming=streaming,
        returns_token_ids=returns_token_ids,
        repeat_prompt=not messages and not streaming and not flag("exclude_input_in_output"),
        return_adaptive_k=flag("return_k"),
        return_perf_metrics=flag("return_perf_metrics"),
        return_num_input_tokens=flag("return_num_input_tokens"),
        return_num_output_tokens=flag("return_num_output_tokens"),
        user=text("user") or None,
    )


def _token_ids(padded: npt.NDArray[Any], length: int) -> list[int]:
    if not 0 < length <= padded.size:
        raise RequestError(f"input_lengths is {length}: it must be between 1 and {padded.size}, the size of input_ids.")
    token_ids: list[int] = padded.ravel()[:length].tolist()
    return token_ids


def _words(name: str, options: Inputs, row: int) -> list[str] | list[list[int]] | None:
    """Strings, or words of token ids; None if there are none."""
    if name not in options:
        return None
    given = options[name][row]
    if given.dtype == object:
        # An empty string is how clients say that they have none.
        return [word for item in given.ravel() if (word := _decode(_TEXT_INPUTS[name], item))] or None
    # TensorRT-LLM's format [2, n]: the ids of all words, and the place after each word's last; -1 pads the places.
    token_ids, ends = given[0].tolist(), [end for end in given[1].tolist() if end != -1]
    bounds = [0, *ends]
    if bounds != sorted(bounds) or bounds[-1] > len(token_ids):
        raise RequestError(
            f"{name}_words_list has the word ends {ends}: they must rise, up to {len(token_ids)} at most."
        )
    words = [token_ids[start:end] for start, end in zip(bounds, ends, strict=False)]
    return [word for word in words if word] or None


def _logit_bias(options: Inputs, row: int) -> dict[int | str, float] | None:
    """What is added to the logits of token ids, or of the tokens of words; None if it is nothing."""
    if "logit_bias" not in options and "logit_bias_weights" not in options:
        return None
    if "logit_bias" in options and options["logit_bias"].dtype != object:  # one number a token id
        dense = options["logit_bias"][row].ravel()
        token_ids = dense.nonzero()[0]
        return dict(zip(token_ids.tolist(), dense[token_ids].tolist(), strict=True)) or None
    words = [_decode("embedding_bias_words", word) for word in _row("logit_bias", options, row)]
    weights = _row("logit_bias_weights", options, row)
    if len(words) != len(weights) and any(words):
        raise RequestError(
            f"embedding_bias_words has {len(words)} words and embedding_bias_weights {len(weights)} numbers: "
            "give a number for each word."
        )
    bias: dict[int | str, float] = {}
    for word, weight in zip(words, weights, strict=False):
        if word:
            bias[word] = bias.get(word, 0.0) + float(weight)
    return bias or None


def _row(name: str, options: Inputs, row: int) -> list[Any]:
    found: list[Any] = options[name][row].ravel().tolist() if name in options else []
    return found


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
