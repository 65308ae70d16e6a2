# SPDX-License-Identifier: Apache-2.0
"""`adaptive-k serve`: serve an engine with Triton until a signal ends it."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

from adaptive_k_moe.session_arguments import add_session_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--engine_dir", required=True, type=Path, metavar="DIR", help="engine to serve")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        parser.add_argument(
            f"--{name}_port",
            type=int,
            default=port,
            metavar="PORT",
            help="0 picks a free one (default: %(default)s)",
        )
    parser.add_argument(
        "--model_repository",
        type=Path,
        metavar="DIR",
        help="where to write the Triton models of the engine (default: a temporary directory)",
    )
    parser.add_argument(
        "--tritonserver",
        metavar="PATH",
        help="the server's executable (default: the one on PATH, else the nvidia-pytriton wheel's)",
    )
    parser.add_argument("--num_threads", type=int, metavar="N", help="CPU threads of the engine (default: all cores)")
    parser.add_argument(
        "--kv_cache_max_tokens",
        type=int,
        metavar="N",
        help="tokens that the KV cache holds over all sequences (default: a full batch of longest ones, if they fit)",
    )
    add_session_arguments(parser)
    parser.add_argument(
        "--no_decoupled",
        action="store_true",
        help="models for unary calls: one answer a request and no streams, as TensorRT-LLM's decoupled_mode False",
    )
    parser.add_argument("--log_file", type=Path, metavar="FILE", help="the server's log (default: standard error)")
    parser.add_argument("--log_verbose", type=int, default=0, metavar="N", help="Triton's verbosity (default: 0)")
    parser.add_argument(
        "--log_requests",
        metavar="FILE|-",
        help="append a line of JSON for each request to a file, or write it to standard output",
    )
    parser.add_argument("--log_prompts", action="store_true", help="have prompts and answers in --log_requests, too")
    parser.add_argument(
        "--log_sample",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the requests in --log_requests; those that fail are always there (default: 1)",
    )
    parser.add_argument(
        "--log_max_bytes",
        type=int,
        default=0,
        metavar="N",
        help="begin a new --log_requests file before this size, and keep five old ones (default: no limit)",
    )
    parser.add_argument(
        "--otlp_endpoint", metavar="URL", help="send OpenTelemetry spans to this gRPC receiver, http://HOST:PORT"
    )
    parser.add_argument(
        "--ab_db",
        type=Path,
        metavar="FILE",
        help="database of A/B tests: requests that name no policy take part in the one that is running there",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM, SIGINT or a terminal that closes; 0 if that is how it ended."""
    from adaptive_k_moe.model_repository.observation_options import ObservationOptions
    from adaptive_k_moe.model_repository.server import TritonServer
    from adaptive_k_moe.signals import when_told_to_end

    stop_asked = threading.Event()
    when_told_to_end(stop_asked.set)
    observation = ObservationOptions(
        request_log=args.log_requests,
        log_prompts=args.log_prompts,
        sample=args.log_sample,
        max_bytes=args.log_max_bytes,
        otlp_endpoint=args.otlp_endpoint,
        ab_db=None if args.ab_db is None else str(args.ab_db),
    )
    server = TritonServer(
        args.engine_dir,
        http_port=args.http_port,
        grpc_port=args.grpc_port,
        metrics_port=args.metrics_port,
        host=args.host,
        model_repository=args.model_repository,
        tritonserver=args.tritonserver,
        log_file=args.log_file,
        log_verbose=args.log_verbose,
        num_threads=args.num_threads,
        device=args.device,
        kv_cache_max_tokens=args.kv_cache_max_tokens,
        kv_cache_dtype=args.kv_cache_dtype,
        decoupled=not args.no_decoupled,
        observation=observation,
    )
    try:
        if server.start(stop_asked):
            print(
                f"adaptive-k: serving {args.engine_dir}: grpc {server.grpc_url}, http {server.http_url}, "
                f"metrics {server.metrics_url}",
                flush=True,
            )
            server.wait(stop_asked)
    finally:
        server.stop()
    return 0
