# SPDX-License-Identifier: Apache-2.0
"""500 mixed requests to a real server: its log, its metrics, a real Prometheus, spans and answers agree on each."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from observed import Samples, scrape, total

from adaptive_k_moe.client import Client
from adaptive_k_moe.errors import ClientError
from adaptive_k_moe.model_repository import TritonServer
from adaptive_k_moe.model_repository.contract import BLS
from adaptive_k_moe.model_repository.observation_options import ObservationOptions

from waiting import eventually

NUM_REQUESTS = 500
POLICIES = ("full", "balanced", "top1", "mass", "relative")
PROMPTS = ("import os", "And it came to pass", "def function(self):\n    return", "In the beginning")
# The engine of these tests has no embedding for its last character, so the logits of what follows are not finite.
FAILING = "And it came to pass\u0001"
# Traces of the clients of either of the model's names.
DIRECT, ALIAS = "ab" * 16, "ef" * 16
# What a request of each kind ends with. One that is cancelled may have ended before the server hears of it.
KINDS = {
    "whole": {"length"},
    "stream": {"length"},
    "cancelled": {"cancelled", "length"},
    "refused": {"refused"},
    "failed": {"error"},
    "batch": {"length"},
}


@dataclass
class Asked:
    """A request and what its client saw of it."""

    request_id: str
    kind: str
    policy: str
    num_tokens: int
    prompts: list[str]
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    avg_k: list[float] = field(default_factory=list)
    latency: float = 0.0
    error: str = ""


@dataclass
class Run:
    """All that is known of the requests afterwards. `lines` are the log's, by request id."""

    asked: list[Asked]
    lines: dict[str, list[dict[str, Any]]]
    samples: Samples
    prometheus_url: str
    spans: list[Any]
    log: Path


def ask(asked: Asked, clients: list[Client], url: str) -> None:
    """Send one request and note what comes back."""
    client = random.Random(asked.request_id).choice(clients)  # under either of the model's names
    options: dict[str, Any] = {"adaptive_k_policy": asked.policy, "request_id": asked.request_id, "end_id": -1}
    began = time.monotonic()
    if asked.kind == "refused":
        options |= {"adaptive_k_policy": "no such"} if asked.num_tokens % 2 else {"temperature": -1.0}
        try:
            client.generate(asked.prompts[0], **options)
        except ClientError as error:
            asked.error = str(error)
    elif asked.kind == "failed":
        try:
            list(client.generate(FAILING, stream=True, max_tokens=asked.num_tokens, **options))
        except ClientError as error:
            asked.error = str(error)
    elif asked.kind == "batch":
        _ask_batch(asked, url)
    else:
        stream = client.generate(
            asked.prompts[0],
            stream=True,
            max_tokens=450 if asked.kind == "cancelled" else asked.num_tokens,
            **options,
        ) if asked.kind != "whole" else None  # fmt: skip
        if stream is None:
            completion = client.generate(asked.prompts[0], max_tokens=asked.num_tokens, **options)
            chunks = [completion]
        else:
            chunks = []
            for chunk in stream:
                chunks.append(chunk)
                if asked.kind == "cancelled":
                    stream.close()
                    break
        asked.num_input_tokens = chunks[-1].num_input_tokens
        asked.num_output_tokens = sum(chunk.num_output_tokens for chunk in chunks)
        asked.avg_k = [chunks[-1].avg_k]
    asked.latency = time.monotonic() - began


