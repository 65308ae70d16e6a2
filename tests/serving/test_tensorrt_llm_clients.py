# SPDX-License-Identifier: Apache-2.0
"""Each option of TensorRT-LLM's own Triton clients against a real server, with answers read as those clients do."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tensorrt_llm_clients import (
    PERF_METRICS,
    ask,
    read_perf_metrics,
    read_texts,
    read_token_ids,
    send,
    stop_request,
    text_request,
    token_request,
    wire,
)
from triton_calls import metric
from tritonclient.utils import InferenceServerException

from adaptive_k_moe.model_repository import TritonServer
from adaptive_k_moe.runtime import LLM, RequestOutput, SamplingParams

from waiting import eventually

PROMPT = "import os"
TOKENS = 12
MODELS = ["ensemble", "tensorrt_llm_bls"]


@pytest.fixture(scope="module")
def llm(served_engine_dir: Path) -> Iterator[LLM]:
    """The engine that is served, in this process: what the answers have to be."""
    with LLM(served_engine_dir, num_threads=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain(llm: LLM) -> RequestOutput:
    """The greedy answer."""
    return llm.generate(PROMPT, SamplingParams(max_tokens=TOKENS))


@pytest.fixture(scope="module")
def input_ids(plain: RequestOutput) -> list[int]:
    return plain.prompt_token_ids


# end_to_end_grpc_client.py, option by option: the input it becomes, and the same thing said to the runtime.
CHANGING = {
    "--output-len": ({"max_tokens": 5}, {"max_tokens": 5}),
    "--repetition-penalty": ({"repetition_penalty": 5.0}, {"repetition_penalty": 5.0}),
    "--presence-penalty": ({"presence_penalty": 9.0}, {"presence_penalty": 9.0}),
    "--frequency-penalty": ({"frequency_penalty": 9.0}, {"frequency_penalty": 9.0}),
    "--stop-words": ({"stop_words": ["no such", "te"]}, {"stop": ["te"]}),
    "--bad-words": ({"bad_words": ["te"]}, {"bad": ["te"]}),
    "--embedding-bias-*": (
        {"embedding_bias_words": ["path", "class"], "embedding_bias_weights": [9.0, -5.0]},
        {"logit_bias": {"path": 9.0, "class": -5.0}},
    ),
}
NEUTRAL = {
    "no option": {},
    "--temperature": {"temperature": 0.3},
    "--pad-id": {"pad_id": 5},
    "--return-log-probs": {"return_log_probs": True},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("option", [*CHANGING, *NEUTRAL])
def test_options_of_the_text_client(
    server: TritonServer, llm: LLM, plain: RequestOutput, model: str, stream: bool, option: str
) -> None:
    inputs, params = CHANGING.get(option) or (NEUTRAL[option], {})
    expected = llm.generate(PROMPT, SamplingParams(**{"max_tokens": TOKENS, **params})).outputs[0].text
    assert (expected != plain.outputs[0].text) == (option in CHANGING)
    request = {**text_request(PROMPT, TOKENS, stream=stream), **inputs}
    answers = ask(server.grpc_url, model, request, ["text_output"], request_id="17")
    assert read_texts(answers, stream=stream) == [[expected if stream else PROMPT + expected]]


@pytest.mark.parametrize("model", MODELS)
def test_the_text_clients_end_id_ends_an_answer(
    server: TritonServer, llm: LLM, plain: RequestOutput, model: str
) -> None:
    end_id = plain.outputs[0].token_ids[4]
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=TOKENS, end_id=end_id)).outputs[0]
    assert len(expected.token_ids) < TOKENS
    answers = ask(server.grpc_url, model, text_request(PROMPT, TOKENS, stream=False, end_id=end_id), ["text_output"])
    assert read_texts(answers, stream=False) == [[PROMPT + expected.text]]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_sequences_of_the_text_client(
    server: TritonServer, llm: LLM, model: str, stream: bool
) -> None:
    prompts = [PROMPT, "class A"]
    alone = [output.outputs[0].text for output in llm.generate(prompts, SamplingParams(max_tokens=TOKENS))]
    one = text_request("", TOKENS, stream=stream, exclude_input_in_output=True)
    batch = {name: np.array([[value]] * 2, object if name == "text_input" else None) for name, value in one.items()}
    batch["text_input"] = np.array([[prompt] for prompt in prompts], dtype=object)
    batch["max_tokens"] = batch["max_tokens"].astype(np.int32)
    batch["beam_width"] = batch["beam_width"].astype(np.int32)
    batch["temperature"] = batch["temperature"].astype(np.float32)
    answers = ask(server.grpc_url, model, batch, ["text_output", "batch_index"])
    assert read_texts(answers, stream=stream, prompts=2) == [[text] for text in alone]
    several = {**one, "text_input": PROMPT, "num_return_sequences": 3}
    answers = ask(server.grpc_url, model, several, ["text_output", "sequence_index"])
    assert read_texts(answers, stream=stream, sequences=3) == [[alone[0]] * 3]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_text_client_has_returned(server: TritonServer, llm: LLM, model: str, stream: bool) -> None:
    asked = SamplingParams(max_tokens=TOKENS, logprobs=0, return_context_logits=True, return_generation_logits=True)
    whole = llm.generate(PROMPT, asked)
    completion = whole.outputs[0]
    returns = ["return_log_probs", "return_context_logits", "return_generation_logits"]
    outputs = ["text_output", "cum_log_probs", "output_log_probs", "context_logits", "generation_logits"]
    request = text_request(PROMPT, TOKENS, stream=stream, **dict.fromkeys(returns, True))
    answers = ask(server.grpc_url, model, request, outputs)
    log_probs = [answer.as_numpy("output_log_probs") for answer in answers]
    generation = [answer.as_numpy("generation_logits") for answer in answers]
    context = [logits for answer in answers if (logits := answer.as_numpy("context_logits")) is not None]
    close: Any = {"atol": 1e-3}
    assert completion.logprobs is not None and completion.cumulative_logprob is not None
    chosen = [of[token] for token, of in zip(completion.token_ids, completion.logprobs, strict=True)]
    np.testing.assert_allclose(np.concatenate(log_probs, axis=2)[0, 0], chosen, **close)
    np.testing.assert_allclose(np.concatenate(generation, axis=2)[0, 0], completion.generation_logits, **close)
    np.testing.assert_allclose(context[0][0], whole.context_logits, **close)
    assert answers[-1].as_numpy("cum_log_probs")[0][0] == pytest.approx(completion.cumulative_logprob, abs=1e-3)


@pytest.mark.parametrize("model", [*MODELS, "tensorrt_llm"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["return_perf_metrics", "return_kv_cache_reuse_stats"])
def test_performance_metrics_are_returned_what_there_is_and_else_0(
    server: TritonServer, input_ids: list[int], model: str, stream: bool, name: str
) -> None:
    blocks = metric(server.metrics_url, "adaptive_k_kv_blocks")
    block_size = 512 * 16 / blocks  # max_seq_len and max_batch_size of the engine
    tokens = int(2 * block_size)
    if model == "tensorrt_llm":
        request, first = token_request(input_ids, tokens, stream=stream, **{name: True}), "output_ids"
    else:
        request, first = text_request(PROMPT, tokens, stream=stream, end_id=-1, **{name: True}), "text_output"
    answers = ask(server.grpc_url, model, request, [first, *PERF_METRICS])
    found = read_perf_metrics(answers)
    assert found["kv_cache_alloc_new_blocks"] == found["kv_cache_alloc_total_blocks"] == 3
    times = [found[f"{what}_time_ns"] for what in ("arrival", "first_scheduled", "first_token", "last_token")]
    assert times[0] > 0 and times == sorted(times)
    for absent in ("kv_cache_reused_blocks", "acceptance_rate", "total_accepted_draft_tokens", "total_draft_tokens"):
        assert found[absent] == 0
    dtypes = {name: answers[-1].as_numpy(name).dtype for name in found}
    assert dtypes["arrival_time_ns"] == np.int64 and dtypes["acceptance_rate"] == np.float32
    assert dtypes["kv_cache_reused_blocks"] == dtypes["total_draft_tokens"] == np.int32


LORA = {
    "lora_task_id": np.array([[7]], np.uint64),
    "lora_weights": np.ones((1, 2, 8), np.float16),
    "lora_config": np.ones((1, 2, 3), np.int32),
}
REFUSED_OF_TEXT = {
    "--beam-width": ({"beam_width": 2}, "beam_width is 2: beam search is not supported"),
    "--lora-task-id": ({"lora_task_id": LORA["lora_task_id"]}, "'lora_task_id' is not supported"),
    "--lora-path": (LORA, "the input 'lora_"),
    "--guided-decoding-guide-type": ({"guided_decoding_guide_type": "json"}, "'guided_decoding_guide_type' is not"),
    "--guided-decoding-guide": ({"guided_decoding_guide": "{}"}, "'guided_decoding_guide' is not supported"),
    "bias without its weights": (
        {"embedding_bias_words": ["a", "b"], "embedding_bias_weights": [1.0]},
        "embedding_bias_words has 2 words and embedding_bias_weights 1 numbers",
    ),
}
REFUSED_OF_TOKENS = {
    "--beam-width": ({"beam_width": 2}, "beam_width is 2: beam search is not supported"),
    "--draft-tokens-csv": ({"draft_input_ids": [1, 2]}, "'draft_input_ids' is not supported"),
    "--prompt-embedding-table-path": (
        {"prompt_embedding_table": np.ones((1, 2, 4), np.float16), "prompt_vocab_size": 2},
        "'prompt_embedding_table' is not supported",
    ),
    "--prompt_table_extra_id": ({"prompt_table_extra_ids": np.ones((1, 5), np.uint64)}, "'prompt_table_extra_ids' is"),
    "--lora-task-id": ({"lora_task_id": LORA["lora_task_id"]}, "'lora_task_id' is not supported"),
    "--lora-path": (LORA, "the input 'lora_"),
    "--lookahead_config": (
        {"lookahead_window_size": 7, "lookahead_ngram_size": 7, "lookahead_verification_set_size": 7},
        "the input 'lookahead_",
    ),
    "ids beyond the vocabulary": ({"input_ids": [5, 6, 7, 10**6]}, "the prompt has token id 1000000"),
    "more ids than there are": ({"input_lengths": 9}, "input_lengths is 9: it must be between 1 and 4"),
    "no ids": ({"input_lengths": 0}, "input_lengths is 0: it must be between 1 and 4"),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("option", REFUSED_OF_TEXT)
def test_a_refused_option_of_the_text_client_is_one_sentence(server: TritonServer, model: str, option: str) -> None:
    inputs, sentence = REFUSED_OF_TEXT[option]
    _expect_refusal(server, model, {**text_request(PROMPT, TOKENS, stream=False), **inputs}, sentence)


@pytest.mark.parametrize("option", REFUSED_OF_TOKENS)
def test_a_refused_option_of_the_token_client_is_one_sentence(server: TritonServer, option: str) -> None:
    inputs, sentence = REFUSED_OF_TOKENS[option]
    _expect_refusal(server, "tensorrt_llm", {**token_request([5, 6, 7, 8], TOKENS, stream=True), **inputs}, sentence)


def _expect_refusal(server: TritonServer, model: str, request: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InferenceServerException) as refused:
        ask(server.grpc_url, model, request)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value) and "Traceback" not in str(refused.value)


def test_calls_that_this_server_has_no_model_for_are_one_sentence(server: TritonServer) -> None:
    """`inflight_batcher_llm_client.py` without `-S` and `-n`, and `e2e_grpc_speculative_decoding_client.py`."""
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        for model, sentence in (
            ("tensorrt_llm", "ModelInfer RPC doesn't support models with decoupled transaction policy"),
            ("preprocessing", "'preprocessing' is not found"),
        ):
            with pytest.raises(InferenceServerException) as refused:
                client.infer(model, wire(token_request([5, 6, 7], TOKENS, stream=False)))
            assert sentence in str(refused.value) and "\n" not in str(refused.value)


# inflight_batcher_llm_client.py, option by option.
TOKEN_OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no option": ({}, {}),
    "--request-output-len": ({"request_output_len": 5}, {"max_tokens": 5}),
    "--temperature": ({"temperature": 0.3}, {}),
    "--pad-id": ({"pad_id": 5}, {}),
    "--repetition-penalty": ({"repetition_penalty": 5.0}, {"repetition_penalty": 5.0}),
    "--presence-penalty": ({"presence_penalty": 9.0}, {"presence_penalty": 9.0}),
    "--frequency-penalty": ({"frequency_penalty": 9.0}, {"frequency_penalty": 9.0}),
    "--top-k": ({"runtime_top_k": 5, "seed": 3}, {"top_k": 5, "temperature": 1.0, "seed": 3}),
    "--top-p": ({"runtime_top_k": 0, "runtime_top_p": 0.9, "random_seed": 3}, {"top_p": 0.9, "seed": 3}),
    "stop_words_list": ({}, {}),
    "bad_words_list": ({}, {}),
    "embedding_bias": ({}, {}),
    "adaptive_k_policy": ({"adaptive_k_policy": "top1"}, {"adaptive_k_policy": "top1"}),
}


def _token_option(option: str, plain: RequestOutput, vocab_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs of an option and the same thing said to the runtime; some are about the answer that there would be."""
    inputs, params = TOKEN_OPTIONS[option]
    answer = plain.outputs[0].token_ids
    word_list = np.array([[[*answer[3:5], 99, 0], [2, 3, -1, -1]]], np.int32)
    words = [answer[3:5], [99]]
    if option == "stop_words_list":
        inputs, params = {option: word_list}, {"stop": words}
    elif option == "bad_words_list":
        inputs, params = {option: word_list}, {"bad": words}
    elif option == "embedding_bias":
        bias = np.zeros((1, vocab_size), np.float32)
        bias[0, [answer[2], 77]] = [-40.0, 6.0]
        inputs, params = {option: bias}, {"logit_bias": {answer[2]: -40.0, 77: 6.0}}
    for name in ("seed", "random_seed"):
        if name in inputs:
            inputs = {**inputs, name: np.array([[inputs[name]]], np.uint64)}
    if option == "--top-p":
        params = {**params, "temperature": 1.0, "top_p": float(np.float32(params["top_p"]))}
    return inputs, params


