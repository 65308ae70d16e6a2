# SPDX-License-Identifier: Apache-2.0
"""The Triton model that holds the engine. Imported inside Triton only.

Three threads meet here. Triton's calls `execute`, which hands prompts to the runtime and returns. The
engine's calls `_Call.on_output` after each step, which turns what is new into tensors. The reporter does
everything that talks to Triton about running requests: it sends responses, asks which clients have gone,
and sets metrics; so no two threads ever use one response sender.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # exists inside Triton only

from adaptive_k_moe.errors import AdaptiveKError, EngineError
from adaptive_k_moe.model_repository.metrics import NO_POLICY, Metrics
from adaptive_k_moe.model_repository.policy_watch import PolicyWatch
from adaptive_k_moe.model_repository.requests import GenerationRequest, asks_to_stop, parse_request
from adaptive_k_moe.model_repository.responses import Outputs, ResponseBuilder
from adaptive_k_moe.runtime.outputs import RequestOutput

ENGINE_DIR_VARIABLE = "ADAPTIVE_K_ENGINE_DIR"
"""Environment variable that names the engine where the model's configuration does not."""

_POLL_SECONDS = 0.05
_DRAIN_SECONDS = 10.0


class GenerationModel:
    """What Triton loads as `TritonPythonModel`; its methods are Triton's Python backend interface."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engine that the model's parameter `engine_dir` names."""
        try:
            parameters = {
                name: value["string_value"]
                for name, value in json.loads(args["model_config"]).get("parameters", {}).items()
            }
            self._engine_dir = _engine_dir(parameters)
            self._metrics = Metrics(args["model_name"])
            self._llm = _open_engine(self._engine_dir, parameters)
        except AdaptiveKError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._policy_watch = PolicyWatch(self._engine_dir)
        self._reports: queue.SimpleQueue[_Report] = queue.SimpleQueue()
        self._calls: dict[int, _Call] = {}
        self._calls_lock = threading.Lock()
        self._stopping = threading.Event()
        self._reporter = threading.Thread(target=self._report, name="adaptive-k-reporter", daemon=True)
        self._reporter.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Start what the requests ask for; the answers follow through their response senders."""
        self._reload_changed_policies()
        for request in requests:
            call = _Call(request.request_id(), request.get_response_sender(), self._reports)
            try:
                inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                if asks_to_stop(inputs):
                    self._stop(call)
                else:
                    prompts = parse_request(inputs, json.loads(request.parameters() or "{}"))
                    with self._calls_lock:
                        self._calls[id(call)] = call
                    call.start(self._llm, prompts)
            except AdaptiveKError as error:
                call.fail(str(error), pb_utils.TritonError.INVALID_ARG, outcome="refused")
            except Exception as error:  # one request's trouble must not end the others
                pb_utils.Logger.log_error(f"unexpected {type(error).__name__} in a request: {error}")
                call.fail(f"the server failed: {error}", pb_utils.TritonError.INTERNAL, outcome="error")

    def finalize(self) -> None:
        """Let running requests end, within limits, and close the engine."""
        deadline = time.monotonic() + _DRAIN_SECONDS
        while self._calls and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for call in self._running():
            call.abort()
        self._llm.shutdown()
        self._stopping.set()
        self._reporter.join(timeout=_DRAIN_SECONDS)

    def _running(self) -> list[_Call]:
        with self._calls_lock:
            return list(self._calls.values())

    def _stop(self, asking: _Call) -> None:
        """End the running requests of the asking one's id; both get their final response."""
        for call in self._running():
            if call.request_id and call.request_id == asking.request_id:
                call.abort()
        asking.end()

    def _reload_changed_policies(self) -> None:
        if not self._policy_watch.changed():
            return
        try:
            self._llm.reload_policies()
            self._policy_watch.accept()
            pb_utils.Logger.log_info(f"policies reloaded: {', '.join(self._llm.policies.names)}")
        except AdaptiveKError as error:
            # Tried again with the next request: the reason may be a running request that needs the old ones.
            if self._policy_watch.first_refusal():
                pb_utils.Logger.log_error(f"the policies stay as they were: {error}")

    def _report(self) -> None:
        """The reporter's loop: reports as they come, and every so often a look at clients and metrics."""
        next_look = time.monotonic()
        while not (self._stopping.is_set() and self._reports.empty()):
            try:
                self._handle(self._reports.get(timeout=max(0.0, next_look - time.monotonic())))
            except queue.Empty:
                pass
            if time.monotonic() >= next_look:
                self._look_around()
                next_look = time.monotonic() + _POLL_SECONDS

    def _handle(self, report: _Report) -> None:
        try:
            report.send(self._metrics)
        except Exception as error:  # the reporter serves all requests: it goes on
            pb_utils.Logger.log_error(f"a response could not be sent: {error}")
            report.call.abort()
        if report.final:
            with self._calls_lock:
                self._calls.pop(id(report.call), None)

    def _look_around(self) -> None:
        try:
            for call in self._running():
                if call.sender.is_cancelled():
                    call.abort()
            self._metrics.engine(self._llm.stats())
        except Exception as error:  # as above
            pb_utils.Logger.log_error(f"looking after running requests failed: {error}")


