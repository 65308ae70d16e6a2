# SPDX-License-Identifier: Apache-2.0
"""OpenTelemetry spans of requests: one for the request, and within it queue, prefill and decode.

Spans are made when a request has ended, from the times that the runtime noted, so they cost the engine nothing.
Attributes are named by OpenTelemetry's conventions for generative AI where those have a name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptive_k_moe.errors import DependencyError, ServerError
from adaptive_k_moe.observability.inference_trace import InferenceTrace

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

SERVICE_NAME = "adaptive-k-moe"
"""The service's name, unless the environment variable OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES has another."""


class RequestSpans:
    """Makes the spans of requests.

    Args:
        provider: whose exporters they go to.
        model: the model's name.
    """

    def __init__(self, provider: TracerProvider, model: str) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("adaptive_k_moe")
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    @classmethod
    def to_otlp(cls, endpoint: str, model: str) -> RequestSpans:
        """Spans that go to an OpenTelemetry collector over gRPC.

        Args:
            endpoint: its address, `http://HOST:PORT`, or `https://HOST:PORT` for TLS.
            model: the model's name.

        Raises:
            DependencyError: OpenTelemetry is not installed.
            ServerError: the endpoint is no such address.
        """
        check_endpoint(endpoint)
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME as SERVICE_NAME_KEY
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise DependencyError(
                f"spans need the package {error.name!r}: pip install 'adaptive-k-moe[observability]'."
            ) from None
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME_KEY]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME_KEY: SERVICE_NAME}))
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider, model)

    def export(self, trace: InferenceTrace) -> None:
        """Make the spans of a request that has ended, under its caller's span if it came with one."""
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.status import Status, StatusCode

        parent = self._propagator.extract(trace.context.headers) if trace.context else None
        request = self._tracer.start_span(
            f"text_completion {self._model}",
            context=parent,
            kind=SpanKind.SERVER,
            start_time=_nanoseconds(trace.arrival),
            attributes=self._attributes(trace),
        )
        if not request.is_recording():  # by the sampler's choice
            return
        if trace.error is not None:
            request.set_status(Status(StatusCode.ERROR, trace.error))
        inside = set_span_in_context(request)
        for name, begin, end in _phases(trace):
            span = self._tracer.start_span(name, context=inside, start_time=_nanoseconds(begin))
            span.end(_nanoseconds(end))
        request.end(_nanoseconds(trace.finished))

    def close(self) -> None:
        """Export what waits, and end the exporters."""
        self._provider.shutdown()

    def _attributes(self, trace: InferenceTrace) -> dict[str, Any]:
        attributes = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": SERVICE_NAME,
            "gen_ai.request.model": self._model,
            "gen_ai.response.id": trace.request_id,
            "gen_ai.response.finish_reasons": (trace.finish_reason,),
            "gen_ai.usage.input_tokens": trace.num_input_tokens,
            "gen_ai.usage.output_tokens": trace.num_output_tokens,
            "error.type": trace.error_kind,
            "adaptive_k.policy": trace.policy,
            "adaptive_k.followed": None if trace.followed is None else tuple(trace.followed),
            "adaptive_k.variant": trace.variant,
            "adaptive_k.avg_k": trace.avg_k,
            "adaptive_k.compute_saved_ratio": trace.compute_saved_ratio,
            "adaptive_k.avg_reads": trace.avg_reads,
            "adaptive_k.reads_per_token": trace.reads_per_token,
            "adaptive_k.num_preemptions": trace.num_preemptions,
        }
        return {name: value for name, value in attributes.items() if value is not None}


def check_endpoint(endpoint: str) -> None:
    """Refuse what is no address of an OTLP receiver.

    Raises:
        ServerError: it is none.
    """
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port is not None
    except ValueError:
        usable = False
    if not usable:
        raise ServerError(f"{endpoint!r} is no OTLP endpoint: give http://HOST:PORT of its gRPC receiver.")


def _phases(trace: InferenceTrace) -> list[tuple[str, float, float]]:
    """Name, begin and end of what a request went through; the phase that it ended in ends with it."""
    marks = [("queue", trace.arrival), ("prefill", trace.scheduled), ("decode", trace.first_token)]
    begun = [(name, begin) for name, begin in marks if begin is not None]
    if trace.finish_reason == "refused":
        return []
    ends = [begin for _, begin in begun[1:]] + [trace.finished]
    return [(name, begin, end) for (name, begin), end in zip(begun, ends, strict=True)]


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