@pytest.mark.parametrize("exclude_input", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("option", TOKEN_OPTIONS)
def test_options_of_the_token_client(
    server: TritonServer,
    llm: LLM,
    plain: RequestOutput,
    input_ids: list[int],
    option: str,
    stream: bool,
    exclude_input: bool,
) -> None:
    inputs, params = _token_option(option, plain, llm.config.pretrained_config.vocab_size)
    expected = llm.generate(input_ids, SamplingParams(**{"max_tokens": TOKENS, "end_id": -1, **params}))
    answer = expected.outputs[0].token_ids
    if params and option != "adaptive_k_policy":
        assert answer != plain.outputs[0].token_ids
    request = {**token_request(input_ids, TOKENS, stream=stream), **inputs}
    if exclude_input:
        request["exclude_input_in_output"] = True
    answers = ask(server.grpc_url, "tensorrt_llm", request)
    found = read_token_ids(answers, stream=stream, input_ids=input_ids, exclude_input=exclude_input)
    assert found == [answer if exclude_input else [*input_ids, *answer]]
    assert len(answers) == (len(answer) if stream else 1)
    assert answers[0].as_numpy("output_ids").dtype == np.int32


@pytest.mark.parametrize("stream", [False, True])
def test_an_end_token_is_not_among_the_token_ids(
    server: TritonServer, plain: RequestOutput, input_ids: list[int], stream: bool
) -> None:
    answer = plain.outputs[0].token_ids
    end = answer.index(answer[4])
    request = {**token_request(input_ids, TOKENS, stream=stream), "end_id": answer[4]}
    answers = ask(server.grpc_url, "tensorrt_llm", request)
    assert read_token_ids(answers, stream=stream, input_ids=input_ids) == [[*input_ids, *answer[:end]]]
    if stream:
        assert answers[-1].as_numpy("output_ids").shape == (1, 1, 0)
        assert answers[-1].as_numpy("sequence_length")[0][0] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_token_client_has_returned(server: TritonServer, llm: LLM, input_ids: list[int], stream: bool) -> None:
    asked = SamplingParams(max_tokens=TOKENS, logprobs=0, return_context_logits=True, return_generation_logits=True)
    whole = llm.generate(input_ids, asked)
    completion = whole.outputs[0]
    names = ("log_probs", "context_logits", "generation_logits", "num_input_tokens", "num_output_tokens")
    request = token_request(input_ids, TOKENS, stream=stream, **{f"return_{name}": True for name in names})
    answers = ask(server.grpc_url, "tensorrt_llm", request)
    # That client keeps what the last response brought, so every one has everything.
    context = [answer.as_numpy("context_logits") for answer in answers][-1]
    log_probs = [answer.as_numpy("output_log_probs")[0] for answer in answers]
    generation = [answer.as_numpy("generation_logits")[0] for answer in answers]
    close: Any = {"atol": 1e-3}
    np.testing.assert_allclose(context[0], whole.context_logits, **close)
    np.testing.assert_allclose(np.concatenate(generation, axis=1)[0], completion.generation_logits, **close)
    assert completion.cumulative_logprob is not None
    assert np.concatenate(log_probs, axis=1).sum() == pytest.approx(completion.cumulative_logprob, abs=1e-3)
    assert answers[-1].as_numpy("cum_log_probs")[0] == pytest.approx(completion.cumulative_logprob, abs=1e-3)
    assert {answer.as_numpy("num_input_tokens")[0][0] for answer in answers} == {len(input_ids)}
    assert sum(answer.as_numpy("num_output_tokens")[0][0] for answer in answers) == TOKENS


def test_the_token_client_checks_that_it_gets_the_outputs_that_it_asks_for(
    server: TritonServer, input_ids: list[int]
) -> None:
    wanted = ["output_ids", "sequence_length", "cum_log_probs", "output_log_probs"]
    request = token_request(input_ids, TOKENS, stream=True, return_log_probs=True)
    for answer in ask(server.grpc_url, "tensorrt_llm", request, wanted):
        assert {output.name for output in answer.get_response().outputs} == set(wanted)


@pytest.mark.parametrize("stream", [False, True])
def test_several_sequences_of_the_token_client(
    server: TritonServer, llm: LLM, input_ids: list[int], stream: bool
) -> None:
    params = SamplingParams(max_tokens=TOKENS, end_id=-1, n=3, top_k=50, temperature=1.0, seed=5)
    expected = [[*input_ids, *sequence.token_ids] for sequence in llm.generate(input_ids, params).outputs]
    assert expected[0] != expected[1]
    sampled = {"num_return_sequences": 3, "runtime_top_k": 50, "seed": np.array([[5]], np.uint64)}
    answers = ask(server.grpc_url, "tensorrt_llm", {**token_request(input_ids, TOKENS, stream=stream), **sampled})
    assert read_token_ids(answers, stream=stream, input_ids=input_ids, sequences=3) == expected


def test_several_prompts_of_token_ids_are_cut_to_their_lengths(
    server: TritonServer, llm: LLM, input_ids: list[int]
) -> None:
    one = token_request(input_ids, TOKENS, stream=False, exclude_input_in_output=True)
    arrays = {name: np.array([[value]] * 2) for name, value in one.items() if name != "input_ids"}
    request = {
        name: array.astype({"i": np.int32, "f": np.float32, "b": np.bool_}[array.dtype.kind])
        for name, array in arrays.items()
    }
    request["input_ids"] = np.array([[*input_ids, 0, 0], [5, 17, *[0] * len(input_ids)]], np.int32)
    request["input_lengths"] = np.array([[len(input_ids)], [2]], np.int32)
    prompts = [input_ids, [5, 17]]
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, SamplingParams(max_tokens=TOKENS, end_id=-1))]
    found: list[Any] = [None, None]
    for answer in ask(server.grpc_url, "tensorrt_llm", request):
        found[answer.as_numpy("batch_index")[0][0]] = list(answer.as_numpy("output_ids")[0][0])
    assert found == expected


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_client_ends_its_request_by_its_id(server: TritonServer, input_ids: list[int], stream: bool) -> None:
    long = token_request(input_ids, 400, stream=stream, num_return_sequences=64)

    def stop(client: Any) -> None:
        assert eventually(lambda: metric(server.metrics_url, "adaptive_k_queue_depth", state="running") > 0)
        send(client, "tensorrt_llm", stop_request(), request_id="mine", parameters={"Streaming": stream})

    answers = ask(server.grpc_url, "tensorrt_llm", long, request_id="mine", meanwhile=stop)
    found = read_token_ids(answers, stream=stream, input_ids=input_ids, sequences=64)
    assert sum(len(ids) - len(input_ids) for ids in found) < 64 * 400
    assert eventually(lambda: metric(server.metrics_url, "adaptive_k_kv_blocks_used") == 0)