def _ask_batch(asked: Asked, url: str) -> None:
    """Several prompts in one request, as TensorRT-LLM's clients may send them."""
    arrays = {
        "text_input": np.array([[prompt] for prompt in asked.prompts], object),
        "max_tokens": np.full((len(asked.prompts), 1), asked.num_tokens, np.int32),
        "end_id": np.full((len(asked.prompts), 1), -1, np.int32),
        "adaptive_k_policy": np.array([[asked.policy]] * len(asked.prompts), object),
        "return_num_input_tokens": np.ones((len(asked.prompts), 1), bool),
        "return_num_output_tokens": np.ones((len(asked.prompts), 1), bool),
    }
    done = threading.Event()
    responses: list[Any] = []

    def take(result: Any, error: Any) -> None:
        responses.append(error or result)
        if error or result.get_response().parameters["triton_final_response"].bool_param:
            done.set()

    with grpcclient.InferenceServerClient(url) as client:
        client.start_stream(take)
        inputs = []
        for name, array in arrays.items():
            kinds = {"O": "BYTES", "i": "INT32", "b": "BOOL"}
            tensor = grpcclient.InferInput(name, list(array.shape), kinds[array.dtype.kind])
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        client.async_stream_infer("ensemble", inputs, request_id=asked.request_id, enable_empty_final_response=True)
        assert done.wait(60)
    by_prompt: dict[int, float] = {}
    for response in responses:
        if response.get_response().outputs:
            asked.num_input_tokens += response.as_numpy("num_input_tokens").item()
            asked.num_output_tokens += response.as_numpy("num_output_tokens").item()
            by_prompt[response.as_numpy("batch_index").item()] = response.as_numpy("adaptive_k_avg_k").item()
    asked.avg_k = [by_prompt[index] for index in range(len(asked.prompts))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def fragile_engine_dir(checkpoint_dir: Path, engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine of all tests, but that it fails at the prompt `FAILING`."""
    from safetensors.torch import load_file, save_file

    from adaptive_k_moe.engine_builder import build
    from adaptive_k_moe.policy import PolicySet
    from adaptive_k_moe.runtime.tokenizer import Tokenizer

    directory = tmp_path_factory.mktemp("fragile")
    checkpoint = directory / "checkpoint"
    shutil.copytree(checkpoint_dir, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    weights = load_file(checkpoint / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embeddings.clone()
    embeddings[Tokenizer.from_dir(checkpoint).encode("\u0001")[-1]] = math.nan
    save_file(weights, checkpoint / "model.safetensors")
    policies = PolicySet.model_validate(json.loads((engine_dir / "config.json").read_text())["adaptive_k"])
    # Nobody asks for it; the step that it would take is shown all the same.
    by_load = {"kind": "by_load", "steps": [{"policy": "full"}, {"policy": "top1", "queue": 4}]}
    policies = policies.with_policy("by_load", by_load)
    build(checkpoint, directory / "engine", policy=policies, max_batch_size=16, max_seq_len=512, dtype="float32")
    return directory / "engine"


@pytest.fixture(scope="module")
def run(
    fragile_engine_dir: Path,
    span_receiver: Any,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Run]:
    directory = tmp_path_factory.mktemp("observed")
    log = directory / "requests.jsonl"
    server = TritonServer(
        fragile_engine_dir,
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        log_file=directory / "triton.log",
        num_threads=2,
        observation=ObservationOptions(request_log=str(log), otlp_endpoint=span_receiver.endpoint),
    )
    with server:
        scraper = _Prometheus(request, server.metrics_url, directory)
        try:
            asked = _ask_all(server, scraper)
            expected = sum(len(one.prompts) for one in asked)

            def lines() -> int:
                return len(log.read_text().splitlines())

            assert eventually(lambda: lines() >= expected), f"{lines()} lines of {expected}"
            assert eventually(lambda: total(scrape(server.metrics_url), "adaptive_k_requests_total") >= expected)
            samples = scrape(server.metrics_url)
            requests = "text_completion ensemble"
            assert eventually(lambda: sum(span.name == requests for span in span_receiver.spans) >= expected)
            by_id: dict[str, list[dict[str, Any]]] = {}
            for line in log.read_text().splitlines():
                fields = json.loads(line)
                by_id.setdefault(fields["request_id"], []).append(fields)
            yield Run(asked, by_id, samples, scraper.url, list(span_receiver.spans), log)
        finally:
            scraper.close()


class _Prometheus:
    """A Prometheus that scrapes a server every second, where there is one."""

    def __init__(self, request: pytest.FixtureRequest, target: str, directory: Path) -> None:
        self.url = f"http://127.0.0.1:{_free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        try:
            program = request.getfixturevalue("prometheus")
        except pytest.skip.Exception:
            return  # the test that asks it is skipped
        rules = request.getfixturevalue("repository") / "observability" / "prometheus" / "rules.yml"
        config = directory / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
            f"rule_files: [{json.dumps(str(rules))}]\n"
            f"scrape_configs: [{{job_name: triton, static_configs: [{{targets: ['{target}']}}]}}]\n"
        )
        self._process = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={directory / 'tsdb'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
                "--log.level=error",
            ]
        )

    def wait_for(self, count: int) -> None:
        """Wait until it has seen so many requests."""
        if self._process is not None:
            assert eventually(lambda: query(self.url, "sum(adaptive_k_requests_total)") >= count)

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)


def _ask_all(server: TritonServer, scraper: _Prometheus) -> list[Asked]:
    rng = random.Random(20261124)
    kinds = rng.choices(list(KINDS), [10, 6, 2, 3, 1, 1], k=NUM_REQUESTS)
    asked = [
        Asked(
            f"request-{number}",
            kind,
            rng.choice(POLICIES),
            rng.randint(1, 8),
            rng.sample(PROMPTS, 3) if kind == "batch" else [rng.choice(PROMPTS)],
        )
        for number, kind in enumerate(kinds)
    ]

    def headers(trace_id: str) -> dict[str, str]:
        return {"traceparent": f"00-{trace_id}-{'cd' * 8}-01"}

    with (
        Client(server.grpc_url, timeout=60, headers=headers(DIRECT)) as direct,
        Client(server.grpc_url, timeout=60, model_name=BLS, headers=headers(ALIAS)) as alias,
        ThreadPoolExecutor(16) as pool,
    ):
        half = asked[: NUM_REQUESTS // 2]
        list(pool.map(lambda one: ask(one, [direct, alias], server.grpc_url), half))
        scraper.wait_for(sum(len(one.prompts) for one in half))  # it computes rates from what comes then
        list(pool.map(lambda one: ask(one, [direct, alias], server.grpc_url), asked[len(half) :]))
    return asked


def ask_prometheus(url: str, path: str, **parameters: str) -> Any:
    """Data of an answer of Prometheus' API."""
    address = f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(address, timeout=60) as answer:
        return json.load(answer)["data"]


def query(url: str, expression: str) -> float:
    """Value of an expression in Prometheus; 0 where it has no value yet."""
    try:
        result = ask_prometheus(url, "query", query=expression)["result"]
    except OSError:  # it is starting
        return 0.0
    return float(result[0]["value"][1]) if result else 0.0


def test_the_log_has_each_prompt_once_and_agrees_with_its_answer(run: Run) -> None:
    assert run.lines.keys() == {asked.request_id for asked in run.asked}
    for asked in run.asked:
        lines = sorted(run.lines[asked.request_id], key=lambda line: line.get("batch_index", 0))
        assert len(lines) == len(asked.prompts)
        for index, line in enumerate(lines):
            assert line["finish_reason"] in KINDS[asked.kind], line
            if asked.kind == "refused":
                assert line["error"] in asked.error
                assert line["error_kind"] == ("policy" if asked.num_tokens % 2 else "request")
                continue
            if asked.kind == "failed":
                assert line["error"] in asked.error and "logits are not finite" in line["error"]
                assert line["error_kind"] == "sampling"
            assert line["policy"] == asked.policy
            assert line.get("batch_index", 0) == index
            # Every token but the answer's last was computed once, in every layer.
            counts = {int(k): count for k, count in line["k_histogram"].items()}
            computed = line["num_input_tokens"] + max(line["num_output_tokens"] - 1, 0)
            assert sum(counts.values()) == 6 * computed
            assert line["avg_k"] == pytest.approx(
                sum(k * n for k, n in counts.items()) / sum(counts.values()), abs=1e-6
            )
            assert line["latency_ms"] <= 1e3 * asked.latency + 1 or asked.kind == "cancelled"
            assert 0 <= line["queue_ms"] <= line.get("ttft_ms", line["latency_ms"]) <= line["latency_ms"]
            assert ("ttft_ms" in line) == (line["num_output_tokens"] > 0) == (asked.kind != "failed")
            if asked.kind not in ("cancelled", "failed"):
                assert line["avg_k"] == pytest.approx(asked.avg_k[index], abs=1e-5)
        if asked.kind == "cancelled":
            assert lines[0]["num_output_tokens"] >= asked.num_output_tokens
        elif asked.kind != "refused":
            assert sum(line["num_output_tokens"] for line in lines) == asked.num_output_tokens
        if asked.kind not in ("refused", "failed"):
            assert sum(line["num_input_tokens"] for line in lines) == asked.num_input_tokens


def test_cancelled_requests_end_early(run: Run) -> None:
    cancelled = [asked for asked in run.asked if asked.kind == "cancelled"]
    ended = Counter(run.lines[asked.request_id][0]["finish_reason"] for asked in cancelled)
    assert ended["cancelled"] > len(cancelled) / 2


def test_no_prompt_is_in_the_log(run: Run) -> None:
    text = run.log.read_text()
    assert not any(prompt in text for prompt in PROMPTS)


def test_the_metrics_agree_with_the_log(run: Run) -> None:
    lines = [line for lines in run.lines.values() for line in lines]
    accepted = [line for line in lines if line["finish_reason"] != "refused"]
    outcomes = Counter(
        (line["policy"] if line in accepted else "-", line["finish_reason"]) for line in lines
    )  # fmt: skip
    for (policy, outcome), count in outcomes.items():
        assert total(run.samples, "adaptive_k_requests_total", policy=policy, outcome=outcome) == count
    assert total(run.samples, "adaptive_k_requests_total") == len(lines)
    for kind, count in Counter(line["error_kind"] for line in lines if "error" in line).items():
        assert total(run.samples, "adaptive_k_errors_total", kind=kind) == count
    assert total(run.samples, "adaptive_k_preemptions_total") == 0
    by_policy: dict[str, Counter[int]] = {}
    for line in accepted:
        counts = by_policy.setdefault(line["policy"], Counter())
        counts.update({int(k): count for k, count in line["k_histogram"].items()})
    for policy, counts in by_policy.items():
        runs = sum(k * count for k, count in counts.items())
        assert total(run.samples, "adaptive_k_experts_per_token_sum", policy=policy) == runs
        assert total(run.samples, "adaptive_k_experts_per_token_bucket", policy=policy, le="1.0") == counts[1]
        assert total(run.samples, "adaptive_k_avg_k", policy=policy) == pytest.approx(runs / counts.total())
        saved = total(run.samples, "adaptive_k_compute_saved_ratio", policy=policy)
        assert saved == pytest.approx(1 - runs / counts.total() / 2)
        of_policy = [line for line in accepted if line["policy"] == policy]
        assert total(run.samples, "adaptive_k_latency_seconds_count", policy=policy) == len(of_policy)
        seconds = sum(line["latency_ms"] for line in of_policy) / 1e3
        assert total(run.samples, "adaptive_k_latency_seconds_sum", policy=policy) == pytest.approx(seconds, rel=1e-3)
        first = total(run.samples, "adaptive_k_time_to_first_token_seconds_sum", policy=policy)
        assert first == pytest.approx(sum(line.get("ttft_ms", 0.0) for line in of_policy) / 1e3, rel=1e-3)
    all_runs = sum(k * count for counts in by_policy.values() for k, count in counts.items())
    assert total(run.samples, "adaptive_k_expert_tokens_total") == all_runs
    passes = sum(counts.total() for counts in by_policy.values())
    assert total(run.samples, "adaptive_k_router_entropy_nats_count") == passes
    tokens = sum(line["num_output_tokens"] for line in accepted)
    assert total(run.samples, "adaptive_k_generation_tokens_total") == tokens
    answered = sum(line["num_output_tokens"] > 0 for line in accepted)
    assert total(run.samples, "adaptive_k_time_between_tokens_seconds_count") == tokens - answered
    prompt_tokens = sum(line["num_input_tokens"] for line in accepted)
    assert total(run.samples, "adaptive_k_prompt_tokens_total") == prompt_tokens
    cancelled = sum(line["finish_reason"] == "cancelled" for line in lines)
    assert total(run.samples, "adaptive_k_cancellations_total") == cancelled
    steps = total(run.samples, "adaptive_k_steps_total")
    assert steps == total(run.samples, "adaptive_k_batch_size_count")
    assert steps == total(run.samples, "adaptive_k_step_seconds_count")
    assert total(run.samples, "adaptive_k_kv_blocks_used") == 0
    assert total(run.samples, "adaptive_k_records_dropped_total") == 0


def test_a_real_prometheus_has_what_the_clients_counted(run: Run, prometheus: str) -> None:
    def value(expression: str) -> float:
        return query(run.prometheus_url, expression)

    expected = sum(len(asked.prompts) for asked in run.asked)
    assert eventually(lambda: value("sum(adaptive_k_requests_total)") >= expected)
    assert value("sum(adaptive_k_requests_total)") == expected
    refused = sum(asked.kind == "refused" for asked in run.asked)
    assert value('sum(adaptive_k_requests_total{outcome="refused"})') == refused
    for policy in POLICIES:
        accepted = [asked for asked in run.asked if asked.policy == policy and asked.kind != "refused"]
        counted = value(f'sum(adaptive_k_requests_total{{policy="{policy}"}})')
        assert counted == sum(len(one.prompts) for one in accepted)
        whole = sum(len(one.prompts) for one in accepted if one.kind not in ("cancelled", "failed"))
        failed = sum(one.kind == "failed" for one in accepted)
        assert value(f'sum(adaptive_k_requests_total{{policy="{policy}",outcome="error"}})') == failed
        finished = value(f'sum(adaptive_k_requests_total{{policy="{policy}",outcome="length"}})')
        assert whole <= finished <= counted
    # Cancelled requests generated at least what their clients saw.
    seen = sum(asked.num_output_tokens for asked in run.asked)
    assert value("sum(adaptive_k_generation_tokens_total)") >= seen
    # Histograms that Triton holds bucket by bucket are histograms to Prometheus, too.
    median = value("histogram_quantile(0.5, sum by (le) (adaptive_k_router_entropy_nats_bucket))")
    assert 0.1 < median < np.log(8)
    assert value("count(count by (layer) (adaptive_k_router_entropy_nats_count))") == 6
    p99 = value("histogram_quantile(0.99, sum by (le) (adaptive_k_latency_seconds_bucket))")
    assert p99 > 0
    assert eventually(lambda: value("count(model:adaptive_k_kv_blocks_used_ratio)") == 1)  # the rules run


def test_every_panel_of_the_dashboard_shows_something(run: Run, repository: Path, prometheus: str) -> None:
    """Queries as Grafana sends them: each has values that fit its unit, and a name for each of its lines."""
    expected = sum(len(asked.prompts) for asked in run.asked)
    assert eventually(lambda: query(run.prometheus_url, "sum(adaptive_k_requests_total)") >= expected)
    dashboard = json.loads((repository / "observability" / "grafana" / "adaptive_k.json").read_text())
    values = {"__rate_interval": "5m"}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            series, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
            choices = ask_prometheus(run.prometheus_url, f"label/{label}/values", **{"match[]": series})
            assert choices, variable["name"]
            values[variable["name"]] = "|".join(map(re.escape, choices))
    assert set(values["policy"].split("|")) >= set(POLICIES)
    values["policy"] += "|by_load"  # nobody has asked for it yet
    for panel in dashboard["panels"]:
        names = []
        for target in panel.get("targets", []):
            expression = re.sub(r"\$(\w+)", lambda found: values[found[1]].replace("\\", "\\\\"), target["expr"])
            result = ask_prometheus(run.prometheus_url, "query", query=expression)["result"]
            numbers = [float(one["value"][1]) for one in result]
            assert numbers and all(number >= 0 for number in numbers), (panel["title"], result)
            if panel["fieldConfig"]["defaults"].get("unit") == "percentunit":
                assert max(numbers) <= 1, panel["title"]
            # Over a time, other series can be among the first of each moment.
            assert target.get("instant", False) == expression.startswith("topk("), panel["title"]
            legend = target["legendFormat"]
            # Every label that tells lines apart is in their names, as the lines of several servers must be.
            assert {*re.findall(r"{{(\w+)}}", legend)} == {label for one in result for label in one["metric"]}, (
                expression
            )
            names += [re.sub(r"{{(\w+)}}", lambda found, one=one: one["metric"][found[1]], legend) for one in result]
        assert len(names) == len(set(names)), panel["title"]


def test_spans_agree_with_the_log(run: Run) -> None:
    lines = [line for lines in run.lines.values() for line in lines]
    requests = [span for span in run.spans if span.name == "text_completion ensemble"]
    assert len(requests) == len(lines)

    def attributes(span: Any) -> dict[str, Any]:
        return {
            item.key: item.value.string_value or item.value.int_value or item.value.double_value
            for item in span.attributes
        }

    found = Counter(
        (fields["gen_ai.response.id"], fields.get("gen_ai.usage.output_tokens", 0))
        for fields in map(attributes, requests)
    )
    assert found == Counter((line["request_id"], line["num_output_tokens"]) for line in lines)
    # Requests whose client said which trace they belong to are in it, under its span; the others have their own.
    for trace_id in (DIRECT, ALIAS):
        within = [span for span in requests if span.trace_id.hex() == trace_id]
        assert {span.parent_span_id.hex() for span in within} == {"cd" * 8}
        assert {attributes(span)["gen_ai.response.id"] for span in within} == {
            line["request_id"] for line in lines if line.get("trace_id") == trace_id
        }
        assert len(within) > 100
    assert {attributes(span)["gen_ai.response.id"] for span in requests if not span.parent_span_id} == {
        asked.request_id for asked in run.asked if asked.kind == "batch"
    }
    phases = Counter(span.name for span in run.spans)
    accepted = sum(line["finish_reason"] != "refused" for line in lines)
    assert phases["queue"] == phases["prefill"] == accepted
    assert phases["decode"] == sum(line["num_output_tokens"] > 0 for line in lines)
