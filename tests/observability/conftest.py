# SPDX-License-Identifier: Apache-2.0
"""A Prometheus from Debian, and a receiver of spans, both real."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


def _prometheus_program(repository: Path, name: str) -> str:
    unpacked = repository / "build" / "debian" / "prometheus" / "usr" / "bin" / name
    if found := shutil.which(name) or shutil.which(unpacked):
        return found
    reason = f"there is no {name} here: run `make prometheus` on Debian"
    if os.environ.get("ADAPTIVE_K_REQUIRE_PROMETHEUS"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def promtool(repository: Path) -> str:
    return _prometheus_program(repository, "promtool")


@pytest.fixture(scope="session")
def prometheus(repository: Path) -> str:
    return _prometheus_program(repository, "prometheus")


class SpanReceiver(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    """An OTLP receiver over gRPC that keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802  # the protocol's name
        for resource in request.resource_spans:
            self.resources.append({item.key: item.value.string_value for item in resource.resource.attributes})
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def close(self) -> None:
        self._server.stop(None)


@pytest.fixture(scope="module")
def span_receiver() -> Iterator[SpanReceiver]:
    receiver = SpanReceiver()
    yield receiver
    receiver.close()
