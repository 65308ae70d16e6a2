# SPDX-License-Identifier: Apache-2.0
"""Metrics, logs and traces of `LLM`s in this process, as the seed's snippets have them."""

from __future__ import annotations

import gc
import json
import logging
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import prometheus_client
import pytest
from observed import scrape, total
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import adaptive_k_moe.observability
from adaptive_k_moe.errors import DependencyError, RequestError, ServerError
from adaptive_k_moe.observability import debugger, get_logger, metrics
from adaptive_k_moe.observability.definitions import METRICS
from adaptive_k_moe.observability.inference_trace import InferenceTrace
from adaptive_k_moe.observability.request_records import RequestRecords
from adaptive_k_moe.observability.spans import RequestSpans
from adaptive_k_moe.runtime import LLM, SamplingParams
from adaptive_k_moe.runtime import llm as llm_module

from waiting import eventually

PARAMS = SamplingParams(max_tokens=6, end_id=-1, adaptive_k_policy="balanced")


@pytest.fixture(autouse=True)
def _watching_ends_with_the_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    servers: list[Any] = []
    start = prometheus_client.start_http_server

    def noted(*arguments: Any) -> Any:
        servers.append(start(*arguments))
        return servers[-1]

    monkeypatch.setattr(llm_module, "_watchers", [])
    monkeypatch.setattr(metrics, "_collectors", {})
    monkeypatch.setattr(prometheus_client, "start_http_server", noted)
    yield
    for server, _ in servers:
        server.shutdown()
        server.server_close()
    for registry, collector in metrics._collectors.items():
        registry.unregister(collector)


@pytest.fixture
def page() -> Iterator[metrics.MetricsServer]:
    with metrics.start_http_server(0, registry=prometheus_client.CollectorRegistry()) as server:
        yield server


def test_the_seeds_snippets(engine_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 9090)) == 0:
            pytest.skip("another program listens on port 9090 here")
    with LLM(engine_dir) as llm:
        output = llm.generate("import os", PARAMS)
    trace, entropies = InferenceTrace.of(output), [0.42, 1.23]
    names = {"trace": trace, "entropies": entropies}
    names |= {"metrics": metrics, "get_logger": get_logger, "debugger": debugger}
    logging.getLogger("adaptive_k_moe.inference").propagate = False
    try:
        exec(
            """
metrics.start_http_server(9090)
# adaptive_k_latency_seconds
# adaptive_k_avg_k
# adaptive_k_compute_saved_ratio

logger = get_logger("inference")
logger.log_inference(trace)
# {"ts":"...", "avg_k":1.5, "latency_ms":45}

debugger.trace_k_selection(entropies)
# Layer 0 | H=0.42 ████░░░░ | K=1
# Layer 1 | H=1.23 ████████ | K=4
""",
            names,
        )
    finally:
        logging.getLogger("adaptive_k_moe.inference").propagate = True
    shown = capsys.readouterr()
    assert shown.out == "Layer 0 | H=0.42 ████░░░░ | K=1\nLayer 1 | H=1.23 ████████ | K=4\n"
    line = json.loads(shown.err)
    assert line["avg_k"] == pytest.approx(output.avg_k, abs=1e-6)
    assert {"ts", "latency_ms"} <= line.keys()
    with LLM(engine_dir) as llm:  # opened after the server was started
        llm.generate("import os", PARAMS)
        found = scrape("127.0.0.1:9090")
        for name in ("adaptive_k_latency_seconds_count", "adaptive_k_avg_k", "adaptive_k_compute_saved_ratio"):
            assert total(found, name, policy="balanced") > 0, name
        assert total(found, "process_resident_memory_bytes") > 0  # the process's own


def test_the_page_counts_what_the_outputs_say(engine_dir: Path, page: metrics.MetricsServer) -> None:
    url = f"127.0.0.1:{page.port}"
    with LLM(engine_dir) as llm:
        outputs = llm.generate(["import os", "In the beginning"], PARAMS)
        with pytest.raises(RequestError):
            llm.generate([[]])
        found = scrape(url)
        ks = np.concatenate([np.concatenate([o.prompt_k, o.outputs[0].k[1:]]) for o in outputs])
        for layer in range(ks.shape[1]):
            labels = {"layer": str(layer), "policy": "balanced"}
            assert total(found, "adaptive_k_experts_per_token_sum", **labels) == ks[:, layer].sum()
            assert total(found, "adaptive_k_experts_per_token_bucket", le="1.0", **labels) == (ks[:, layer] == 1).sum()
        entropy = np.concatenate([np.concatenate([o.prompt_entropy, o.outputs[0].entropy[1:]]) for o in outputs])
        assert total(found, "adaptive_k_router_entropy_nats_sum") == pytest.approx(entropy.sum(), rel=1e-5)
        assert total(found, "adaptive_k_requests_total", outcome="length") == 2
        assert total(found, "adaptive_k_requests_total", outcome="refused") == 1
        assert total(found, "adaptive_k_errors_total", kind="request") == 1
        assert total(found, "adaptive_k_generation_tokens_total") == 12
        assert total(found, "adaptive_k_kv_blocks") == llm.stats().kv_blocks_total
        # Of each layer's k, every one is a token of some expert.
        load = llm.expert_load()
        assert load is not None
        np.testing.assert_array_equal(load.sum(axis=1), ks.sum(axis=0))
        for (layer, expert), tokens in np.ndenumerate(load):
            labels = {"layer": str(layer), "expert": str(expert)}
            assert total(found, "adaptive_k_expert_tokens_total", **labels) == tokens


