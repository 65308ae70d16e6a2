# SPDX-License-Identifier: Apache-2.0
"""A real Triton server: many clients at once, cancellation, refusals, TensorRT-LLM's calls, HTTP, metrics."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triton_calls import infer, metric, tensors, text_of
from tritonclient.utils import InferenceServerException

from adaptive_k_moe import cli
from adaptive_k_moe.client import AsyncClient, Chunk, Client
from adaptive_k_moe.engine_config import read_engine_config
from adaptive_k_moe.errors import ClientError
from adaptive_k_moe.model_repository import TritonServer
from adaptive_k_moe.runtime import LLM, SamplingParams

from waiting import eventually

MODELS = ["ensemble", "tensorrt_llm_bls"]
PROMPTS = [
    "import os",
    "def add(a, b):",
    "The router",
    "class",
    "x = [1, 2",
    "for key in",
    "return",
    "Once upon a time",
]
LONG = {"max_tokens": 400, "end_id": -1}


def _blocks_used(server: TritonServer) -> float:
    return metric(server.metrics_url, "adaptive_k_kv_blocks_used")


def _post(server: TritonServer, path: str, body: dict[str, Any]) -> tuple[int, str]:
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/{path}", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(("model", "count"), [("ensemble", 200), ("tensorrt_llm_bls", 64)])
def test_sixteen_streaming_clients_get_what_each_prompt_gets_alone(
    server: TritonServer, client: Client, model: str, count: int
) -> None:
    cases = [
        (prompt, policy, 4 + index) for index, prompt in enumerate(PROMPTS) for policy in ("full", "balanced", "top1")
    ]
    alone = {case: client.generate(case[0], adaptive_k_policy=case[1], max_tokens=case[2], end_id=-1) for case in cases}
    chosen = random.Random(7).choices(cases, k=count)

    def ask(case: tuple[str, str, int]) -> tuple[str, np.ndarray]:
        prompt, policy, max_tokens = case
        with Client(server.grpc_url, model_name=model, timeout=60) as own:
            pieces = list(own.generate(prompt, stream=True, adaptive_k_policy=policy, max_tokens=max_tokens, end_id=-1))
        return "".join(piece.text for piece in pieces), np.concatenate([piece.k for piece in pieces])

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, chosen))
    assert len(answers) == count
    for case, (text, k) in zip(chosen, answers, strict=True):
        assert text == alone[case].text, case
        np.testing.assert_array_equal(k, alone[case].k)


@pytest.mark.parametrize("model", MODELS)
def test_a_client_that_leaves_frees_its_blocks(server: TritonServer, model: str) -> None:
    # What other tests asked for may still be counted, but nobody else follows this policy.
    def ended() -> float:
        return metric(server.metrics_url, "adaptive_k_requests_total", policy="relative")

    before, cancelled = ended(), metric(server.metrics_url, "adaptive_k_cancellations_total")
    with Client(server.grpc_url, model_name=model) as leaving:
        streams = [leaving.generate(prompt, stream=True, adaptive_k_policy="relative", **LONG) for prompt in PROMPTS]
        for stream in streams:
            next(stream)
        del stream
        streams.pop().close()
        streams.clear()  # letting go is enough
        assert eventually(lambda: ended() == before + len(PROMPTS))
        assert eventually(lambda: _blocks_used(server) == 0)
        # Some may have come to their end before they were let go: the machine may be busy.
        assert metric(server.metrics_url, "adaptive_k_cancellations_total") > cancelled


@pytest.mark.parametrize("model", MODELS)
def test_an_http_client_that_leaves_frees_its_blocks(server: TritonServer, model: str) -> None:
    cancelled = metric(server.metrics_url, "adaptive_k_cancellations_total")
    body = json.dumps({"text_input": "import os", "stream": True, "num_return_sequences": 64, **LONG}).encode()
    answer = urllib.request.urlopen(f"http://{server.http_url}/v2/models/{model}/generate_stream", body, timeout=60)
    assert answer.readline()
    answer.close()
    assert eventually(lambda: metric(server.metrics_url, "adaptive_k_cancellations_total") > cancelled)
    assert eventually(lambda: _blocks_used(server) == 0)


def test_requests_that_still_wait_are_cancelled_too(server: TritonServer) -> None:
    with Client(server.grpc_url) as leaving:
        streams = [leaving.generate("import os", stream=True, **LONG) for _ in range(40)]
        assert eventually(lambda: metric(server.metrics_url, "adaptive_k_queue_depth", state="waiting") > 0)
        for stream in streams:
            stream.close()
    assert eventually(lambda: metric(server.metrics_url, "adaptive_k_queue_depth") == 0)
    assert _blocks_used(server) == 0


def test_a_whole_answer_given_up_by_its_deadline_is_cancelled(server: TritonServer, client: Client) -> None:
    from adaptive_k_moe.errors import ClientError

    with pytest.raises(ClientError, match=r"did not finish its answer within 0.05 s"):
        client.generate("import os", timeout=0.05, **LONG)
    assert eventually(lambda: metric(server.metrics_url, "adaptive_k_queue_depth") == 0)


@pytest.mark.parametrize("model", MODELS)
def test_a_server_says_what_it_serves(server: TritonServer, served_engine_dir: Path, model: str) -> None:
    config = read_engine_config(served_engine_dir)
    with Client(server.grpc_url, model_name=model) as client:
        described = client.describe_engine()
    assert described.policies == config.policy_tables().names
    assert described.default_policy == config.adaptive_k.default
    numbers = (described.num_moe_layers, described.num_experts, described.num_experts_per_tok)
    sizes = config.pretrained_config
    assert numbers == (sizes.num_moe_layers, sizes.num_experts, sizes.num_experts_per_tok)

    async def ask() -> Any:
        async with AsyncClient(server.grpc_url, model_name=model) as client:
            return await client.describe_engine()

    assert asyncio.run(ask()) == described


@pytest.mark.parametrize("model", MODELS)
def test_stop_ends_the_request_of_the_same_id(server: TritonServer, model: str) -> None:
    inputs = tensors(["import os"] * 48, stream=True, **LONG)
    stop = tensors(["-"], max_tokens=1, stop=True)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(infer, server.grpc_url, inputs, request_id="mine")
        assert eventually(lambda: _blocks_used(server) > 0)
        assert infer(server.grpc_url, stop, model=model, request_id="another") == []
        assert infer(server.grpc_url, stop, model=model, request_id="mine") == []
        assert 0 < len(running.result(60)) < 48 * 400


REFUSALS = {
    "beam search": (dict(beam_width=4), "beam_width is 4"),
    "length penalty": (dict(length_penalty=2.0), "length_penalty is 2"),
    "unknown policy": (dict(adaptive_k_policy="fastest"), "'fastest' is not one of this engine's policies"),
    "beyond max_input_len": (dict(text_input=np.array([["word and " * 240]], dtype=object)), "max_input_len is 450"),
    "beyond max_seq_len": (dict(text_input=np.array([["word and " * 2000]], dtype=object)), "max_seq_len"),
    "no tokens": (dict(max_tokens=0), "max_tokens is 0"),
    "temperature": (dict(temperature=-1.0, top_k=5), "temperature is -1.0"),
    "not a number": (dict(temperature=float("nan"), top_k=5), "temperature is nan"),
    "top_p": (dict(top_p=1.5), "top_p is 1.5"),
    "image": (dict(image_input=np.zeros((1, 1, 3, 2, 2), np.float16)), "'image_input' is not supported"),
    "lora": (dict(lora_task_id=np.array([[3]], np.uint64)), "'lora_task_id' is not supported"),
    "draft": (dict(num_draft_tokens=np.array([[3]], np.int32)), "'num_draft_tokens' is not supported"),
    "guide": (dict(guided_decoding_guide_type="json"), "'guided_decoding_guide_type' is not supported"),
    "unknown input": (dict(temprature=1.0), "temprature"),
    "dtype": (dict(top_k=np.array([[5]], np.int64)), "top_k"),
    "shape": (dict(top_k=np.array([[5, 6]], np.int32)), "top_k"),
    "batch": (dict(top_k=np.array([[5], [6]], np.int32)), "batch size"),
    "not UTF-8": (dict(text_input=np.array([[b"\xff\xfe"]], dtype=object)), "text_input is not UTF-8"),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_one_sentence_and_others_are_served(
    server: TritonServer, client: Client, case: str, model: str
) -> None:
    inputs, sentence = REFUSALS[case]
    with pytest.raises(InferenceServerException) as refused:
        infer(
            server.grpc_url, {**tensors(["import os"], max_tokens=4), **tensors(["import os"], **inputs)}, model=model
        )
    message = str(refused.value)
    assert sentence in message
    assert "\n" not in message.strip()
    assert "Traceback" not in message
    assert client.generate("import os", max_tokens=2, end_id=-1).num_output_tokens == 2


def test_a_refused_prompt_refuses_its_whole_request(server: TritonServer) -> None:
    inputs = tensors(["import os", "word and " * 2000], **LONG)
    with pytest.raises(InferenceServerException, match="max_seq_len"):
        infer(server.grpc_url, inputs)
    assert eventually(lambda: metric(server.metrics_url, "adaptive_k_queue_depth") == 0)


@pytest.mark.parametrize("model", MODELS)
def test_several_prompts_in_one_request(server: TritonServer, client: Client, model: str) -> None:
    common: dict[str, Any] = dict(max_tokens=6, end_id=-1, stop_words=[""], bad_words=["", ""], beam_width=1)
    for stream in (False, True):
        responses = infer(
            server.grpc_url,
            tensors(PROMPTS[:3], stream=stream, exclude_input_in_output=True, **common),
            model=model,
        )
        for index, prompt in enumerate(PROMPTS[:3]):
            assert text_of(responses, index) == client.generate(prompt, max_tokens=6, end_id=-1).text
        assert stream or len(responses) == 3


def test_text_output_repeats_the_prompt_unless_told_not_to(server: TritonServer, client: Client) -> None:
    answer = client.generate("import os", max_tokens=5, end_id=-1).text
    common: dict[str, Any] = dict(max_tokens=5, end_id=-1)
    (whole,) = infer(server.grpc_url, tensors(["import os"], **common))
    assert whole["text_output"].shape == (1,)
    assert whole["text_output"].item().decode() == "import os" + answer
    pieces = infer(server.grpc_url, tensors(["import os"], stream=True, **common))
    assert len(pieces) > 1
    assert text_of(pieces) == answer


def test_shapes_of_everything_that_can_be_returned(server: TritonServer) -> None:
    wanted = dict(
        max_tokens=5,
        end_id=-1,
        **dict.fromkeys(
            (
                "return_log_probs",
                "return_context_logits",
                "return_generation_logits",
                "return_perf_metrics",
                "return_num_input_tokens",
                "return_num_output_tokens",
                "return_adaptive_k",
            ),
            True,
        ),
    )
    (whole,) = infer(server.grpc_url, tensors(["import os"], **wanted))
    n_in, n = whole["num_input_tokens"].item(), whole["num_output_tokens"].item()
    assert n == 5
    layers = whole["adaptive_k_k"].shape[2]
    vocabulary = whole["context_logits"].shape[2]
    assert whole["context_logits"].shape == (1, n_in, vocabulary)
    assert whole["generation_logits"].shape == (1, 1, n, vocabulary)
    assert whole["output_log_probs"].shape == (1, 1, n)
    assert whole["cum_log_probs"].shape == (1, 1)
    assert whole["adaptive_k_entropy"].shape == (1, n, layers)
    assert whole["adaptive_k_avg_k"].shape == (1, 1)
    assert whole["cum_log_probs"].item() == pytest.approx(whole["output_log_probs"].sum(), rel=1e-4)
    times = [whole[f"{name}_time_ns"].item() for name in ("arrival", "first_scheduled", "first_token", "last_token")]
    assert times == sorted(times)
    assert times[0] > 0

    pieces = infer(server.grpc_url, tensors(["import os"], stream=True, **wanted))
    for name, axis in (("adaptive_k_k", 1), ("output_log_probs", 2), ("generation_logits", 2)):
        joined = np.concatenate([piece[name] for piece in pieces], axis=axis)
        np.testing.assert_allclose(joined, whole[name], atol=1e-4)
    assert sum("context_logits" in piece for piece in pieces) == 1
    assert sum(piece["num_output_tokens"].item() for piece in pieces) == n


@pytest.mark.parametrize("model", MODELS)
def test_a_conversation_is_answered_by_the_chat_template(
    server: TritonServer, served_engine_dir: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "import “os”"}]
    with LLM(served_engine_dir) as llm:
        expected = llm.chat(messages, SamplingParams(max_tokens=6))
        thoughtful = llm.chat(messages, SamplingParams(max_tokens=6), chat_template_kwargs={"enable_thinking": True})
    assert thoughtful.outputs[0].text != expected.outputs[0].text
    text, length = expected.outputs[0].text, len(expected.prompt_token_ids)
    with Client(server.grpc_url, model_name=model) as client:
        answer = client.generate(messages, max_tokens=6)
        assert (answer.text, answer.num_input_tokens) == (text, length)
        pieces = list(client.generate(messages, max_tokens=6, stream=True))
        assert "".join(piece.text for piece in pieces) == text
        with pytest.raises(ClientError, match="a conversation is a list of messages"):
            client.generate([{"content": "who?"}])
        answer = client.generate(messages, max_tokens=6, chat_template_kwargs={"enable_thinking": True})
        assert (answer.text, answer.num_input_tokens) == (
            thoughtful.outputs[0].text,
            len(thoughtful.prompt_token_ids),
        )
        with pytest.raises(ClientError, match="refused the request: chat_template_kwargs cannot hold 'messages'"):
            client.generate(messages, chat_template_kwargs={"messages": []})
    body = {"text_input": "", "messages": json.dumps(messages), "max_tokens": 6}
    status, content = _post(server, f"{model}/generate", body)
    assert (status, json.loads(content)["text_output"]) == (200, text)
    command = [
        "client",
        "--url",
        server.grpc_url,
        "--model_name",
        model,
        "--prompt",
        "import “os”",
        "--max_tokens",
        "6",
    ]
    chat = [*command, "--apply_chat_template", "--system_prompt", "Be brief."]
    assert cli.main(chat) == 0
    assert capsys.readouterr().out == text + "\n"
    assert cli.main([*chat, "--chat_template_kwargs", '{"enable_thinking": true}']) == 0
    assert capsys.readouterr().out == thoughtful.outputs[0].text + "\n"
    assert cli.main([*command, "--system_prompt", "Be brief."]) == 1


def test_several_sequences_of_one_prompt(server: TritonServer) -> None:
    inputs = tensors(["import os"], max_tokens=8, end_id=-1, num_return_sequences=3, top_p=1.0, seed=5)
    responses = infer(server.grpc_url, inputs)
    assert sorted(response["sequence_index"].item() for response in responses) == [0, 1, 2]
    assert len({text_of(responses, 0, index) for index in range(3)}) > 1
    again = infer(server.grpc_url, inputs)
    assert [text_of(again, 0, index) for index in range(3)] == [text_of(responses, 0, index) for index in range(3)]


def test_temperature_alone_is_greedy_as_in_tensorrt_llm(server: TritonServer) -> None:
    greedy = infer(server.grpc_url, tensors(["import os"], max_tokens=8, end_id=-1))
    warm = infer(server.grpc_url, tensors(["import os"], max_tokens=8, end_id=-1, temperature=5.0))
    assert text_of(warm) == text_of(greedy)
    seeded = [
        text_of(infer(server.grpc_url, tensors(["import os"], max_tokens=8, end_id=-1, top_k=50, **{name: 3})))
        for name in ("seed", "random_seed")
    ]
    assert seeded[0] == seeded[1]


@pytest.mark.parametrize("model", MODELS)
def test_our_client_may_say_what_the_runtime_may_be_told(
    server: TritonServer, served_engine_dir: Path, model: str
) -> None:
    asked: list[dict[str, Any]] = [
        {"logit_bias": {"path": 9.0, "class": -5.0}},
        {"bad": ["te", "."], "frequency_penalty": 3.0},
        {"stop": ["te", "no such"], "min_tokens": 1},
        {"temperature": 1.0, "min_p": 0.125, "seed": 5},
    ]
    with Client(server.grpc_url, model_name=model) as client:
        answers = [client.generate("import os", max_tokens=8, end_id=-1, **options).text for options in asked]
    with LLM(served_engine_dir, num_threads=2) as llm:
        params = [SamplingParams(max_tokens=8, end_id=-1, **options) for options in asked]
        assert answers == [output.outputs[0].text for output in llm.generate(["import os"] * len(asked), params)]
    assert len(set(answers)) == len(asked)


@pytest.mark.parametrize("model", MODELS)
def test_http_generate_and_generate_stream(server: TritonServer, client: Client, model: str) -> None:
    expected = client.generate("import os", max_tokens=5, end_id=-1, adaptive_k_policy="top1")
    body = {"text_input": "import os", "max_tokens": 5, "end_id": -1, "adaptive_k_policy": "top1"}
    status, text = _post(server, f"{model}/generate", {**body, "exclude_input_in_output": True})
    assert status == 200
    answer = json.loads(text)
    assert answer["text_output"] == expected.text
    assert answer["adaptive_k_avg_k"] == 1.0
    assert answer["adaptive_k_compute_saved_ratio"] == pytest.approx(expected.compute_saved_ratio)
    # Parameters may be nested, as Triton's documentation of the endpoint shows.
    body["parameters"] = {"stream": True, "return_adaptive_k": True}
    status, text = _post(server, f"{model}/generate_stream", body)
    assert status == 200
    pieces = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.strip()]
    assert "".join(piece["text_output"] for piece in pieces) == expected.text
    assert [k for piece in pieces for k in np.ravel(piece["adaptive_k_k"])] == expected.k.ravel().tolist()


@pytest.mark.parametrize("model", MODELS)
def test_http_refusals_are_bad_requests(server: TritonServer, model: str) -> None:
    body = {"text_input": "import os", "max_tokens": 5}
    status, text = _post(server, f"{model}/generate", {**body, "temprature": 0.5})
    assert (status, "temprature" in text) == (400, True)
    status, text = _post(server, f"{model}/generate", {**body, "beam_width": 3})
    assert (status, "beam_width is 3" in text) == (400, True)


def test_a_running_server_takes_over_changed_policies(
    server: TritonServer, client: Client, served_engine_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def policy(*words: str) -> None:
        action, *rest = words
        assert cli.main(["policy", action, "--engine_dir", str(served_engine_dir), *rest]) == 0

    policy("set", "--name", "fresh", "--kind", "fixed", "--k", "1")
    assert client.generate("import os", max_tokens=3, adaptive_k_policy="fresh").avg_k == 1.0
    policy("set", "--name", "fresh", "--kind", "entropy", "--thresholds", "0.0", "--k", "1", "2")
    assert client.generate("import os", max_tokens=3, adaptive_k_policy="fresh").avg_k == 2.0
    config = served_engine_dir / "config.json"
    good = config.read_text()
    config.write_text("{")  # the server goes on with what it has
    assert client.generate("import os", max_tokens=3, adaptive_k_policy="fresh").avg_k == 2.0
    config.write_text(good)
    policy("remove", "--name", "fresh")
    with pytest.raises(Exception, match="'fresh' is not one of this engine's policies"):
        client.generate("import os", max_tokens=3, adaptive_k_policy="fresh")


def test_a_policy_by_load_is_followed_and_told(
    server: TritonServer, client: Client, served_engine_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def policy(*words: str) -> str:
        capsys.readouterr()
        assert cli.main(["policy", words[0], "--engine_dir", str(served_engine_dir), *words[1:]]) == 0
        return capsys.readouterr().out

    before = policy("show")
    content = json.loads(before)
    # Any time between two tokens is too long, and a queue of one, too.
    steps = [{"policy": "full"}, {"policy": "top1", "queue": 1, "time_between_tokens": 1e-9}]
    content["policies"]["auto"] = {"kind": "by_load", "steps": steps, "leave_seconds": 0.5}
    content["default"] = "auto"
    (tmp_path / "by_load.json").write_text(json.dumps(content))
    policy("set", "--file", str(tmp_path / "by_load.json"))
    try:
        assert json.loads(policy("show"))["policies"]["auto"]["steps"] == steps
        assert client.describe_engine().default_policy == "auto"
        # The tokens of whoever was here before are no load a second later.
        assert eventually(lambda: metric(server.metrics_url, "adaptive_k_queue_depth") == 0)
        time.sleep(1.2)
        pieces = list(client.generate("import os", stream=True, max_tokens=6, end_id=-1))
        read = pieces[0].num_input_tokens
        # The prompt, and the first token's own pass: there is no time between tokens before the second one.
        assert [piece.followed for piece in pieces] == [
            {"full": read}, {"full": read + 1}, *({"full": read + 1, "top1": tokens} for tokens in range(1, 5)),
        ]  # fmt: skip
        assert [piece.k.max() for piece in pieces] == [2, 2, 1, 1, 1, 1]
        assert metric(server.metrics_url, "adaptive_k_load_step", policy="auto") >= 0
        assert eventually(lambda: metric(server.metrics_url, "adaptive_k_load_step", policy="auto") == 0)
        # Alone in its steps a request reads what it runs; from the second pass on, 1 or 2 experts for its token.
        whole = client.generate("import os", max_tokens=6, end_id=-1, adaptive_k_policy="top1")
        assert whole.followed is None and whole.avg_reads is not None and whole.reads_per_token is not None
        assert whole.reads_per_token <= whole.avg_k == 1.0
        # One step of the prompt, that reads P experts for its tokens, and five that read one for one token.
        prompt_reads = 6 * whole.avg_reads - 5
        assert 1 <= prompt_reads <= read
        assert whole.reads_per_token == pytest.approx((prompt_reads + 5) / (read + 5), rel=1e-5)
        with Client(server.grpc_url, timeout=60) as many:
            streams = [many.generate(prompt, stream=True, max_tokens=40, end_id=-1) for prompt in PROMPTS * 3]
            last = [list(stream)[-1] for stream in streams]
        assert all(chunk.followed is not None and chunk.followed["top1"] > 30 for chunk in last)
        assert all(chunk.reads_per_token < chunk.avg_k for chunk in last)  # in company
    finally:
        (tmp_path / "before.json").write_text(before)
        policy("set", "--file", str(tmp_path / "before.json"))


def test_metrics_by_model_and_policy(server: TritonServer, client: Client) -> None:
    def read(name: str, **labels: str) -> float:
        return metric(server.metrics_url, name, model="ensemble", **labels)

    # What came before has been reported.
    assert eventually(lambda: read("adaptive_k_queue_depth") == 0)
    time.sleep(1.2)
    counters = ["adaptive_k_latency_seconds_count", "adaptive_k_requests_total"]
    before = [read(name, policy="top1") for name in counters]
    tokens = [read("adaptive_k_prompt_tokens_total"), read("adaptive_k_generation_tokens_total")]
    answer = client.generate("import os", max_tokens=7, end_id=-1, adaptive_k_policy="top1")
    assert eventually(lambda: [read(name, policy="top1") for name in counters] == [count + 1 for count in before])
    assert eventually(lambda: read("adaptive_k_generation_tokens_total") == tokens[1] + 7)
    assert read("adaptive_k_steps_total") >= 7
    assert read("adaptive_k_prompt_tokens_total") == tokens[0] + answer.num_input_tokens
    assert read("adaptive_k_avg_k", policy="top1") == 1.0
    assert read("adaptive_k_compute_saved_ratio", policy="top1") == pytest.approx(answer.compute_saved_ratio)
    assert read("adaptive_k_latency_seconds_bucket", policy="top1", le="+Inf") == before[0] + 1
    assert read("adaptive_k_kv_blocks") > 0
    refused = read("adaptive_k_requests_total", outcome="refused")
    with pytest.raises(InferenceServerException):
        infer(server.grpc_url, tensors(["import os"], max_tokens=0))
    assert eventually(lambda: read("adaptive_k_requests_total", outcome="refused") == refused + 1)


def test_an_engine_thread_and_its_server_rest_when_nothing_is_asked(server: TritonServer) -> None:
    def ticks() -> int:
        total = 0
        for task in Path("/proc").glob("[0-9]*/stat"):
            fields = task.read_text().rpartition(")")[2].split()
            if int(fields[2]) == server.pid:  # the server's process group
                total += int(fields[11]) + int(fields[12])
        return total

    before = ticks()
    time.sleep(1.0)
    assert ticks() - before < 30  # hundredths of a second of processor time


def test_threads_share_one_client(client: Client) -> None:
    expected = client.generate("import os", max_tokens=6, end_id=-1).text
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.generate("import os", max_tokens=6, end_id=-1).text))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 8


def test_the_async_client_streams_the_same(server: TritonServer, client: Client) -> None:
    expected = [client.generate(prompt, max_tokens=8, end_id=-1) for prompt in PROMPTS]

    async def ask(asking: AsyncClient, prompt: str) -> list[Chunk]:
        return [chunk async for chunk in asking.generate(prompt, stream=True, max_tokens=8, end_id=-1)]

    async def ask_all() -> list[list[Chunk]]:
        async with AsyncClient(server.grpc_url, timeout=60) as asking:
            assert await asking.is_ready()
            return await asyncio.gather(*(ask(asking, prompt) for prompt in PROMPTS))

    for pieces, whole in zip(asyncio.run(ask_all()), expected, strict=True):
        assert "".join(piece.text for piece in pieces) == whole.text
        np.testing.assert_array_equal(np.concatenate([piece.k for piece in pieces]), whole.k)
        assert pieces[-1].avg_k == pytest.approx(whole.avg_k)
