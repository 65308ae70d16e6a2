# SPDX-License-Identifier: Apache-2.0
"""Several servers under one address: requests go to them in turn, and past one that is down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

from adaptive_k_moe.client import AsyncClient, Client


class _Server(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Counts requests and answers each with an empty stream."""

    def __init__(self, port: int = 0) -> None:
        self.requests = 0
        self._pool = ThreadPoolExecutor(2)
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def ModelStreamInfer(self, request_iterator: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        list(request_iterator)
        self.requests += 1
        return iter(())

    def stop(self) -> None:
        self._server.stop(None).wait()
        self._pool.shutdown()


@pytest.fixture
def servers() -> Iterator[list[_Server]]:
    servers = [_Server(), _Server()]
    yield servers
    for server in servers:
        server.stop()


def _address(servers: list[_Server]) -> str:
    return "ipv4:" + ",".join(f"127.0.0.1:{server.port}" for server in servers)


def _reach_both(client: Client, servers: list[_Server]) -> None:
    """Ask until both have answered: a channel uses an address once it is connected to it."""
    deadline = time.monotonic() + 60
    while any(server.requests == 0 for server in servers) and time.monotonic() < deadline:
        list(client.generate("p", stream=True))
    for server in servers:
        server.requests = 0


def test_requests_go_to_all_in_turn(servers: list[_Server]) -> None:
    with Client(_address(servers), timeout=60) as client:
        _reach_both(client, servers)
        for _ in range(10):
            list(client.generate("p", stream=True))
    assert [server.requests for server in servers] == [5, 5]


def test_one_that_is_down_is_left_out_until_it_is_back(servers: list[_Server]) -> None:
    with Client(_address(servers), timeout=60) as client:
        _reach_both(client, servers)
        servers[1].stop()
        for _ in range(6):
            list(client.generate("p", stream=True))
        assert servers[0].requests == 6
        servers[1] = _Server(servers[1].port)
        _reach_both(client, servers)
        list(client.generate("p", stream=True))
        list(client.generate("p", stream=True))
    assert [server.requests for server in servers] == [1, 1]


def test_the_client_for_asyncio_does_so_too(servers: list[_Server]) -> None:
    async def ask() -> None:
        async with AsyncClient(_address(servers), timeout=60) as client:
            for _ in range(20):
                assert [chunk async for chunk in client.generate("p", stream=True)] == []

    asyncio.run(ask())
    assert all(server.requests > 3 for server in servers)
