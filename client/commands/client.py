# SPDX-License-Identifier: Apache-2.0
"""`adaptive-k client`: ask a running server."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from adaptive_k_moe.client.options import GenerateOptions
from adaptive_k_moe.request_arguments import (
    add_prompt_arguments,
    add_request_arguments,
    given_options,
    read_prompt,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--url", default="localhost:8001", metavar="HOST:PORT", help="the server's gRPC address (default: %(default)s)"
    )
    parser.add_argument(
        "--model_name", default="ensemble", metavar="NAME", help="the served model (default: %(default)s)"
    )
    add_prompt_arguments(parser)
    parser.add_argument("--stream", action="store_true", help="print the answer as it comes")
    parser.add_argument("--show_k", action="store_true", help="print the experts that ran, layer by layer, by token")
    add_request_arguments(parser, GenerateOptions.__annotations__)
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds that the answer may take")
    parser.add_argument("--ssl", action="store_true", help="encrypt the connection")
    for name in ("root_certificates", "private_key", "certificate_chain"):
        parser.add_argument(f"--{name}", metavar="FILE", help="PEM file for --ssl")


def run(args: argparse.Namespace) -> int:
    """Print the answer on standard output and what it took on standard error."""
    from adaptive_k_moe.client.sync import Client

    prompt = read_prompt(args)
    client = Client(
        args.url,
        model_name=args.model_name,
        timeout=args.timeout,
        ssl=args.ssl,
        root_certificates=args.root_certificates,
        private_key=args.private_key,
        certificate_chain=args.certificate_chain,
    )
    options: Any = {**given_options(args), "chat_template_kwargs": args.chat_template_kwargs}
    started = time.perf_counter()
    tokens, last = 0, None
    with client:
        if args.stream:
            stream = client.generate(prompt, stream=True, return_k=args.show_k, **options)
            with stream:
                for last in stream:
                    tokens += last.num_output_tokens
                    _print_piece(last.text, last.k if args.show_k else None)
            if not args.show_k:
                print()
        else:
            last = client.generate(prompt, return_k=args.show_k, **options)
            tokens = last.num_output_tokens
            print(last.text)
            if args.show_k and last.k is not None:
                _print_rows(last.k)
    seconds = time.perf_counter() - started
    if last is not None:
        print(
            f"{tokens} tokens in {seconds:.2f} s, average k {last.avg_k:.2f}, "
            f"{100 * last.compute_saved_ratio:.1f} % of the expert runs left out"
            + (f", {last.reads_per_token:.2f} experts read a token" if last.reads_per_token is not None else "")
            + (f", followed {_in_words(last.followed)}" if last.followed is not None else "")
            + (f", variant {last.variant}" if last.variant is not None else ""),
            file=sys.stderr,
        )
    return 0


def _in_words(followed: dict[str, int]) -> str:
    """Policies with the tokens computed under each."""
    return ", ".join(f"{policy} ({tokens} tokens)" for policy, tokens in followed.items())


def _print_piece(text: str, k: Any) -> None:
    """A streamed piece: as it is, or, with k, a line of its own."""
    if k is None:
        print(text, end="", flush=True)
    else:
        print(f"{text!r}  " + "  ".join(f"k={_row(row)}" for row in k), flush=True)


def _print_rows(k: Any) -> None:
    for index, row in enumerate(k):
        print(f"token {index}: k={_row(row)}")


def _row(row: Sequence[int]) -> str:
    return ",".join(str(int(value)) for value in row)
