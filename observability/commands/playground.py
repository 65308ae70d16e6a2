# SPDX-License-Identifier: Apache-2.0
"""`adaptive-k playground`: a page in the browser to try a running server."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--url", default="localhost:8001", metavar="HOST:PORT", help="the server's gRPC address (default: %(default)s)"
    )
    parser.add_argument(
        "--metrics_url", metavar="HOST:PORT", help="the server's metrics (default: port 8002 of the same host)"
    )
    parser.add_argument(
        "--model_name", default="ensemble", metavar="NAME", help="the served model (default: %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address of the page (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8080, metavar="PORT", help="of the page; 0 picks a free one (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Serve the page until SIGTERM, SIGINT or a terminal that closes; 0 if that is how it ended."""
    from adaptive_k_moe.client.connection import check_url
    from adaptive_k_moe.observability.playground.app import Playground, create_app
    from adaptive_k_moe.observability.playground.web_server import serve

    metrics_url = args.metrics_url or default_metrics_url(args.url)
    playground = Playground(check_url(args.url), check_url(metrics_url), args.model_name)
    serve(
        create_app(playground, args.host),
        args.host,
        args.port,
        lambda page: print(f"adaptive-k: playground at {page} for the server at {args.url}", flush=True),
    )
    return 0


def default_metrics_url(url: str) -> str:
    """Port 8002 of a gRPC address's host; of the first one, where the address is a list."""
    first = url.partition(",")[0].removeprefix("ipv4:").removeprefix("ipv6:")
    return f"{first.rpartition(':')[0]}:8002"
