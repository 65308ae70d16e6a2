# SPDX-License-Identifier: Apache-2.0
"""Runs the page's web server on one address until it is asked to stop."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from adaptive_k_moe.errors import ServerError

_SHUTDOWN_SECONDS = 2


def serve(app: Starlette, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve `app` until SIGINT, SIGTERM or SIGHUP.

    Args:
        app: the page.
        host: address to listen on.
        port: 0 picks a free one.
        on_ready: called with the page's URL once connections are taken.

    Raises:
        ServerError: the address cannot be used.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    with _listen(host, port) as listener:
        server = uvicorn.Server(config)

        def stop(*_: object) -> None:
            server.should_exit = True

        # Whoever is told the address may end us before uvicorn takes the first two signals; once it has stopped at one,
        # it raises it again for this handler. An exception from a handler would get lost in the event loop.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, stop)
        address = f"[{host}]" if ":" in host else host
        on_ready(f"http://{address}:{listener.getsockname()[1]}/")
        server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket of this address."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ServerError(f"the port {port} of {host} cannot be used ({reason}): choose another with --port.") from None
    return listener
