# SPDX-License-Identifier: Apache-2.0
"""A call's reports: who is told of what fails, and that a call ends once."""

from __future__ import annotations

import queue
from typing import Any

from adaptive_k_moe.model_repository.calls import Call, Report
from adaptive_k_moe.runtime.outputs import RequestOutput


class _Sender:
    """Nothing is sent here: reports are looked at before anybody acts on them."""


class _Builder:
    def build(self, output: RequestOutput) -> list[Any]:
        raise ValueError("no such tensor")


def drain(reports: queue.SimpleQueue[Report]) -> list[Report]:
    found = []
    while not reports.empty():
        found.append(reports.get())
    return found


def test_a_response_that_cannot_be_made_is_the_servers_fault_and_ends_the_call_once() -> None:
    reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
    call = Call("id", _Sender(), reports, {"traceparent": "x"})  # type: ignore[arg-type]
    output: Any = type("Output", (), {"error": None, "finished": True})
    call._on_output(_Builder(), output)  # type: ignore[arg-type]
    call._on_output(_Builder(), output)  # type: ignore[arg-type]
    (report,) = drain(reports)
    assert report.final and report.blame == "server"
    assert report.failure == ("the server failed: ValueError: no such tensor", "INTERNAL")
    context = call.context(3)
    assert (context.client_id, context.batch_index, context.trace_headers) == ("id", 3, {"traceparent": "x"})


def test_a_refusal_that_the_runtime_told_of_is_not_told_again() -> None:
    reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
    call = Call("id", _Sender(), reports)  # type: ignore[arg-type]
    call.fail("sentence", "INVALID_ARG")
    call.finish()
    (report,) = drain(reports)
    assert report.failure == ("sentence", "INVALID_ARG") and report.blame is None