def test_the_token_client_ends_its_request_by_leaving(server: TritonServer, input_ids: list[int]) -> None:
    cancelled = metric(server.metrics_url, "adaptive_k_cancellations_total")
    long = token_request(input_ids, 400, stream=True, num_return_sequences=64)

    def wait(client: Any) -> None:
        assert eventually(lambda: metric(server.metrics_url, "adaptive_k_kv_blocks_used") > 0)

    with pytest.raises(InferenceServerException) as left:
        ask(server.grpc_url, "tensorrt_llm", long, meanwhile=wait, cancel=True)
    assert left.value.status() == "StatusCode.CANCELLED"
    assert eventually(lambda: metric(server.metrics_url, "adaptive_k_cancellations_total") > cancelled)
    assert eventually(lambda: metric(server.metrics_url, "adaptive_k_kv_blocks_used") == 0)


def test_sixteen_clients_of_token_ids_get_what_each_prompt_gets_alone(server: TritonServer, llm: LLM) -> None:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(5, 2000, size).tolist() for size in rng.integers(1, 40, 48)]
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, SamplingParams(max_tokens=TOKENS, end_id=-1))]

    def question(prompt: list[int]) -> list[int]:
        request = token_request(prompt, TOKENS, stream=True)
        answers = ask(server.grpc_url, "tensorrt_llm", request)
        return read_token_ids(answers, stream=True, input_ids=prompt, exclude_input=True)[0]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(question, prompts)) == expected


def test_token_ids_over_http_and_with_their_k(server: TritonServer, llm: LLM, input_ids: list[int]) -> None:
    params = SamplingParams(max_tokens=TOKENS, end_id=-1, adaptive_k_policy="balanced")
    expected = llm.generate(input_ids, params).outputs[0]
    body = {
        "input_ids": input_ids,
        "input_lengths": len(input_ids),
        "request_output_len": TOKENS,
        "end_id": -1,
        "adaptive_k_policy": "balanced",
        "exclude_input_in_output": True,
        "return_adaptive_k": True,
    }
    url = f"http://{server.http_url}/v2/models/tensorrt_llm/generate"
    with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=60) as answer:
        content = json.load(answer)
    assert (content["output_ids"], content["sequence_length"]) == (expected.token_ids, TOKENS)
    assert content["adaptive_k_k"] == expected.k.ravel().tolist()
