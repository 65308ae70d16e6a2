# SPDX-License-Identifier: Apache-2.0
"""Sends responses through Triton. Imported inside Triton only."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils  # exists inside Triton only

from adaptive_k_moe.model_repository.responses import Outputs


class TritonSender:
    """A `Sender` over the response sender of a decoupled request."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()

    def send(self, outputs: Outputs) -> None:
        """Send one response."""
        tensors = [pb_utils.Tensor(name, value) for name, value in outputs.items()]
        self._sender.send(pb_utils.InferenceResponse(tensors))

    def fail(self, message: str, code: str) -> None:
        """End the request with an error; `code` is the name of one of Triton's."""
        error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
        self._sender.send(
            pb_utils.InferenceResponse([], error=error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        )

    def finish(self) -> None:
        """End the request."""
        self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def cancelled(self) -> bool:
        """Whether the client has gone."""
        return bool(self._sender.is_cancelled())


def read_inputs(request: Any) -> dict[str, Any]:
    """The tensors of a request, by name."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