class _Report:
    """Something to tell Triton about a call; made on any thread, sent by the reporter."""

    def __init__(
        self,
        call: _Call,
        responses: Sequence[Outputs] = (),
        *,
        error: Any = None,
        final: bool = False,
        ended: Sequence[tuple[Any, ...]] = (),
    ) -> None:
        self.call = call
        self.final = final
        self._responses = responses
        self._error = error
        self._ended = ended

    def send(self, metrics: Metrics) -> None:
        """Send the responses, then the end of the call if this is it."""
        for policy, outcome, *measured in self._ended:
            if measured:
                metrics.finished(policy, outcome, *measured)
            else:
                metrics.ended(policy, outcome)
        sender = self.call.sender
        for outputs in self._responses:
            tensors = [pb_utils.Tensor(name, value) for name, value in outputs.items()]
            sender.send(pb_utils.InferenceResponse(tensors))
        if self.final and self._error is not None:
            sender.send(
                pb_utils.InferenceResponse([], error=self._error),
                flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
            )
        elif self.final:
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class _Call:
    """One Triton request with its prompts in the engine."""

    def __init__(self, request_id: str, sender: Any, reports: queue.SimpleQueue[_Report]) -> None:
        self.request_id = request_id
        self.sender = sender
        self._reports = reports
        self._lock = threading.Lock()
        self._handles: list[Any] = []
        self._running = 0
        self._aborted = False
        self._closed = False

    def start(self, llm: Any, prompts: Sequence[GenerationRequest]) -> None:
        """Hand the prompts to the runtime.

        Raises:
            AdaptiveKError: the runtime refused one; those before it have been aborted.
        """
        self._running = len(prompts)
        for prompt in prompts:
            handle = llm.generate_async(
                prompt.prompt,
                prompt.sampling_params,
                streaming=prompt.streaming,
                on_output=functools.partial(self.on_output, ResponseBuilder(prompt)),
            )
            with self._lock:
                self._handles.append(handle)
                aborted = self._aborted
            if aborted:
                handle.abort()

    def on_output(self, builder: ResponseBuilder, output: RequestOutput) -> None:
        """The engine's thread has something new of one prompt."""
        try:
            self._take(builder, output)
        except Exception as error:  # the engine's thread serves all requests: it goes on, and the client is told
            message = f"the server failed: {type(error).__name__}: {error}"
            self.fail(message, pb_utils.TritonError.INTERNAL, outcome="error")

    def _take(self, builder: ResponseBuilder, output: RequestOutput) -> None:
        with self._lock:
            if self._closed:
                return
            responses = builder.build(output)
            if not output.finished:
                if responses:
                    self._reports.put(_Report(self, responses))
                return
            self._running -= 1
            outcome = _outcome(output)
            metrics = output.metrics
            seconds = (metrics.finished_time or time.monotonic()) - metrics.arrival_time
            ended = [(output.policy, outcome, seconds, builder)]
            if outcome == "error":
                failure = pb_utils.TritonError(output.error or "the engine failed.", pb_utils.TritonError.INTERNAL)
                self._close(_Report(self, error=failure, final=True, ended=ended))
            elif self._running:
                self._reports.put(_Report(self, responses, ended=ended))
            else:
                self._close(_Report(self, responses, final=True, ended=ended))
        if outcome == "error":
            self.abort()

    def fail(self, message: str, code: Any, *, outcome: str) -> None:
        """End the call with an error."""
        with self._lock:
            error = pb_utils.TritonError(message, code)
            self._close(_Report(self, error=error, final=True, ended=[(NO_POLICY, outcome)]))
        self.abort()

    def end(self) -> None:
        """End the call with nothing more to say."""
        with self._lock:
            self._close(_Report(self, final=True))

    def abort(self) -> None:
        """Take the prompts out of the engine; what they still report ends the call."""
        with self._lock:
            if self._aborted:
                return
            self._aborted = True
            handles = list(self._handles)
        for handle in handles:
            handle.abort()

    def _close(self, report: _Report) -> None:
        if not self._closed:
            self._closed = True
            self._reports.put(report)


def _outcome(output: RequestOutput) -> str:
    reasons = [completion.finish_reason or "cancelled" for completion in output.outputs]
    for reason in ("error", "cancelled", "length"):
        if reason in reasons:
            return reason
    return "error" if output.error else "stop"


def _engine_dir(parameters: dict[str, str]) -> Path:
    named = parameters.get("engine_dir", "")
    if not named or named.startswith("${"):  # the placeholder of the configuration as it is shipped
        named = os.environ.get(ENGINE_DIR_VARIABLE, "")
    if not named:
        raise EngineError(
            "no engine is named: set the parameter engine_dir in the model's config.pbtxt, "
            f"or the environment variable {ENGINE_DIR_VARIABLE}."
        )
    return Path(named)


def _open_engine(engine_dir: Path, parameters: dict[str, str]) -> Any:
    from adaptive_k_moe.runtime import LLM

    options = {name: int(parameters[name]) for name in ("num_threads",) if parameters.get(name)}
    return LLM(engine_dir, **options)
