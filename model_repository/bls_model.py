# SPDX-License-Identifier: Apache-2.0
"""The Triton model of the other name, `tensorrt_llm_bls`: forwards to the one that holds the engine.

Imported inside Triton only. It is not an `ensemble` configuration because Triton does not pass a client's
cancellation on to an ensemble's running step, so that a client that left would keep its KV blocks.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # exists inside Triton only

from adaptive_k_moe.model_repository.contract import ENSEMBLE

_POLL_SECONDS = 0.05


class BlsModel:
    """What Triton loads as `TritonPythonModel`; its methods are Triton's Python backend interface."""

    def initialize(self, args: dict[str, str]) -> None:
        """Nothing to open: the engine is the other model's."""
        del args
        self._threads: set[threading.Thread] = set()

    def execute(self, requests: Sequence[Any]) -> None:
        """Forward each request on a thread of its own; the answers follow through its response sender."""
        for request in requests:
            thread = threading.Thread(target=self._forward, args=(_Forwarded(request),), daemon=True)
            self._threads.add(thread)
            thread.start()

    def finalize(self) -> None:
        """Wait for the requests that are still being forwarded."""
        for thread in list(self._threads):
            thread.join()

    def _forward(self, forwarded: _Forwarded) -> None:
        try:
            forwarded.run()
        finally:
            self._threads.discard(threading.current_thread())


class _Forwarded:
    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        # An id of our own, by which the request can be stopped whatever ids clients use.
        self._request_id = request.request_id() if _is_stop(request) else str(uuid.uuid4())
        self._inputs = [pb_utils.Tensor(tensor.name(), tensor.as_numpy()) for tensor in request.inputs()]
        self._outputs = list(request.requested_output_names())
        self._parameters = json.loads(request.parameters() or "{}")
        self._lock = threading.Lock()  # one thread at a time uses the sender
        self._ended = threading.Event()

    def run(self) -> None:
        """Pass the answers on until the last one, and a cancellation the other way."""
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        error = None
        try:
            for response in self._request(self._inputs).exec(decoupled=True):
                if response.has_error():
                    error = response.error()
                    break
                if tensors := response.output_tensors():
                    with self._lock:
                        self._sender.send(pb_utils.InferenceResponse(tensors))
        except pb_utils.TritonModelException as failure:
            error = pb_utils.TritonError(str(failure))
        with self._lock:
            self._ended.set()
            final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            if error is None:
                self._sender.send(flags=final)
            else:
                self._sender.send(pb_utils.InferenceResponse([], error=error), flags=final)
        watcher.join()

    def _request(self, inputs: Sequence[Any]) -> Any:
        return pb_utils.InferenceRequest(
            model_name=ENSEMBLE,
            request_id=self._request_id,
            requested_output_names=self._outputs,
            inputs=inputs,
            parameters=self._parameters,
        )

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            with self._lock:
                cancelled = not self._ended.is_set() and self._sender.is_cancelled()
            if cancelled:
                stop = pb_utils.Tensor("stop", np.array([[True]]))
                needed = [tensor for tensor in self._inputs if tensor.name() in ("text_input", "max_tokens")]
                for _ in self._request([*_first_rows(needed), stop]).exec(decoupled=True):
                    pass
                return


def _is_stop(request: Any) -> bool:
    tensor = pb_utils.get_input_tensor_by_name(request, "stop")
    return tensor is not None and bool(tensor.as_numpy().any())


def _first_rows(tensors: Sequence[Any]) -> list[Any]:
    return [pb_utils.Tensor(tensor.name(), tensor.as_numpy()[:1]) for tensor in tensors]
