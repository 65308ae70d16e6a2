# SPDX-License-Identifier: Apache-2.0
"""Takes ended requests off the engine's thread and hands them to logs and spans on a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from adaptive_k_moe.observability.inference_trace import InferenceTrace
from adaptive_k_moe.runtime.outputs import RequestOutput
from adaptive_k_moe.runtime.telemetry import Observer, Refusal

logger = logging.getLogger("adaptive_k_moe.observability")

Sink = Callable[[InferenceTrace], None]
"""Does something with a request that has ended."""

_MOST_WAITING = 10_000
_SECONDS_BETWEEN_BATCHES = 0.5
_AT_ONCE = 8
_PAUSE_SECONDS = 1e-4


class RequestRecords(Observer):
    """Hands each request that ended, whichever way, to some sinks, in order, on one thread.

    A request that ends within half a second of the last that was recorded waits for the rest of it, and is recorded
    together with all that ended meanwhile: one by one, each would find the caches full of the model's weights, and
    cost the engine several times as much.

    Where the sinks are too slow for the requests, requests beyond the `most_waiting` are not recorded, and counted.

    Args:
        sinks: called one after another; an exception of one is logged.
        most_waiting: most requests that wait for the sinks.
    """

    def __init__(self, sinks: Sequence[Sink], *, most_waiting: int = _MOST_WAITING) -> None:
        self._sinks = tuple(sinks)
        self._waiting: deque[RequestOutput | Refusal] = deque()
        self._most_waiting = most_waiting
        self._num_dropped = 0
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adaptive-k-records", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Requests that were not recorded."""
        return self._num_dropped

    def on_request_finished(self, output: RequestOutput) -> None:
        """Put aside a request that has ended."""
        self._put(output)

    def on_request_refused(self, refusal: Refusal) -> None:
        """Put aside a request that was not accepted."""
        self._put(refusal)

    def close(self, timeout: float | None = None) -> None:
        """Record what waits, and end the thread; requests that end later are not recorded.

        Args:
            timeout: seconds to wait at most; None waits until all is recorded.
        """
        with self._lock:
            self._closed.set()
            self._news.set()
        self._thread.join(timeout)

    def _put(self, event: RequestOutput | Refusal) -> None:
        with self._lock:
            if self._closed.is_set():  # nobody would take it out again
                return
            if len(self._waiting) >= self._most_waiting:
                self._num_dropped += 1
                return
            self._waiting.append(event)
        if not self._news.is_set():
            self._news.set()

    def _run(self) -> None:
        next_batch = time.monotonic()
        while not self._closed.is_set():
            self._news.wait()
            self._closed.wait(next_batch - time.monotonic())
            self._news.clear()
            self._record_waiting()
            next_batch = time.monotonic() + _SECONDS_BETWEEN_BATCHES
        self._record_waiting()  # what came between the last look and the end

    def _record_waiting(self) -> None:
        count = 0
        while self._waiting:
            self._record(self._waiting.popleft())
            count += 1
            if count % _AT_ONCE == 0:
                time.sleep(_PAUSE_SECONDS)  # the engine's thread may wait for the interpreter

    def _record(self, event: RequestOutput | Refusal) -> None:
        try:
            trace = InferenceTrace.of(event)
            for sink in self._sinks:
                sink(trace)
        except Exception:
            logger.exception("a request could not be recorded")
