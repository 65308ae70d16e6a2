# SPDX-License-Identifier: Apache-2.0
"""The Triton model that holds the engine. Imported inside Triton only.

Three threads meet here. Triton's calls `execute`, which hands prompts to the runtime and returns; requests
to the other models come in the same way from the relay. The engine's thread reports to a `Call`
after each step. The reporter does everything that talks to Triton about running requests: it sends
responses and asks which clients have gone; so no two threads ever use one response sender. What else is said of
requests goes the way of the runtime's observers, to `Observation`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton_python_backend_utils as pb_utils  # exists inside Triton only

from adaptive_k_moe.errors import AdaptiveKError, EngineError
from adaptive_k_moe.model_repository.calls import Call, CallUpdate, Sender
from adaptive_k_moe.model_repository.contract import KV_CACHE_PARAMETER
from adaptive_k_moe.model_repository.observation import Observation
from adaptive_k_moe.model_repository.observation_options import ObservationOptions
from adaptive_k_moe.model_repository.pace import Pace
from adaptive_k_moe.model_repository.policy_watch import PolicyWatch
from adaptive_k_moe.model_repository.relay import RelayServer
from adaptive_k_moe.model_repository.requests import (
    Inputs,
    asks_about_engine,
    asks_to_stop,
    check_one_response,
    parse_request,
    trace_headers,
)
from adaptive_k_moe.model_repository.responses import describe_engine
from adaptive_k_moe.model_repository.triton_sender import TritonSender, is_decoupled, read_inputs
from adaptive_k_moe.runtime.telemetry import Refusal

if TYPE_CHECKING:
    from adaptive_k_moe.runtime import LLM

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
            self._decoupled = is_decoupled(args)
            self._engine_dir = _engine_dir(parameters)
            self._observation = Observation(ObservationOptions.from_parameters(parameters), args["model_name"])
            self._llm = _open_engine(self._engine_dir, parameters)
        except AdaptiveKError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._observation.watch(self._llm)
        self._policy_watch = PolicyWatch(self._engine_dir)
        self._policy_lock = threading.Lock()
        self._updates: queue.SimpleQueue[CallUpdate] = queue.SimpleQueue()
        self._calls: dict[int, Call] = {}
        self._calls_lock = threading.Lock()
        self._closing = False
        self._stopping = threading.Event()
        self._reporter = threading.Thread(target=self._report, name="adaptive-k-reporter", daemon=True)
        self._reporter.start()
        self._relay = RelayServer(self._begin)

    def execute(self, requests: Sequence[Any]) -> None:
        """Start what the requests ask for; the answers follow through their response senders."""
        for request in requests:
            parameters = json.loads(request.parameters() or "{}")
            sender = TritonSender(request, decoupled=self._decoupled)
            self._begin(request.request_id(), read_inputs(request), parameters, sender)

    def finalize(self) -> None:
        """Let running requests end, within limits, and close the engine."""
        self._closing = True
        self._relay.close()
        deadline = time.monotonic() + _DRAIN_SECONDS
        while self._calls and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for call in self._running():
            call.abort()
        self._llm.shutdown()
        self._stopping.set()
        self._reporter.join(timeout=_DRAIN_SECONDS)
        self._observation.close()

    def _begin(self, request_id: str, inputs: Inputs, parameters: dict[str, Any], sender: Sender) -> None:
        call = Call(request_id, sender, self._updates, trace_headers(parameters))
        if self._closing:
            call.fail("this model is being unloaded: ask again.", "UNAVAILABLE", "server")
            return
        try:
            if asks_to_stop(inputs):
                self._stop(call)
                return
            self._reload_changed_policies()
            if asks_about_engine(inputs):
                call.finish(describe_engine(self._llm.config, self._llm.policies))
                return
            try:
                prompts = parse_request(inputs, parameters)
                if not self._decoupled:
                    check_one_response(prompts)
            except AdaptiveKError as error:
                call.fail(str(error), "INVALID_ARG", "request")
                return
            with self._calls_lock:
                self._calls[id(call)] = call
            call.start(self._llm, self._observation.enroll(request_id, prompts))
        except AdaptiveKError as error:
            call.fail(str(error), "INVALID_ARG")
        except Exception as error:  # one request's trouble must not end the others
            pb_utils.Logger.log_error(f"unexpected {type(error).__name__} in a request: {error}")
            call.fail(f"the server failed: {type(error).__name__}: {error}", "INTERNAL", "server")

    def _running(self) -> list[Call]:
        with self._calls_lock:
            return list(self._calls.values())

    def _stop(self, asking: Call) -> None:
        """End the running requests of the asking one's id; both get their final response."""
        for call in self._running():
            if call.request_id and call.request_id == asking.request_id:
                call.abort()
        asking.finish()

    def _reload_changed_policies(self) -> None:
        with self._policy_lock:
            if not self._policy_watch.changed():
                return
            try:
                self._llm.reload_policies()
                self._policy_watch.accept()
                pb_utils.Logger.log_info(f"policies reloaded: {', '.join(self._llm.policies.names)}")
            except AdaptiveKError as error:
                # Tried again with the next request: a running one may still need a policy that is gone.
                if self._policy_watch.first_refusal():
                    pb_utils.Logger.log_error(f"the policies stay as they were: {error}")

    def _report(self) -> None:
        """The reporter's loop: updates as they come, and every so often a look at the clients."""
        pace = Pace(_POLL_SECONDS)
        while not (self._stopping.is_set() and self._updates.empty()):
            with contextlib.suppress(queue.Empty):
                self._handle(self._updates.get(timeout=pace.seconds_left()))
            if not pace.seconds_left():
                with pace.look():
                    self._look_around()

    def _handle(self, update: CallUpdate) -> None:
        try:
            if update.failure is not None and update.blame is not None:
                call = update.call
                self._observation.refused(Refusal("", None, update.failure[0], update.blame, context=call.context()))
            if not update.call.abandoned:
                for outputs in update.responses:
                    update.call.sender.send(outputs)
            if update.failure is not None:
                update.call.sender.fail(*update.failure)
            elif update.final:
                update.call.sender.finish()
        except Exception as error:  # the reporter serves all requests: it goes on
            pb_utils.Logger.log_error(f"a response could not be sent: {error}")
            update.call.abort()
        if update.final:
            with self._calls_lock:
                self._calls.pop(id(update.call), None)

    def _look_around(self) -> None:
        try:
            for call in self._running():
                if not call.abandoned and call.sender.cancelled():
                    call.abandoned = True
                    call.abort()
        except Exception as error:  # as above
            pb_utils.Logger.log_error(f"looking after running requests failed: {error}")


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


def _open_engine(engine_dir: Path, parameters: dict[str, str]) -> LLM:
    from adaptive_k_moe.runtime import LLM, KvCacheConfig

    def number(name: str) -> int | None:
        value = parameters.get(name)
        try:
            return int(value) if value else None
        except ValueError:
            raise EngineError(f"the model's parameter {name} is {value!r}: give a whole number.") from None

    dtype: Any = parameters.get("kv_cache_dtype") or "auto"  # checked by the configuration itself
    kv_cache = KvCacheConfig(max_tokens=number(KV_CACHE_PARAMETER), dtype=dtype)
    device: Any = parameters.get("device") or None  # checked by the LLM
    return LLM(engine_dir, num_threads=number("num_threads"), device=device, kv_cache_config=kv_cache)
