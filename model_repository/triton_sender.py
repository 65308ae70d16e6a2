# SPDX-License-Identifier: Apache-2.0
"""Sends responses through Triton. Imported inside Triton only."""

from __future__ import annotations

import json
from typing import Any

import triton_python_backend_utils as pb_utils  # exists inside Triton only

from adaptive_k_moe.model_repository.responses import Outputs


class TritonSender:
    """A `Sender` over a request's response sender.

    Args:
        request: Triton's.
        decoupled: whether its model is; a model that is not owes each request one response, with its end.
    """

    def __init__(self, request: Any, *, decoupled: bool) -> None:
        self._sender = request.get_response_sender()
        self._decoupled = decoupled
        self._only = pb_utils.InferenceResponse([])
        self._tensors: list[Any] = []

    def send(self, outputs: Outputs) -> None:
        """Send one response."""
        # Triton drops those that the client did not ask for while it does not hold the interpreter's lock. Freed there,
        # they end the process with Python 3.12 and newer: the last reference has to be ours.
        self._tensors = [pb_utils.Tensor(name, value) for name, value in outputs.items()]
        response = pb_utils.InferenceResponse(self._tensors)
        if self._decoupled:
            self._sender.send(response)
        else:
            self._only = response

    def fail(self, message: str, code: str) -> None:
        """End the request with an error; `code` is the name of one of Triton's."""
        error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
        self._sender.send(
            pb_utils.InferenceResponse([], error=error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        )

    def finish(self) -> None:
        """End the request."""
        last = () if self._decoupled else (self._only,)
        self._sender.send(*last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def cancelled(self) -> bool:
        """Whether the client has gone."""
        return bool(self._sender.is_cancelled())


def is_decoupled(args: dict[str, str]) -> bool:
    """Whether a model that Triton initializes with these arguments is decoupled."""
    return bool(json.loads(args["model_config"]).get("model_transaction_policy", {}).get("decoupled", False))


def read_inputs(request: Any) -> dict[str, Any]:
    """The tensors of a request, by name."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
