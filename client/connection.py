# SPDX-License-Identifier: Apache-2.0
"""What both clients share: where they connect to and how, what they send, and how an answer's end is recognised."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from adaptive_k_moe.arguments import check_arguments
from adaptive_k_moe.client.options import GenerateOptions, Prompt
from adaptive_k_moe.client.protocol import encode_engine_question, encode_request, explain
from adaptive_k_moe.errors import ClientError

QUESTION_SECONDS = 5.0
"""How long a question that needs no generation may take where the client has no timeout of its own."""

_CHANNEL_OPTIONS = (
    # Logits and long prompts exceed gRPC's 4 MB; tritonclient lifts the limits in the same way.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A server that comes back is found within seconds, however long it was away.
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Servers that are replicas have one name and an address each: requests go to them in turn.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
)


def channel_options(url: str) -> tuple[tuple[str, int | str], ...]:
    """Options of a gRPC channel to this address."""
    this_machine = url.startswith(("localhost:", "127.", "[::1]:", "ipv4:127."))
    # A proxy for the world (http_proxy) is none for a server on this machine.
    return (*_CHANNEL_OPTIONS, *((("grpc.enable_http_proxy", 0),) if this_machine else ()))


class Connection:
    """A connection to a server.

    Args:
        url: HOST:PORT of the server's gRPC.
        model_name: the served model.
        timeout: seconds that an answer may take; None waits as long as the server lives.
        ssl: encrypt the connection.
        root_certificates: PEM file of the authorities to trust; None is the system's.
        private_key: PEM file of this client's key, where the server asks for one.
        certificate_chain: PEM file of this client's certificate.
        headers: sent with each request.

    Raises:
        ClientError: the address or a TLS file is unusable. Whether a server is there shows at the first
            request.
    """

    _transport: ClassVar[Any]
    """Where channels come from: `grpc` or `grpc.aio`."""

    def __init__(
        self,
        url: str,
        *,
        model_name: str = "ensemble",
        timeout: float | None = None,
        ssl: bool = False,
        root_certificates: str | None = None,
        private_key: str | None = None,
        certificate_chain: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        check_arguments(ClientError, str, url=url, model_name=model_name)
        check_arguments(ClientError, float | None, timeout=timeout)
        check_arguments(ClientError, bool, ssl=ssl)
        check_arguments(ClientError, Mapping[str, str] | None, headers=headers)
        self._url = check_url(url)
        self._model_name = model_name
        self._timeout = timeout
        self._metadata = metadata(headers)
        self._credentials = credentials(ssl, root_certificates, private_key, certificate_chain)
        self._channel: Any = None
        self._lock = threading.Lock()

    def _stub(self) -> Any:
        """The server's calls. A channel of asyncio belongs to the loop that runs when it is made, so none is early."""
        with self._lock:
            if self._channel is None and self._credentials is None:
                self._channel = self._transport.insecure_channel(self._url, channel_options(self._url))
            elif self._channel is None:
                self._channel = self._transport.secure_channel(self._url, self._credentials, channel_options(self._url))
        return service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def _ask(self, prompt: Prompt, options: GenerateOptions, *, stream: bool) -> tuple[Any, float | None]:
        """The call that brings an answer, and its timeout."""
        request = encode_request(self._model_name, prompt, options, stream=stream)
        timeout = options.get("timeout")
        timeout = self._timeout if timeout is None else timeout
        return self._infer(request, timeout, with_trace_context(self._metadata)), timeout

    def _ask_about_engine(self) -> tuple[Any, float]:
        """The call that brings what is served, and its timeout."""
        timeout = self._timeout or QUESTION_SECONDS
        return self._infer(encode_engine_question(self._model_name), timeout, self._metadata), timeout

    def _ask_whether_ready(self) -> Any:
        request = service_pb2.ModelReadyRequest(name=self._model_name)
        return self._stub().ModelReady(request, timeout=self._timeout or QUESTION_SECONDS, metadata=self._metadata)

    def _infer(self, request: Any, timeout: float | None, headers: tuple[tuple[str, str], ...]) -> Any:
        # One message, then the end of the client's side: the server ends the stream after its last answer.
        return self._stub().ModelStreamInfer(iter([request]), timeout=timeout, metadata=headers)


class Answer:
    """An answer that is under way. Closing it, or letting go of it, cancels what has not come yet."""

    def __init__(self, call: Any, url: str, timeout: float | None) -> None:
        self._call = call
        self._url = url
        self._timeout = timeout
        self._closed = False

    def close(self) -> None:
        """Cancel the request if it still runs; the server frees what it held."""
        self._closed = True
        self._call.cancel()

    def _failure(self, error: Any, end: type[Exception]) -> Exception:
        """What to raise for an `grpc.RpcError`: `end`, if it was closed by another while this one was waiting."""
        if self._closed:
            return end()
        self.close()
        return explain(error, self._url, self._timeout)

    def __del__(self) -> None:
        self.close()


def check_url(url: str) -> str:
    """The address, if it is of the form HOST:PORT.

    Raises:
        ClientError: it is not.
    """
    host, _, port = url.rpartition(":")
    if not host or "/" in url or not port.isdecimal():
        raise ClientError(f"{url!r} is not an address: give HOST:PORT of the server's gRPC, with no scheme.")
    return url


def credentials(
    ssl: bool, root_certificates: str | None, private_key: str | None, certificate_chain: str | None
) -> Any | None:
    """Channel credentials from PEM files; None for a connection that is not encrypted.

    Raises:
        ClientError: a file cannot be read, or files were given without `ssl`.
    """
    files = {
        "root_certificates": root_certificates,
        "private_key": private_key,
        "certificate_chain": certificate_chain,
    }
    check_arguments(ClientError, str | PathLike | None, **files)
    if not ssl:
        for name, path in files.items():
            if path is not None:
                raise ClientError(f"{name} was given without ssl=True: the connection would not be encrypted.")
        return None
    return grpc.ssl_channel_credentials(**{name: _read(name, path) for name, path in files.items()})


def metadata(headers: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """Headers that go with each request.

    Triton's `triton_grpc_error`, which would bring a refusal as the call's status, is not among them: server 2.51
    may end with a segmentation fault where a stream ends so on a busy machine.
    """
    return tuple((name.lower(), value) for name, value in (headers or {}).items())


def with_trace_context(headers: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The headers, and the W3C trace context of the span that this thread or task is in.

    Only a program that uses OpenTelemetry has one; where its package was never imported, nothing is looked for.
    """
    if "opentelemetry.trace" not in sys.modules:
        return headers
    from opentelemetry import propagate

    context: dict[str, str] = {}
    propagate.inject(context)
    given = {name for name, _ in headers}
    return (*headers, *((name, value) for name, value in context.items() if name not in given))


def _read(name: str, path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ClientError(f"cannot read {name} {path}: {error.strerror}.") from None
