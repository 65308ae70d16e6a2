# SPDX-License-Identifier: Apache-2.0
"""The client for threads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from adaptive_k_moe.client.connection import CHANNEL_OPTIONS, check_url, credentials, metadata, with_trace_context
from adaptive_k_moe.client.options import GenerateOptions, Prompt
from adaptive_k_moe.client.protocol import (
    QUESTION_SECONDS,
    decode_chunk,
    decode_engine,
    encode_engine_question,
    encode_request,
    explain,
    join,
)
from adaptive_k_moe.client.results import Chunk, Completion, EngineDescription
from adaptive_k_moe.errors import ClientError

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Client:
    """A connection to a server; any number of threads may use it at once.

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
        self._url = check_url(url)
        self._model_name = model_name
        self._timeout = timeout
        self._metadata = metadata(headers)
        secrets = credentials(ssl, root_certificates, private_key, certificate_chain)
        if secrets is None:
            self._channel = grpc.insecure_channel(url, CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(url, secrets, CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[True], **options: Unpack[GenerateOptions]
    ) -> CompletionStream: ...

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, **options: Unpack[GenerateOptions]
    ) -> Completion: ...

    def generate(
        self, prompt: Prompt, *, stream: bool = False, **options: Unpack[GenerateOptions]
    ) -> Completion | CompletionStream:
        """Ask for an answer.

        Args:
            prompt: the text to go on from, or the messages of a conversation.
            stream: return pieces as they come instead of the whole answer.
            **options: see `GenerateOptions`.

        Raises:
            ClientError: the server cannot be reached, refused the request, or broke off its answer; when
                streaming, iterating raises it.
        """
        timeout = options.get("timeout", self._timeout)
        request = encode_request(self._model_name, prompt, options, stream=stream)
        # One message, then the end of the client's side: the server ends the stream after its last answer.
        call = self._stub.ModelStreamInfer(
            iter([request]), timeout=timeout, metadata=with_trace_context(self._metadata)
        )
        chunks = CompletionStream(call, self._url, timeout)
        if stream:
            return chunks
        with chunks:
            return join(list(chunks))

    def describe_engine(self) -> EngineDescription:
        """What is served: the policies that a request may name, and the experts' numbers.

        Raises:
            ClientError: the server cannot be reached, or knows no such question.
        """
        timeout = self._timeout or QUESTION_SECONDS
        request = encode_engine_question(self._model_name)
        try:
            for response in self._stub.ModelStreamInfer(iter([request]), timeout=timeout, metadata=self._metadata):
                if (engine := decode_engine(response)) is not None:
                    return engine
        except grpc.RpcError as error:
            raise explain(error, self._url, timeout) from None
        raise ClientError("the server ended the request without an answer.")

    def is_ready(self) -> bool:
        """Whether the server answers and its model is loaded."""
        try:
            request = service_pb2.ModelReadyRequest(name=self._model_name)
            timeout = self._timeout or QUESTION_SECONDS
            return bool(self._stub.ModelReady(request, timeout=timeout, metadata=self._metadata).ready)
        except grpc.RpcError:
            return False

    def close(self) -> None:
        """Close the connection; requests that still run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CompletionStream(Iterator[Chunk]):
    """The pieces of an answer. Closing it, or letting go of it, cancels what has not come yet."""

    def __init__(self, call: Any, url: str, timeout: float | None) -> None:
        self._call = call
        self._url = url
        self._timeout = timeout
        self._closed = False

    def __next__(self) -> Chunk:
        while not self._closed:
            try:
                response = next(self._call)
            except StopIteration:
                break
            except grpc.RpcError as error:
                raise self._failure(error) from None
            if (chunk := decode_chunk(response)) is not None:
                return chunk
        self.close()
        raise StopIteration

    def _failure(self, error: Any) -> Exception:
        if self._closed:  # by another, while this one was waiting
            return StopIteration()
        self.close()
        return explain(error, self._url, self._timeout)

    def close(self) -> None:
        """Cancel the request if it still runs; the server frees what it held."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> CompletionStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
