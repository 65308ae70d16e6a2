# SPDX-License-Identifier: Apache-2.0
"""Spans by OpenTelemetry's own in-memory exporter, and over the wire to a real receiver."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from observed import make_output
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace.status import StatusCode

from adaptive_k_moe.errors import ServerError
from adaptive_k_moe.observability.inference_trace import InferenceTrace
from adaptive_k_moe.observability.spans import RequestSpans
from adaptive_k_moe.runtime.outputs import RequestContext
from adaptive_k_moe.runtime.telemetry import Refusal

PARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


def export(trace: InferenceTrace) -> dict[str, Any]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    RequestSpans(provider, "ensemble").export(trace)
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_has_a_span_and_its_phases_lie_within_it() -> None:
    trace = InferenceTrace.of(make_output())
    spans = export(trace)
    request = spans.pop("text_completion ensemble")
    assert list(spans) == ["queue", "prefill", "decode"]
    assert {span.parent.span_id for span in spans.values()} == {request.context.span_id}
    times = [(span.start_time, span.end_time) for span in spans.values()]
    assert times[0][0] == request.start_time and times[-1][1] == request.end_time
    assert all(before[1] == after[0] for before, after in itertools.pairwise(times))
    assert [round((end - begin) / 1e6) for begin, end in times] == [250, 250, 500]
    assert request.attributes[gen_ai_attributes.GEN_AI_USAGE_INPUT_TOKENS] == 3
    assert request.attributes[gen_ai_attributes.GEN_AI_USAGE_OUTPUT_TOKENS] == 2
    assert request.attributes[gen_ai_attributes.GEN_AI_RESPONSE_FINISH_REASONS] == ("stop",)
    assert request.attributes["adaptive_k.avg_k"] == 1.75
    assert request.status.status_code == StatusCode.UNSET
    assert "to be" not in str(request.attributes)


def test_attributes_are_named_by_the_conventions_where_those_have_a_name() -> None:
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    attributes = export(InferenceTrace.of(make_output()))["text_completion ensemble"].attributes
    assert {name for name in attributes if name.startswith("gen_ai.")} <= known


def test_a_request_is_part_of_its_callers_trace() -> None:
    context = RequestContext(trace_headers={"traceparent": PARENT, "tracestate": "vendor=1"})
    request = export(InferenceTrace.of(make_output(context=context)))["text_completion ensemble"]
    assert f"{request.context.trace_id:032x}" == "ab" * 16
    assert f"{request.parent.span_id:016x}" == "cd" * 8
    assert request.context.trace_state.get("vendor") == "1"


def test_a_caller_that_is_not_sampled_has_no_spans() -> None:
    context = RequestContext(trace_headers={"traceparent": f"{PARENT[:-2]}00"})
    assert export(InferenceTrace.of(make_output(context=context))) == {}


def test_failures_and_refusals_are_errors() -> None:
    output = make_output(error="the engine failed: x", error_kind="engine")
    output.metrics.first_token_time = None
    spans = export(InferenceTrace.of(output))
    assert list(spans) == ["queue", "prefill", "text_completion ensemble"]
    request = spans["text_completion ensemble"]
    assert (request.status.status_code, request.status.description) == (StatusCode.ERROR, "the engine failed: x")
    assert request.attributes["error.type"] == "engine"
    (refused,) = export(InferenceTrace.of(Refusal("id", None, "sentence", "request"))).values()
    assert refused.status.status_code == StatusCode.ERROR


def test_spans_reach_a_receiver(span_receiver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = RequestSpans.to_otlp(span_receiver.endpoint, "ensemble")
    spans.export(InferenceTrace.of(make_output()))
    spans.close()
    assert [span.name for span in span_receiver.spans] == ["queue", "prefill", "decode", "text_completion ensemble"]
    assert span_receiver.resources[-1]["service.name"] == "adaptive-k-moe"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    spans = RequestSpans.to_otlp(span_receiver.endpoint, "ensemble")
    spans.export(InferenceTrace.of(make_output()))
    spans.close()
    assert span_receiver.resources[-1]["service.name"] == "mine"


@pytest.mark.parametrize("endpoint", ["localhost:4317", "ftp://localhost:1", "http://", "http://host", "http://h:x"])
def test_an_endpoint_that_is_none_is_one_sentence(endpoint: str) -> None:
    with pytest.raises(ServerError, match="is no OTLP endpoint"):
        RequestSpans.to_otlp(endpoint, "ensemble")
