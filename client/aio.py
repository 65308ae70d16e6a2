# SPDX-License-Identifier: Apache-2.0
"""The client for asyncio; in all else the twin of `sync`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import grpc

from adaptive_k_moe.client.connection import Answer, Connection
from adaptive_k_moe.client.options import GenerateOptions, Prompt
from adaptive_k_moe.client.protocol import decode_chunk, decode_engine, explain, join
from adaptive_k_moe.client.results import Chunk, Completion, EngineDescription
from adaptive_k_moe.errors import ClientError

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AsyncClient(Connection):
    """A connection to a server for one event loop; arguments and errors are those of `Client`.

    Example::

        async with AsyncClient("localhost:8001") as client:
            completion = await client.generate("Once upon")
            async for chunk in client.generate("Once upon", stream=True):
                print(chunk.text, end="")
    """

    _transport = grpc.aio

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
        call, timeout = self._ask(prompt, options, stream=stream)
        chunks = AsyncCompletionStream(call, self._url, timeout)
        return chunks if stream else _whole(chunks)

    async def describe_engine(self) -> EngineDescription:
        """What is served; see `Client.describe_engine`."""
        call, timeout = self._ask_about_engine()
        try:
            async for response in call:
                if (engine := decode_engine(response)) is not None:
                    return engine
        except grpc.RpcError as error:
            raise explain(error, self._url, timeout) from None
        raise ClientError("the server ended the request without an answer.")

    async def is_ready(self) -> bool:
        """Whether the server answers and its model is loaded."""
        try:
            return bool((await self._ask_whether_ready()).ready)
        except grpc.RpcError:
            return False

    async def close(self) -> None:
        """Close the connection; requests that still run are cancelled."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncCompletionStream(Answer, AsyncIterator[Chunk]):
    """The pieces of an answer. Closing it, or letting go of it, cancels what has not come yet."""

    def __init__(self, call: Any, url: str, timeout: float | None) -> None:
        super().__init__(call, url, timeout)
        self._responses = call.__aiter__()

    async def __anext__(self) -> Chunk:
        while not self._closed:
            try:
                response = await self._responses.__anext__()
            except StopAsyncIteration:
                break
            except grpc.RpcError as error:
                raise self._failure(error, StopAsyncIteration) from None
            if (chunk := decode_chunk(response)) is not None:
                return chunk
        self.close()
        raise StopAsyncIteration

    async def __aenter__(self) -> AsyncCompletionStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _whole(chunks: AsyncCompletionStream) -> Completion:
    async with chunks:
        return join([chunk async for chunk in chunks])
