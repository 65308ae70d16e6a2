# SPDX-License-Identifier: Apache-2.0
"""A call's updates: who is told of what fails, and that a call ends once."""

from __future__ import annotations

import queue
from typing import Any

from adaptive_k_moe.model_repository.calls import Call, CallUpdate
from adaptive_k_moe.runtime.outputs import RequestOutput


class _Sender:
    """Nothing is sent here: updates are looked at before anybody acts on them."""


class _Builder:
    def build(self, output: RequestOutput) -> list[Any]:
        raise ValueError("no such tensor")


def drain(updates: queue.SimpleQueue[CallUpdate]) -> list[CallUpdate]:
    found = []
    while not updates.empty():
        found.append(updates.get())
    return found


def test_a_response_that_cannot_be_made_is_the_servers_fault_and_ends_the_call_once() -> None:
    updates: queue.SimpleQueue[CallUpdate] = queue.SimpleQueue()
    call = Call("id", _Sender(), updates, {"traceparent": "x"})  # type: ignore[arg-type]
    output: Any = type("Output", (), {"error": None, "finished": True})
    call._on_output(_Builder(), output)  # type: ignore[arg-type]
    call._on_output(_Builder(), output)  # type: ignore[arg-type]
    (update,) = drain(updates)
    assert update.final and update.blame == "server"
    assert update.failure == ("the server failed: ValueError: no such tensor", "INTERNAL")
    context = call.context(3)
    assert (context.client_id, context.batch_index, context.trace_headers) == ("id", 3, {"traceparent": "x"})


def test_a_refusal_that_the_runtime_told_of_is_not_told_again() -> None:
    updates: queue.SimpleQueue[CallUpdate] = queue.SimpleQueue()
    call = Call("id", _Sender(), updates)  # type: ignore[arg-type]
    call.fail("sentence", "INVALID_ARG")
    call.finish()
    (update,) = drain(updates)
    assert update.failure == ("sentence", "INVALID_ARG") and update.blame is None
