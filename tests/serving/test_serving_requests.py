# SPDX-License-Identifier: Apache-2.0
"""Tensors of a request -> what the runtime is asked for; outputs of the runtime -> tensors; the tables."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from triton_calls import tensors
from tritonclient.grpc import model_config_pb2

import adaptive_k_moe.model_repository as package
from adaptive_k_moe.errors import RequestError
from adaptive_k_moe.model_repository import contract
from adaptive_k_moe.model_repository.policy_watch import PolicyWatch
from adaptive_k_moe.model_repository.repository import write_model_repository
from adaptive_k_moe.model_repository.requests import asks_to_stop, parse_request
from adaptive_k_moe.model_repository.responses import ResponseBuilder
from adaptive_k_moe.request_options import UNSUPPORTED_OPTIONS
from adaptive_k_moe.runtime.expert_runs import ExpertReads, ExpertRuns
from adaptive_k_moe.runtime.outputs import CompletionOutput, RequestMetrics, RequestOutput, rows_of_passes

REQUIRED_OF_TEXT = ["text_input", "max_tokens"]
UNSUPPORTED = {name: option for option in UNSUPPORTED_OPTIONS for name in (*option.text, *option.tokens)}


def _parsed(**inputs: Any) -> Any:
    (request,) = parse_request(tensors(["hello"], **{"max_tokens": 8, **inputs}))
    return request


def _output(tokens: int, *, text: str, text_diff: str, finish: Any = None, n_prompt: int = 3) -> RequestOutput:
    completion = CompletionOutput(
        index=0,
        text=text,
        text_diff=text_diff,
        token_ids=list(range(tokens)),
        token_ids_diff=[],
        k=np.arange(tokens * 2, dtype=np.int32).reshape(tokens, 2),
        entropy=np.zeros((tokens, 2), np.float32),
        finish_reason=finish,
    )
    return RequestOutput(
        request_id="1",
        prompt="hello",
        prompt_token_ids=[1] * n_prompt,
        outputs=[completion],
        finished=finish is not None,
        policy="full",
        prompt_k=np.full((n_prompt, 2), 2, np.int32),
        prompt_entropy=np.zeros((n_prompt, 2), np.float32),
        expert_runs=ExpertRuns.of(2, rows_of_passes(np.full((n_prompt, 2), 2), completion.k)),
        metrics=RequestMetrics(arrival_time=1.0),
    )


@pytest.mark.parametrize("model", contract.MODELS)
def test_the_shipped_configuration_is_what_the_tables_say(model: str) -> None:
    shipped = Path(package.__file__).parent / model / "config.pbtxt"
    assert shipped.read_text() == contract.shipped_configs()[model], (
        "write contract.shipped_configs() to the config.pbtxt files"
    )
    config = text_format.Parse(shipped.read_text(), model_config_pb2.ModelConfig())
    assert config.model_transaction_policy.decoupled
    required = ["input_ids", "input_lengths", "request_output_len"] if model == contract.TOKENS else REQUIRED_OF_TEXT
    assert [tensor.name for tensor in config.input if not tensor.optional] == required
    for tensors_of_it in (config.input, config.output):
        assert len({tensor.name for tensor in tensors_of_it}) == len(tensors_of_it)


def test_the_page_on_serving_has_the_tables_inputs(repository: Path) -> None:
    page = (repository / "docs" / "serving.md").read_text()
    assert contract.input_table() in page, "write contract.input_table() to docs/serving.md"
    for model in contract.MODELS:
        for tensor in contract.outputs_of(model):
            assert f"`{tensor.name}`" in page


def test_any_engine_path_survives_the_configuration(tmp_path: Path) -> None:
    engine_dir = tmp_path / 'an "odd" \\ päth'
    write_model_repository(tmp_path / "models", engine_dir, num_threads=3, kv_cache_max_tokens=4096)
    text = (tmp_path / "models" / "ensemble" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.parameters["engine_dir"].string_value == str(engine_dir)
    assert config.parameters["num_threads"].string_value == "3"
    assert config.parameters["max_tokens_in_paged_kv_cache"].string_value == "4096"


def test_what_is_left_out_is_tensorrt_llms_default() -> None:
    request = _parsed()
    params = request.sampling_params
    assert params.greedy
    assert (params.max_tokens, params.n, params.end_id, params.seed, params.logprobs) == (8, 1, None, None, None)
    assert params.adaptive_k_policy is None
    assert not request.streaming
    assert request.repeat_prompt


@pytest.mark.parametrize(
    ("inputs", "greedy", "top_k", "top_p"),
    [
        ({"temperature": 0.7}, True, 1, 1.0),
        ({"top_p": 0.0, "top_k": 0}, True, 1, 1.0),
        ({"top_p": 0.9}, False, 0, pytest.approx(0.9)),
        ({"top_k": 5}, False, 5, 1.0),
        ({"top_k": 5, "temperature": 0.0}, True, 5, 1.0),
    ],
)
def test_sampling_follows_tensorrt_llm(inputs: dict[str, Any], greedy: bool, top_k: int, top_p: float) -> None:
    params = _parsed(**inputs).sampling_params
    assert (params.greedy, params.top_k, params.top_p) == (greedy, top_k, top_p)


def test_each_prompt_has_its_own_row() -> None:
    inputs = tensors(["a", "b"], max_tokens=4)
    inputs["max_tokens"] = np.array([[4], [9]], np.int32)
    inputs["stop_words"] = np.array([["x", ""], ["", ""]], dtype=object)
    inputs["adaptive_k_policy"] = np.array([["fast"], [""]], dtype=object)
    first, second = parse_request(inputs)
    assert (first.prompt, first.batch_index, first.sampling_params.max_tokens) == ("a", 0, 4)
    assert (second.prompt, second.batch_index, second.sampling_params.max_tokens) == ("b", 1, 9)
    assert (first.sampling_params.stop, second.sampling_params.stop) == (["x"], None)
    assert (first.sampling_params.adaptive_k_policy, second.sampling_params.adaptive_k_policy) == ("fast", None)


def test_the_older_names_of_inputs_mean_the_same() -> None:
    params = _parsed(random_seed=np.array([[7]], np.uint64), min_length=3).sampling_params
    assert (params.seed, params.min_tokens) == (7, 3)


def test_a_conversation_takes_the_place_of_the_text() -> None:
    messages = [{"role": "user", "content": "Grüße"}]
    (request,) = parse_request(tensors([""], max_tokens=4, messages=json.dumps(messages)))
    assert request.prompt == messages
    assert not request.repeat_prompt
    assert _parsed(messages="").prompt == "hello"  # an empty string is how clients say that they have none
    for text, sentence in (
        ("{", "messages is not JSON"),
        ("[" * 100_000, "messages is not JSON"),
        ('"user"', "a conversation is a list of messages"),
        ("[]", "a conversation is a list of messages"),
        ('[{"content": "who?"}]', "a conversation is a list of messages"),
    ):
        with pytest.raises(RequestError, match=sentence):
            parse_request(tensors([""], max_tokens=4, messages=text))
    with pytest.raises(RequestError, match="text_input and messages were both given"):
        _parsed(messages=json.dumps(messages))


def test_what_else_a_chat_template_is_given() -> None:
    messages = json.dumps([{"role": "user", "content": "who?"}])
    (request,) = parse_request(tensors([""], max_tokens=4, messages=messages, chat_template_kwargs='{"tools": [1]}'))
    assert request.chat_template_kwargs == {"tools": [1]}
    (request,) = parse_request(tensors([""], max_tokens=4, messages=messages, chat_template_kwargs=""))
    assert request.chat_template_kwargs is None
    with pytest.raises(RequestError, match="chat_template_kwargs is not JSON"):
        parse_request(tensors([""], max_tokens=4, messages=messages, chat_template_kwargs="{tools}"))
    with pytest.raises(RequestError, match="chat_template_kwargs is for a conversation: give messages"):
        _parsed(chat_template_kwargs="{}")


@pytest.mark.parametrize(
    "inputs",
    [
        {"decoder_text_input": ""},
        {"embedding_bias_words": [""], "embedding_bias_weights": np.zeros((1, 0), np.float32)},
        {"num_draft_tokens": np.array([[0]], np.int32), "use_draft_logits": False},
        {"prompt_vocab_size": np.array([[0]], np.int32)},
        {"beam_width": 1, "length_penalty": 1.0},
        {"length_penalty": 0.0},
    ],
)
def test_options_that_are_off_may_be_sent(inputs: dict[str, Any]) -> None:
    _parsed(**inputs)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_every_unsupported_input_is_refused_by_name(name: str) -> None:
    shape = [1, *(size if size > 0 else 1 for size in UNSUPPORTED[name].dims)]
    value = np.full(shape, "x", object) if UNSUPPORTED[name].data_type == "STRING" else np.ones(shape, np.float32)
    with pytest.raises(RequestError, match=f"'{name}' is not supported"):
        _parsed(**{name: value})


def test_unknown_parameters_are_refused_and_tritons_own_are_not() -> None:
    inputs = tensors(["hello"], max_tokens=8)
    parse_request(inputs, {"triton_enable_empty_final_response": True})
    with pytest.raises(RequestError, match="'temprature' is not an input"):
        parse_request(inputs, {"temprature": 1.0})


def _tokens(**inputs: Any) -> dict[str, np.ndarray]:
    numbers = {"input_lengths": [[3]], "request_output_len": [[8]]}
    made = {name: np.array(value, np.int32) for name, value in numbers.items()}
    return {"input_ids": np.array([[5, 6, 7, 0]], np.int32), **made, **inputs}


def test_token_ids_take_and_give_token_ids() -> None:
    (request,) = parse_request(_tokens())
    assert (request.prompt, request.returns_token_ids, request.repeat_prompt) == ([5, 6, 7], True, True)
    assert (request.sampling_params.max_tokens, request.sampling_params.greedy) == (8, True)
    (request,) = parse_request(
        _tokens(
            streaming=np.array([[True]]),
            runtime_top_k=np.array([[4]], np.int32),
            runtime_top_p=np.array([[0.5]], np.float32),
            seed=np.array([[9]], np.uint64),
            random_seed=np.array([[8]], np.uint64),
        ),
        {"Streaming": True},
    )
    params = request.sampling_params
    assert (params.top_k, params.top_p, params.seed) == (4, 0.5, 9)  # the present name goes before the older one
    assert request.streaming and not request.repeat_prompt
    for length in (0, 5, -1):
        with pytest.raises(RequestError, match=f"input_lengths is {length}: it must be between 1 and 4"):
            parse_request(_tokens(input_lengths=np.array([[length]], np.int32)))


@pytest.mark.parametrize(
    ("word_list", "words"),
    [
        ([[7, 8, 9, 0], [2, 3, -1, -1]], [[7, 8], [9]]),
        ([[7, 8], [2, -1]], [[7, 8]]),
        ([[0], [-1]], None),
        ([[], []], None),
        ([[7, 8, 0], [0, 2, 2]], [[7, 8]]),
    ],
)
def test_words_of_token_ids_are_read_in_tensorrt_llms_format(word_list: Any, words: Any) -> None:
    for name, attribute in (("stop_words_list", "stop"), ("bad_words_list", "bad")):
        (request,) = parse_request(_tokens(**{name: np.array([word_list], np.int32)}))
        assert getattr(request.sampling_params, attribute) == words


@pytest.mark.parametrize("ends", [[3, 2], [1, 9], [-5, 1]])
def test_words_of_token_ids_that_end_nowhere_are_refused(ends: list[int]) -> None:
    word_list = np.array([[[7, 8], ends]], np.int32)
    with pytest.raises(RequestError, match=r"stop_words_list has the word ends .*: they must rise, up to 2 at most"):
        parse_request(_tokens(stop_words_list=word_list))


def test_biases_are_by_word_or_by_token_id() -> None:
    bias = _parsed(
        embedding_bias_words=["a", "", "b", "a"], embedding_bias_weights=[1.0, 9.0, -2.0, 0.5]
    ).sampling_params.logit_bias
    assert bias == {"a": 1.5, "b": -2.0}
    dense = np.array([[0, 2.5, 0, -1]], np.float32)
    (request,) = parse_request(_tokens(embedding_bias=dense))
    assert request.sampling_params.logit_bias == {1: 2.5, 3: -1.0}
    (request,) = parse_request(_tokens(embedding_bias=np.zeros((1, 0), np.float32)))
    assert request.sampling_params.logit_bias is None
    for inputs in (
        {"embedding_bias_words": ["a"]},
        {"embedding_bias_words": ["a"], "embedding_bias_weights": [1.0, 2.0]},
    ):
        with pytest.raises(RequestError, match="embedding_bias_words has 1 words and embedding_bias_weights"):
            _parsed(**inputs)
    with pytest.raises(RequestError, match="logit_bias is"):
        _parsed(embedding_bias_words=["a"], embedding_bias_weights=[float("nan")])


def test_stop_is_a_request_of_its_own() -> None:
    assert asks_to_stop(tensors(["-"], stop=True))
    assert not asks_to_stop(tensors(["-"], stop=False))
    assert not asks_to_stop(tensors(["-"]))


def test_a_stream_is_pieces_and_a_whole_answer_is_one() -> None:
    stream = ResponseBuilder(_parsed(stream=True, return_adaptive_k=True, return_num_output_tokens=True))
    (first,) = stream.build(_output(1, text="a", text_diff="a"))
    assert not stream.build(_output(1, text="a", text_diff=""))  # nothing new
    (held,) = stream.build(_output(2, text="a", text_diff=""))  # a token whose text is held back
    (last,) = stream.build(_output(4, text="abc", text_diff="bc", finish="length"))
    pieces = [first, held, last]
    assert [piece["text_output"].item() for piece in pieces] == [b"a", b"", b"bc"]
    assert [piece["num_output_tokens"].item() for piece in pieces] == [1, 1, 2]
    joined = np.concatenate([piece["adaptive_k_k"] for piece in pieces], axis=1)
    np.testing.assert_array_equal(joined, np.arange(8).reshape(1, 4, 2))

    whole = ResponseBuilder(_parsed())
    assert whole.build(_output(1, text="a", text_diff="a")) == []
    (answer,) = whole.build(_output(4, text="abc", text_diff="bc", finish="length"))
    assert answer["text_output"].item() == b"helloabc"
    assert "adaptive_k_k" not in answer
    final = _output(4, text="abc", text_diff="", finish="length")
    for tensors_of_it in (last, answer):
        assert tensors_of_it["adaptive_k_avg_k"].item() == pytest.approx(final.avg_k)
        assert tensors_of_it["adaptive_k_compute_saved_ratio"].item() == pytest.approx(final.compute_saved_ratio)


def test_reads_and_followed_policies_are_told_where_they_are_known() -> None:
    output = _output(4, text="abc", text_diff="", finish="length")
    output.followed = {output.policy: 4}
    (answer,) = ResponseBuilder(_parsed()).build(output)
    assert not {"adaptive_k_avg_reads", "adaptive_k_reads_per_token", "adaptive_k_followed"} & set(answer)
    output.expert_reads = ExpertReads()
    output.expert_reads.add(6.0, 1, 4)
    output.followed = {"full": 1, "fast": 3}
    (answer,) = ResponseBuilder(_parsed()).build(output)
    assert answer["adaptive_k_avg_reads"].item() == 6.0
    assert answer["adaptive_k_reads_per_token"].item() == 1.5
    assert json.loads(answer["adaptive_k_followed"].item()) == {"full": 1, "fast": 3}
    assert {name for name in answer if name.startswith("adaptive_k")} <= {
        tensor.name for tensor in contract.outputs_of(contract.ENSEMBLE)
    }


def test_an_answer_that_ends_before_its_first_token_is_still_an_answer() -> None:
    builder = ResponseBuilder(_parsed(stream=True, return_adaptive_k=True))
    (only,) = builder.build(_output(0, text="", text_diff="", finish="cancelled"))
    assert only["text_output"].item() == b""
    assert only["adaptive_k_k"].shape == (1, 0, 2)


def test_a_policy_change_is_seen_until_it_is_accepted(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("1")
    watch = PolicyWatch(tmp_path)
    assert not watch.changed()
    time.sleep(0.01)
    config.write_text("2")
    assert watch.changed()
    assert watch.first_refusal()
    assert watch.changed()
    assert not watch.first_refusal()
    watch.accept()
    assert not watch.changed()
    config.unlink()
    assert not watch.changed()
