# SPDX-License-Identifier: Apache-2.0
"""A server whose models are not decoupled: unary calls, which a decoupled model cannot take."""

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
    read_perf_metrics,
    read_texts,
    read_token_ids,
    stop_request,
    text_request,
    token_request,
    wire,
)
from triton_calls import metric
from tritonclient.utils import InferenceServerException

from adaptive_k_moe.client import Client
from adaptive_k_moe.errors import ClientError
from adaptive_k_moe.model_repository import TritonServer
from adaptive_k_moe.runtime import LLM, SamplingParams

from waiting import eventually

TOKENS = 8
PROMPT = "import os"


@pytest.fixture(scope="module")
def unary(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log_file = tmp_path_factory.mktemp("log") / "triton.log"
    ports = dict(http_port=0, grpc_port=0, metrics_port=0)
    with TritonServer(engine_dir, **ports, log_file=log_file, num_threads=2, decoupled=False) as server:
        yield server


@pytest.fixture(scope="module")
def llm(engine_dir: Path) -> Iterator[LLM]:
    with LLM(engine_dir, num_threads=2) as llm:
        yield llm


def _infer(server: TritonServer, model: str, inputs: dict[str, Any], **options: Any) -> Any:
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        return client.infer(model, wire(inputs), **options)


def test_each_model_answers_unary_calls_and_many_at_once(unary: TritonServer, llm: LLM) -> None:
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=TOKENS, end_id=-1))
    text, input_ids = expected.outputs[0].text, expected.prompt_token_ids
    for model in ("ensemble", "tensorrt_llm_bls"):
        answer = _infer(unary, model, text_request(PROMPT, TOKENS, stream=False, end_id=-1))
        assert read_texts([answer], stream=False) == [[PROMPT + text]]
    prompts = [[*input_ids, token] for token in range(5, 37)]
    alone = llm.generate(prompts, SamplingParams(max_tokens=TOKENS, end_id=-1))

    def ask(prompt: list[int]) -> list[int]:
        answer = _infer(unary, "tensorrt_llm", token_request(prompt, TOKENS, stream=False))
        return read_token_ids([answer], stream=False, input_ids=prompt)[0][len(prompt) :]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, prompts)) == [output.outputs[0].token_ids for output in alone]
    steps = metric(unary.metrics_url, "adaptive_k_steps_total")
    assert steps < TOKENS * len(prompts)  # they shared steps


def test_the_token_clients_unary_call_with_all_that_it_can_have_returned(unary: TritonServer) -> None:
    names = ("log_probs", "context_logits", "generation_logits", "perf_metrics")
    request = token_request([5, 6, 7], TOKENS, stream=False, **{f"return_{name}": True for name in names})
    answer = _infer(unary, "tensorrt_llm", request, request_id="7", parameters={"Streaming": False})
    assert answer.as_numpy("output_log_probs")[0].shape == (1, TOKENS)
    assert answer.as_numpy("generation_logits")[0].shape[:2] == (1, TOKENS)
    assert answer.as_numpy("context_logits").shape[:2] == (1, 3)
    assert set(read_perf_metrics([answer])) == set(PERF_METRICS)
    wanted = ["output_ids", "sequence_length"]
    outputs = [grpcclient.InferRequestedOutput(name) for name in wanted]
    answer = _infer(unary, "tensorrt_llm", request, outputs=outputs)
    assert {output.name for output in answer.get_response().outputs} == set(wanted)


def test_infer_over_http(unary: TritonServer, llm: LLM) -> None:
    text = llm.generate(PROMPT, SamplingParams(max_tokens=TOKENS)).outputs[0].text
    inputs = [
        {"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": [PROMPT]},
        {"name": "max_tokens", "shape": [1, 1], "datatype": "INT32", "data": [TOKENS]},
    ]
    body = json.dumps({"inputs": inputs, "outputs": [{"name": "text_output"}]}).encode()
    with urllib.request.urlopen(f"http://{unary.http_url}/v2/models/ensemble/infer", body, timeout=60) as answer:
        (output,) = json.load(answer)["outputs"]
    assert (output["name"], output["shape"], output["data"]) == ("text_output", [1], [PROMPT + text])


def test_our_client_asks_for_whole_answers_and_is_refused_a_stream(unary: TritonServer, llm: LLM) -> None:
    with Client(unary.grpc_url, timeout=60) as client:
        expected = llm.generate(PROMPT, SamplingParams(max_tokens=TOKENS)).outputs[0].text
        assert client.generate(PROMPT, max_tokens=TOKENS).text == expected
        assert client.describe_engine().default_policy == "full"
        with pytest.raises(ClientError, match="this server gives a request one response: ask for one sequence"):
            list(client.generate(PROMPT, max_tokens=TOKENS, stream=True))


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
@pytest.mark.parametrize("more", [{"stream": True}, {"num_return_sequences": 2}, {"beam_width": 2}])
def test_what_one_response_cannot_answer_is_refused(unary: TritonServer, model: str, more: dict[str, Any]) -> None:
    sentence = "beam_width is 2" if "beam_width" in more else "this server gives a request one response"
    with pytest.raises(InferenceServerException, match=sentence):
        _infer(unary, model, {**text_request(PROMPT, TOKENS, stream=False), **more})
    batch = {"text_input": np.array([["a"], ["b"]], dtype=object), "max_tokens": np.full((2, 1), 4, np.int32)}
    with pytest.raises(InferenceServerException, match="this server gives a request one response"):
        _infer(unary, model, batch)


# As many as take several seconds: what is waited for is a metric, which is a second old at times.
MANY = 32


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls", "tensorrt_llm"])
def test_unary_calls_that_are_given_up_are_cancelled(unary: TritonServer, model: str) -> None:
    cancelled = metric(unary.metrics_url, "adaptive_k_cancellations_total")
    long = token_request([5, 6], 500, stream=False)
    if model != "tensorrt_llm":
        long = text_request(PROMPT, 500, stream=False, end_id=-1)
    with grpcclient.InferenceServerClient(unary.grpc_url) as client:
        calls = [client.async_infer(model, wire(long), callback=lambda result, error: None) for _ in range(MANY)]
        assert eventually(lambda: metric(unary.metrics_url, "adaptive_k_kv_blocks_used") > 0)
        for call in calls:
            call.cancel()
        assert eventually(lambda: metric(unary.metrics_url, "adaptive_k_cancellations_total") > cancelled)
        assert eventually(lambda: metric(unary.metrics_url, "adaptive_k_queue_depth") == 0)
    assert eventually(lambda: metric(unary.metrics_url, "adaptive_k_kv_blocks_used") == 0)


def test_unary_calls_are_ended_by_their_id(unary: TritonServer) -> None:
    long = token_request([5, 6], 500, stream=False)
    with ThreadPoolExecutor(MANY) as pool:
        running = [pool.submit(_infer, unary, "tensorrt_llm", long, request_id="mine") for _ in range(MANY)]
        assert eventually(lambda: metric(unary.metrics_url, "adaptive_k_kv_blocks_used") > 0)
        stopped = _infer(unary, "tensorrt_llm", stop_request(), request_id="mine")
        assert stopped.as_numpy("output_ids") is None  # what that client calls a cancellation response
        answers = [call.result(60) for call in running]
    found = [read_token_ids([answer], stream=False, input_ids=[5, 6])[0] for answer in answers]
    assert all(len(token_ids) >= 2 for token_ids in found)
    assert sum(len(token_ids) - 2 for token_ids in found) < MANY * 500
