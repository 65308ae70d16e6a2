# SPDX-License-Identifier: Apache-2.0
"""The Triton models of other names: they pass requests on to the model that holds the engine.

Which tensors a request may have is their configurations' to say; the engine's model reads them all.

Imported inside Triton only.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import triton_python_backend_utils as pb_utils  # exists inside Triton only

from adaptive_k_moe.errors import ServerError
from adaptive_k_moe.model_repository.relay import RelayClient
from adaptive_k_moe.model_repository.triton_sender import TritonSender, is_decoupled, read_inputs

_POLL_SECONDS = 0.05
_DRAIN_SECONDS = 10.0


class AliasModel:
    """What Triton loads as `TritonPythonModel`; its methods are Triton's Python backend interface."""

    def initialize(self, args: dict[str, str]) -> None:
        """Nothing to load: the engine is the other model's, and is asked for with the first request."""
        self._decoupled = is_decoupled(args)
        # The last one takes new requests; one before it, whose model is being reloaded, has some to end.
        self._relays: list[RelayClient] = []
        self._relay_found = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._pass_on, name="adaptive-k-alias", daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Hand the requests over; the answers follow through their response senders."""
        for request in requests:
            sender = TritonSender(request, decoupled=self._decoupled)
            parameters = json.loads(request.parameters() or "{}")
            try:
                self._begin(request.request_id(), read_inputs(request), parameters, sender)
            except ServerError as error:
                sender.fail(str(error), "UNAVAILABLE")

    def finalize(self) -> None:
        """Let running requests end, within limits."""
        deadline = time.monotonic() + _DRAIN_SECONDS
        while any(relay.busy() for relay in self._relays) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        self._stopping = True
        self._relay_found.set()
        self._thread.join()

    def _begin(self, *request: Any) -> None:
        for relay in self._relays[-1:]:  # the other thread may take it out at this moment
            try:
                return relay.begin(*request)
            except ServerError:  # the other model was reloaded: it is there again, at a new socket
                pass
        relay = RelayClient()
        self._relays.append(relay)
        self._relay_found.set()
        return relay.begin(*request)

    def _pass_on(self) -> None:
        while not self._stopping:
            if not self._relays:
                self._relay_found.wait()
                self._relay_found.clear()
            for relay in list(self._relays):
                if not self._step(relay):
                    self._relays.remove(relay)

    def _step(self, relay: RelayClient) -> bool:
        try:
            return relay.step()
        except Exception as error:  # this thread serves all requests: it goes on
            pb_utils.Logger.log_error(f"a response could not be passed on: {error}")
            return True
