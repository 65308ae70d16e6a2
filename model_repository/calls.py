# SPDX-License-Identifier: Apache-2.0
"""One request on its way: from its prompts in the engine to its responses, whoever sends those."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from adaptive_k_moe.model_repository.requests import GenerationRequest
from adaptive_k_moe.model_repository.responses import Outputs, ResponseBuilder
from adaptive_k_moe.runtime.outputs import ErrorKind, RequestContext, RequestOutput

if TYPE_CHECKING:
    from adaptive_k_moe.runtime import LLM


class Sender(Protocol):
    """Where a request's responses go. One thread uses it, except for `cancelled` of a relayed request."""

    def send(self, outputs: Outputs) -> None:
        """Send one response."""

    def fail(self, message: str, code: str) -> None:
        """End the request with an error; `code` is the name of one of Triton's."""

    def finish(self) -> None:
        """End the request."""

    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""


class CallUpdate(NamedTuple):
    """Something to tell about a call: responses, then the end of the call.

    `failure` is an error's message and code; `blame` is what failed, where the runtime does not know of it.
    """

    call: Call
    responses: Sequence[Outputs] = ()
    final: bool = False
    failure: tuple[str, str] | None = None
    blame: ErrorKind | None = None


class Call:
    """One request with its prompts in the engine. Updates are made on any thread and queued in order."""

    def __init__(
        self,
        request_id: str,
        sender: Sender,
        updates: queue.SimpleQueue[CallUpdate],
        trace_headers: Mapping[str, str] | None = None,
    ) -> None:
        self.request_id = request_id
        self.trace_headers = trace_headers or {}
        self.sender = sender
        self.abandoned = False  # nobody waits for the answer any more; the reporter's to set
        self._updates = updates
        self._lock = threading.Lock()
        self._handles: list[Any] = []
        self._running = 0
        self._aborted = False
        self._closed = False

    def start(self, llm: LLM, prompts: Sequence[GenerationRequest]) -> None:
        """Hand the prompts to the runtime.

        Raises:
            AdaptiveKError: the runtime refused one; the caller then lets the call `fail`.
        """
        self._running = len(prompts)
        for prompt in prompts:
            handle = llm.generate_async(
                prompt.prompt,
                prompt.sampling_params,
                streaming=prompt.streaming,
                on_output=functools.partial(self._on_output, ResponseBuilder(prompt)),
                context=self.context(prompt.batch_index),
                enrollment=prompt.enrollment,
                chat_template_kwargs=prompt.chat_template_kwargs,
            )
            with self._lock:
                self._handles.append(handle)
                aborted = self._aborted
            if aborted:
                handle.abort()

    def context(self, batch_index: int = 0) -> RequestContext:
        """What the records of one of its prompts shall say."""
        return RequestContext(client_id=self.request_id, batch_index=batch_index, trace_headers=self.trace_headers)

    def abort(self) -> None:
        """Take the prompts out of the engine; their last outputs end the call."""
        with self._lock:
            if self._aborted:
                return
            self._aborted = True
            handles = list(self._handles)
        for handle in handles:
            handle.abort()

    def finish(self, *responses: Outputs) -> None:
        """End the call with nothing more to say than this."""
        with self._lock:
            self._close(CallUpdate(self, responses, final=True))

    def fail(self, message: str, code: str, blame: ErrorKind | None = None) -> None:
        """End the call with an error, and take its prompts out of the engine.

        Args:
            message: the sentence.
            code: name of one of Triton's error codes.
            blame: what failed; None if the runtime has called its observers already.
        """
        with self._lock:
            self._close(CallUpdate(self, final=True, failure=(message, code), blame=blame))
        self.abort()

    def _on_output(self, builder: ResponseBuilder, output: RequestOutput) -> None:
        """The engine's thread has something new of one prompt."""
        try:
            with self._lock:
                self._take(builder, output)
        except Exception as error:  # the engine's thread serves all requests: it goes on, and the client is told
            self.fail(f"the server failed: {type(error).__name__}: {error}", "INTERNAL", "server")
        if output.error:
            self.abort()

    def _take(self, builder: ResponseBuilder, output: RequestOutput) -> None:
        if self._closed:
            return
        responses = builder.build(output)
        if not output.finished:
            if responses:
                self._updates.put(CallUpdate(self, responses))
            return
        self._running -= 1
        if output.error:
            self._close(CallUpdate(self, final=True, failure=(output.error, "INTERNAL")))
        elif self._running:
            self._updates.put(CallUpdate(self, responses))
        else:
            self._close(CallUpdate(self, responses, final=True))

    def _close(self, update: CallUpdate) -> None:
        if not self._closed:
            self._closed = True
            self._updates.put(update)