def test_promtool_and_the_openmetrics_parser_take_the_page(
    engine_dir: Path, page: metrics.MetricsServer, promtool: str
) -> None:
    url = f"http://127.0.0.1:{page.port}/metrics"
    with LLM(engine_dir) as llm:
        llm.generate("import os", PARAMS)
        text = urllib.request.urlopen(url, timeout=60).read()
        wanted = {"Accept": "application/openmetrics-text; version=1.0.0"}
        openmetrics = urllib.request.urlopen(urllib.request.Request(url, headers=wanted), timeout=60).read().decode()
    lint = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
    assert (lint.returncode, lint.stdout, lint.stderr) == (0, b"", b"")
    families = {family.name for family in text_string_to_metric_families(openmetrics)}
    quiet = {"adaptive_k_errors", "adaptive_k_load_step"}  # nothing failed, and no policy goes by load
    assert families == {name.removesuffix("_total") for name in METRICS} - quiet


def test_each_llm_has_its_own_series_as_long_as_it_is_there(engine_dir: Path, page: metrics.MetricsServer) -> None:
    url = f"127.0.0.1:{page.port}"
    gc.collect()  # of other tests
    first, second = LLM(engine_dir), LLM(engine_dir)
    second.generate("import os", PARAMS)
    found = scrape(url)
    assert total(found, "adaptive_k_kv_blocks", model="MixtralForCausalLM") == first.stats().kv_blocks_total
    assert total(found, "adaptive_k_requests_total", model="MixtralForCausalLM") == 0
    assert total(found, "adaptive_k_requests_total", model="MixtralForCausalLM-2") == 1
    second.shutdown()
    del second

    def gone() -> bool:
        gc.collect()
        return total(scrape(url), "adaptive_k_kv_blocks", model="MixtralForCausalLM-2") == 0

    assert eventually(gone)
    assert total(scrape(url), "adaptive_k_kv_blocks") == first.stats().kv_blocks_total
    first.shutdown()


def test_a_port_in_use_is_one_sentence(page: metrics.MetricsServer) -> None:
    with pytest.raises(ServerError, match=f"the metrics port {page.port} of 127.0.0.1 cannot be used"):
        metrics.start_http_server(page.port, registry=prometheus_client.CollectorRegistry())
    with pytest.raises(ServerError, match="the metrics port 99999"):
        metrics.start_http_server(99999, registry=prometheus_client.CollectorRegistry())


def test_a_page_that_is_closed_answers_no_more() -> None:
    server = metrics.start_http_server(0, registry=prometheus_client.CollectorRegistry())
    server.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60)


def test_records_of_an_llm(engine_dir: Path) -> None:
    seen: list[InferenceTrace] = []
    records = RequestRecords([seen.append])
    with LLM(engine_dir) as llm:
        llm.add_observer(records)
        output = llm.generate("import os", PARAMS)
        with pytest.raises(RequestError):
            llm.generate([[]])
        handle = llm.generate_async("import os", SamplingParams(max_tokens=400, end_id=-1))
        handle.abort()
        handle.result(60)
    records.close()
    assert [trace.finish_reason for trace in seen] == ["length", "refused", "cancelled"]
    assert seen[0].avg_k == pytest.approx(output.avg_k)
    assert seen[0].texts == (output.outputs[0].text,)


def test_a_step_that_fails_is_in_the_counts_and_the_log(
    engine_dir: Path, page: metrics.MetricsServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(step: object) -> None:
        raise RuntimeError("no memory")

    with LLM(engine_dir) as llm:
        records = RequestRecords([get_logger("failing").log_inference])
        llm.add_observer(records)
        monkeypatch.setattr(llm._engine._session, "step", fail)
        output = llm.generate("import os", PARAMS)
        records.close()
        found = scrape(f"127.0.0.1:{page.port}")
        assert total(found, "adaptive_k_errors_total", kind="engine") == 1
        assert total(found, "adaptive_k_requests_total", outcome="error", policy="balanced") == 1
    (line,) = [json.loads(record.getMessage()) for record in caplog.records if record.name.endswith(".failing")]
    assert line["error"] == output.error == "the engine failed: no memory"
    assert (line["finish_reason"], line["error_kind"]) == ("error", "engine")


@pytest.mark.parametrize(
    ("package", "function"),
    [
        ("prometheus_client", lambda: metrics.start_http_server(0)),
        ("opentelemetry.sdk.trace", lambda: RequestSpans.to_otlp("http://127.0.0.1:9", "m")),
    ],
)
def test_a_missing_package_is_one_sentence(
    package: str, function: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=re.escape("pip install 'adaptive-k-moe[observability]'")):
        function()


def test_parts_are_imported_when_they_are_asked_for() -> None:
    assert adaptive_k_moe.observability.metrics is metrics
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        adaptive_k_moe.observability.nothing  # noqa: B018
