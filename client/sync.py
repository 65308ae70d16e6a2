# SPDX-License-Identifier: Apache-2.0
"""The client for threads."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Literal, overload

import grpc

from adaptive_k_moe.client.connection import Answer, Connection
from adaptive_k_moe.client.options import GenerateOptions, Prompt
from adaptive_k_moe.client.protocol import decode_chunk, decode_engine, explain, join
from adaptive_k_moe.client.results import Chunk, Completion, EngineDescription
from adaptive_k_moe.errors import ClientError

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Client(Connection):
    """A connection to a server; any number of threads may use it at once. Arguments are those of `Connection`."""

    _transport = grpc

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
        call, timeout = self._ask(prompt, options, stream=stream)
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
        call, timeout = self._ask_about_engine()
        try:
            for response in call:
                if (engine := decode_engine(response)) is not None:
                    return engine
        except grpc.RpcError as error:
            raise explain(error, self._url, timeout) from None
        raise ClientError("the server ended the request without an answer.")

    def is_ready(self) -> bool:
        """Whether the server answers and its model is loaded."""
        try:
            return bool(self._ask_whether_ready().ready)
        except grpc.RpcError:
            return False

    def close(self) -> None:
        """Close the connection; requests that still run are cancelled."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CompletionStream(Answer, Iterator[Chunk]):
    """The pieces of an answer. Closing it, or letting go of it, cancels what has not come yet."""

    def __next__(self) -> Chunk:
        while not self._closed:
            try:
                response = next(self._call)
            except StopIteration:
                break
            except grpc.RpcError as error:
                raise self._failure(error, StopIteration) from None
            if (chunk := decode_chunk(response)) is not None:
                return chunk
        self.close()
        raise StopIteration

    def __enter__(self) -> CompletionStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
