# SPDX-License-Identifier: Apache-2.0
"""Where a client connects to and how: address, TLS files, message limits."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc

from adaptive_k_moe.client.protocol import METADATA
from adaptive_k_moe.errors import ClientError

CHANNEL_OPTIONS = (
    # Logits and long prompts exceed gRPC's 4 MB; tritonclient lifts the limits in the same way.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A server that comes back is found within seconds, however long it was away.
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Servers that are replicas have one name and an address each: requests go to them in turn.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
)


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
    if not ssl:
        for name, path in files.items():
            if path is not None:
                raise ClientError(f"{name} was given without ssl=True: the connection would not be encrypted.")
        return None
    return grpc.ssl_channel_credentials(**{name: _read(name, path) for name, path in files.items()})


def metadata(headers: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """Headers that go with each request."""
    return (*METADATA, *((name.lower(), value) for name, value in (headers or {}).items()))


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
