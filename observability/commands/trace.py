# SPDX-License-Identifier: Apache-2.0
"""``adaptive-k trace``: how many experts each token runs in each layer, and the entropies that decide it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from adaptive_k_moe.request_arguments import add_request_arguments, given_options

if TYPE_CHECKING:
    from adaptive_k_moe.observability.k_trace import KTrace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--engine_dir", type=Path, metavar="DIR", help="engine to run")
    source.add_argument("--open", type=Path, metavar="FILE", help="show a trace that was saved")
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue; - reads standard input")
    add_request_arguments(parser, ["max_tokens", "adaptive_k_policy"])
    parser.add_argument("--num_threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="save the trace to this file")
    parser.add_argument(
        "--token", type=int, metavar="N", help="show only this token, from 0, with a bar for each layer"
    )


def run(args: argparse.Namespace) -> int:
    """Show a trace, and save it if asked."""
    from rich.console import Console

    from adaptive_k_moe.errors import RequestError
    from adaptive_k_moe.observability.debugger import trace_k_selection
    from adaptive_k_moe.observability.k_trace import KTrace
    from adaptive_k_moe.observability.k_trace_view import show

    if args.open is None and args.prompt is None:
        raise RequestError("--engine_dir needs a --prompt.")
    trace = _traced(args) if args.open is None else KTrace.read(args.open)
    if args.output is not None:
        trace.save(args.output)
    if args.token is None:
        show(trace, Console(highlight=False))
        return 0
    if not 0 <= args.token < len(trace.tokens):
        raise RequestError(f"--token is {args.token}, but the trace has tokens 0 to {len(trace.tokens) - 1}.")
    token = trace.tokens[args.token]
    print(f"Token {args.token} {token.text!r} ({token.part})")
    trace_k_selection(token.entropy, k=token.k, full_bar=trace.largest_entropy)
    return 0


def _traced(args: argparse.Namespace) -> KTrace:
    from adaptive_k_moe.errors import EngineError
    from adaptive_k_moe.observability.k_trace import KTrace
    from adaptive_k_moe.runtime import LLM, SamplingParams

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    with LLM(args.engine_dir, num_threads=args.num_threads) as llm:
        output = llm.generate(prompt, SamplingParams(**given_options(args)))
        if output.error is not None:
            raise EngineError(output.error)
        return KTrace.of(output, llm)
