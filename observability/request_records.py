# SPDX-License-Identifier: Apache-2.0
"""Takes ended requests off the engine's thread and hands them to logs and spans on a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from adaptive_k_moe.observability.inference_trace import InferenceTrace
from adaptive_k_moe.runtime.outputs import RequestOutput
from adaptive_k_moe.runtime.telemetry import Observer, Refusal

logger = logging.getLogger("adaptive_k_moe.observability")

Sink = Callable[[InferenceTrace], None]
"""Does something with a request that has ended."""

_MOST_WAITING = 10_000


class RequestRecords(Observer):
    """Hands each request that ended, whichever way, to some sinks, in order, on one thread.

    Where the sinks are too slow for the requests, requests beyond the `most_waiting` are not recorded, and counted.

    Args:
        sinks: told one after another; an exception of one is logged.
        most_waiting: most requests that wait for the sinks.
    """

    def __init__(self, sinks: Sequence[Sink], *, most_waiting: int = _MOST_WAITING) -> None:
        self._sinks = tuple(sinks)
        self._waiting: queue.Queue[RequestOutput | Refusal | None] = queue.Queue(most_waiting)
        self._num_dropped = 0
        self._drop_lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="adaptive-k-records", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Requests that were not recorded."""
        return self._num_dropped

    def on_request_finished(self, output: RequestOutput) -> None:
        """Queue a request that has ended."""
        self._put(output)

    def on_request_refused(self, refusal: Refusal) -> None:
        """Queue a request that was not accepted."""
        self._put(refusal)

    def close(self, timeout: float | None = None) -> None:
        """Record what waits, and end the thread; requests that end later are not recorded.

        Args:
            timeout: seconds to wait at most; None waits until all is recorded.
        """
        self._closed = True
        try:
            self._waiting.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _put(self, event: RequestOutput | Refusal) -> None:
        if self._closed:  # nobody would take it out again
            return
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            with self._drop_lock:
                self._num_dropped += 1

    def _run(self) -> None:
        while (event := self._waiting.get()) is not None:
            try:
                trace = InferenceTrace.of(event)
                for sink in self._sinks:
                    sink(trace)
            except Exception:
                logger.exception("a request could not be recorded")
