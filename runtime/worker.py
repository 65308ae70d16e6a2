# SPDX-License-Identifier: Apache-2.0
"""The engine's thread: takes requests from any thread, runs steps while there is work, sleeps otherwise."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

from adaptive_k_moe.errors import AdaptiveKError, EngineError, RequestError
from adaptive_k_moe.runtime.engine import Engine
from adaptive_k_moe.runtime.handle import GenerationHandle, OnOutput
from adaptive_k_moe.runtime.outputs import RequestOutput
from adaptive_k_moe.runtime.sequence import Request
from adaptive_k_moe.runtime.telemetry import logger

_T = TypeVar("_T")


class EngineThread:
    """Owns an engine and the one thread that may touch it.

    The thread is a daemon and holds no reference to an `LLM`, so a forgotten `LLM` can be collected and
    an interpreter can always exit.

    Args:
        engine: closed when the thread ends.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # Reentrant: a collection may run `stop` in the middle of anything that this thread does.
        self._lock = threading.RLock()
        self._handles: dict[str, GenerationHandle] = {}
        self._stopping = False
        self._process = os.getpid()
        self.thread = threading.Thread(target=self._run, name="adaptive-k-engine", daemon=True)
        self.thread.start()

    def submit(self, request: Request, on_output: OnOutput | None, owner: object) -> GenerationHandle:
        """Queue a prepared request.

        Raises:
            RequestError: one of this id is running.
            EngineError: the engine is shut down.
        """
        request_id = request.request_id
        handle = GenerationHandle(
            request_id,
            abort=lambda: self._commands.put(lambda: self._abort(request, handle)),
            on_output=on_output,
            engine_thread=self.thread,
            owner=owner,
        )
        with self._lock:
            self._refuse_if_stopping()
            if request_id in self._handles:
                raise RequestError(f"a request with the id {request_id!r} is still running: give another id.")
            self._handles[request_id] = handle
            self._commands.put(lambda: self._add(request))
        return handle

    def call(self, function: Callable[[], _T]) -> _T:
        """Run a function on the engine's thread between two steps, and wait for what it returns or raises.

        Raises:
            EngineError: the engine is shut down.
        """
        if threading.current_thread() is self.thread:
            return function()
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            self._refuse_if_stopping()
            self._commands.put(run)
        return future.result()

    def stop(self) -> None:
        """End running requests as cancelled, close the engine and wait for the thread; twice is harmless."""
        with self._lock:
            if not self._stopping:
                self._stopping = True
                self._commands.put(lambda: None)  # wakes the thread, which then looks
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise EngineError("this LLM is shut down: open another.")
        if os.getpid() != self._process:  # a fork has no thread but its own, so nobody would answer
            raise EngineError("this LLM was opened before the process forked: open one in each process.")

    def _run(self) -> None:
        engine = self.engine
        try:
            while not self._stopping:
                self._take_commands(wait=not engine.has_work)
                if engine.has_work and not self._stopping:
                    self._step()
        finally:
            with self._lock:
                self._stopping = True
            # A command that was queued before the stop still gets its answer.
            self._take_commands(wait=False)
            for request_id in engine.request_ids:
                self._deliver(engine.abort(request_id))
            engine.close()

    def _take_commands(self, *, wait: bool) -> None:
        try:
            if wait:
                self._commands.get()()
            while True:
                self._commands.get_nowait()()
        except Empty:
            pass

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:
            # The session's failures end in the engine; this is a defect of ours, and others may go on.
            logger.exception("the engine failed outside of the model")
            outputs = [
                output
                for request_id in self.engine.request_ids
                if (output := self.engine.fail(request_id, f"the engine failed: {error}")) is not None
            ]
        for output in outputs:
            self._deliver(output)

    def _add(self, request: Request) -> None:
        try:
            self.engine.add(request)
        except AdaptiveKError as error:
            # Its policy was removed between the check and now.
            self._deliver(self.engine.refuse(request, str(error)))

    def _abort(self, request: Request, handle: GenerationHandle) -> None:
        # Another request may have taken the id by now.
        if self._handles.get(request.request_id) is handle:
            self._deliver(self.engine.abort(request.request_id))

    def _deliver(self, output: RequestOutput | None) -> None:
        if output is None:
            return
        if output.finished:
            with self._lock:
                handle = self._handles.pop(output.request_id)
        else:
            handle = self._handles[output.request_id]
        handle.deliver(output)
