# SPDX-License-Identifier: Apache-2.0
"""What `generate_async` gives: a request's outputs for threads, for asyncio, or for a callback."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from adaptive_k_moe.errors import RequestError
from adaptive_k_moe.runtime.outputs import RequestOutput
from adaptive_k_moe.runtime.telemetry import logger

OnOutput = Callable[[RequestOutput], None]


class GenerationHandle:
    """A running request. Iterate over it, or await it, or ask for its `result`.

    ``for output in handle`` and ``async for output in handle`` give each output as it comes: one after
    every step with a new token if the request streams (and has no callback, which gets them instead),
    and the last one always. Every output is given once, to whoever asks first.

    Args:
        request_id: the request's.
        abort: ends the request.
        on_output: called with each output on the engine's thread; an exception aborts the request.
        engine_thread: where waiting would wait for itself.
        owner: kept alive until the request has ended.
    """

    def __init__(
        self,
        request_id: str,
        *,
        abort: Callable[[], None],
        on_output: OnOutput | None,
        engine_thread: threading.Thread,
        owner: object,
    ) -> None:
        self.request_id = request_id
        self._abort = abort
        self._on_output = on_output
        self._engine_thread = engine_thread
        self._owner: object | None = owner
        self._changed = threading.Condition()
        self._outputs: deque[RequestOutput] = deque()
        self._last: RequestOutput | None = None
        self._wakers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def finished(self) -> bool:
        """Whether the request has ended."""
        return self._last is not None

    def abort(self) -> None:
        """End the request before the next step, as "cancelled"; harmless if it has ended."""
        if not self.finished:
            self._abort()

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the last output.

        Args:
            timeout: seconds to wait at most; None waits for ever.

        Raises:
            TimeoutError: the request still runs; it goes on.
        """
        self._refuse_on_engine_thread()
        with self._changed:
            if not self._changed.wait_for(lambda: self._last is not None, timeout):
                raise TimeoutError(f"request {self.request_id!r} still runs after {timeout} s.")
        assert self._last is not None
        return self._last

    def __iter__(self) -> Iterator[RequestOutput]:
        return self

    def __next__(self) -> RequestOutput:
        self._refuse_on_engine_thread()
        with self._changed:
            self._changed.wait_for(lambda: self._outputs or self._last is not None)
            if self._outputs:
                return self._outputs.popleft()
        raise StopIteration

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        while True:
            with self._changed:
                if self._outputs:
                    return self._outputs.popleft()
                if self._last is not None:
                    raise StopAsyncIteration
                waker = self._new_waker()
            await waker

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self._wait().__await__()

    async def _wait(self) -> RequestOutput:
        while True:
            with self._changed:
                if self._last is not None:
                    return self._last
                waker = self._new_waker()
            await waker

    def _new_waker(self) -> asyncio.Future[None]:
        """A future of the running loop that the next output fulfils; called with the lock held."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._wakers.append((loop, future))
        return future

    def _refuse_on_engine_thread(self) -> None:
        if threading.current_thread() is self._engine_thread and not self.finished:
            raise RequestError(
                f"a callback cannot wait for request {self.request_id!r}: it runs on the engine's thread."
            )

    def deliver(self, output: RequestOutput) -> None:
        """Take an output; called by the engine's thread alone."""
        if self._on_output is not None:
            try:
                self._on_output(output)
            except Exception:
                logger.exception("on_output of request %s failed; the request is aborted", self.request_id)
                self._on_output = None
                if not output.finished:
                    self._abort()
        with self._changed:
            # Nobody reads along where there is a callback, so only the end is kept.
            if self._on_output is None or output.finished:
                self._outputs.append(output)
            if output.finished:
                self._last = output
                # Nothing of a request that has ended keeps anything alive.
                self._owner = self._on_output = None
                self._abort = _nothing
            wakers, self._wakers = self._wakers, []
            self._changed.notify_all()
        for loop, future in wakers:
            # A loop that is closed raises; nobody waits there any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_fulfil, future)


def _nothing() -> None:
    pass


def _fulfil(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
