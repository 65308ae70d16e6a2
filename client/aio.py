# SPDX-License-Identifier: Apache-2.0
"""The client for asyncio; in all else the twin of `sync`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Mapping
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


class AsyncClient:
    """A connection to a server for one event loop; arguments and errors are those of `Client`.

    Example::

        async with AsyncClient("localhost:8001") as client:
            completion = await client.generate("Once upon")
            async for chunk in client.generate("Once upon", stream=True):
                print(chunk.text, end="")
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
        self._credentials = credentials(ssl, root_certificates, private_key, certificate_chain)
        self._channel: Any = None

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[True], **options: Unpack[GenerateOptions]
    ) -> AsyncCompletionStream: ...

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, **options: Unpack[GenerateOptions]
    ) -> Coroutine[Any, Any, Completion]: ...

    def generate(
        self, prompt: Prompt, *, stream: bool = False, **options: Unpack[GenerateOptions]
    ) -> Coroutine[Any, Any, Completion] | AsyncCompletionStream:
        """Ask for an answer: await it, or with `stream` iterate over it; see `Client.generate`."""
        timeout = options.get("timeout", self._timeout)
        request = encode_request(self._model_name, prompt, options, stream=stream)
        call = self._stub().ModelStreamInfer(
            iter([request]), timeout=timeout, metadata=with_trace_context(self._metadata)
        )
        chunks = AsyncCompletionStream(call, self._url, timeout)
        return chunks if stream else _whole(chunks)

    async def describe_engine(self) -> EngineDescription:
        """What is served; see `Client.describe_engine`."""
        timeout = self._timeout or QUESTION_SECONDS
        request = encode_engine_question(self._model_name)
        try:
            call = self._stub().ModelStreamInfer(iter([request]), timeout=timeout, metadata=self._metadata)
            async for response in call:
                if (engine := decode_engine(response)) is not None:
                    return engine
        except grpc.RpcError as error:
            raise explain(error, self._url, timeout) from None
        raise ClientError("the server ended the request without an answer.")

    async def is_ready(self) -> bool:
        """Whether the server answers and its model is loaded."""
        try:
            request = service_pb2.ModelReadyRequest(name=self._model_name)
            call = self._stub().ModelReady(request, timeout=self._timeout or QUESTION_SECONDS, metadata=self._metadata)
            return bool((await call).ready)
        except grpc.RpcError:
            return False

    async def close(self) -> None:
        """Close the connection; requests that still run are cancelled."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _stub(self) -> Any:
        # The channel belongs to the loop that runs when it is made, so it is not made before it is used.
        if self._channel is None:
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self._url, CHANNEL_OPTIONS)
            else:
                self._channel = grpc.aio.secure_channel(self._url, self._credentials, CHANNEL_OPTIONS)
        return service_pb2_grpc.GRPCInferenceServiceStub(self._channel)


class AsyncCompletionStream(AsyncIterator[Chunk]):
    """The pieces of an answer. Closing it, or letting go of it, cancels what has not come yet."""

    def __init__(self, call: Any, url: str, timeout: float | None) -> None:
        self._call = call
        self._responses = call.__aiter__()
        self._url = url
        self._timeout = timeout
        self._closed = False

    async def __anext__(self) -> Chunk:
        while not self._closed:
            try:
                response = await self._responses.__anext__()
            except StopAsyncIteration:
                break
            except grpc.RpcError as error:
                raise self._failure(error) from None
            if (chunk := decode_chunk(response)) is not None:
                return chunk
        self.close()
        raise StopAsyncIteration

    def _failure(self, error: Any) -> Exception:
        if self._closed:  # by another, while this one was waiting
            return StopAsyncIteration()
        self.close()
        return explain(error, self._url, self._timeout)

    def close(self) -> None:
        """Cancel the request if it still runs; the server frees what it held."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> AsyncCompletionStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


async def _whole(chunks: AsyncCompletionStream) -> Completion:
    async with chunks:
        return join([chunk async for chunk in chunks])
