# SPDX-License-Identifier: Apache-2.0
"""The page's own server: static files, answers as event streams, and numbers for the charts."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adaptive_k_moe.client import AsyncClient
from adaptive_k_moe.errors import AdaptiveKError
from adaptive_k_moe.observability.playground.answers import Question, stream_answer
from adaptive_k_moe.observability.playground.server_metrics import read_metrics
from adaptive_k_moe.validation import describe_first_error

STATIC = Path(__file__).parent / "static"

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}

_LARGEST_QUESTION = 1 << 22  # bytes


class Playground:
    """What the page is about: one server and where its metrics are.

    Args:
        url: HOST:PORT of its gRPC.
        metrics_url: HOST:PORT of its metrics.
        model_name: the served model.
    """

    def __init__(self, url: str, metrics_url: str, model_name: str = "ensemble") -> None:
        self.url = url
        self.metrics_url = metrics_url
        self.client = AsyncClient(url, model_name=model_name)

    async def page(self, _: Request) -> Response:
        """The page itself."""
        return FileResponse(STATIC / "index.html")

    async def engine(self, _: Request) -> Response:
        """What is served, for the choice of policies; 503 with a sentence while nobody answers."""
        try:
            engine = await self.client.describe_engine()
        except AdaptiveKError as error:
            return _refusal(str(error), 503)
        return JSONResponse({"url": self.url, **asdict(engine)})

    async def metrics(self, _: Request) -> Response:
        """The numbers of the charts; 503 with a sentence where there are none."""
        try:
            return JSONResponse(await read_metrics(self.metrics_url))
        except AdaptiveKError as error:
            return _refusal(str(error), 503)

    async def answer(self, request: Request) -> Response:
        """An answer as an event stream; the server's request ends when the browser goes away."""
        # Only a page of this origin can send JSON without being asked for leave first.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _refusal("the question must be sent as application/json.", 415)
        try:
            question = Question.model_validate_json(await _body(request))
        except ValidationError as error:
            return _refusal(f"{describe_first_error(error)}.", 400)
        except AdaptiveKError as error:
            return _refusal(str(error), 413)
        return StreamingResponse(stream_answer(self.client, question), media_type="text/event-stream")


def create_app(playground: Playground, host: str = "127.0.0.1") -> Starlette:
    """The page's server as an ASGI application.

    Args:
        playground: the server that it is about.
        host: address that the page will listen on. On a loopback address only requests to a loopback name are
            answered, so that no other site's name can be made to point here.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with playground.client:
            yield

    middleware = [Middleware(_SecurityHeaders)]
    if _is_loopback(host):
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", host]))
    return Starlette(
        routes=[
            Route("/", playground.page),
            Route("/api/engine", playground.engine),
            Route("/api/metrics", playground.metrics),
            Route("/api/answer", playground.answer, methods=["POST"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=middleware,
        lifespan=lifespan,
    )


class _SecurityHeaders:
    """Adds `SECURITY_HEADERS` to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _LARGEST_QUESTION:
            raise AdaptiveKError(f"the question has more than {_LARGEST_QUESTION >> 20} MiB.")
    return bytes(body)


def _refusal(sentence: str, status: int) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=status)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
