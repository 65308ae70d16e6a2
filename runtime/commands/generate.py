# SPDX-License-Identifier: Apache-2.0
"""``adaptive-k generate``: answer one prompt with an engine, with no server."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from adaptive_k_moe.request_arguments import (
    add_prompt_arguments,
    add_request_arguments,
    given_options,
    read_prompt,
)
from adaptive_k_moe.runtime.sampling_params import SamplingParams
from adaptive_k_moe.session_arguments import add_session_arguments

if TYPE_CHECKING:
    from adaptive_k_moe.runtime.outputs import CompletionOutput, RequestOutput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--engine_dir", required=True, help="directory written by `adaptive-k build`")
    add_prompt_arguments(parser)
    add_request_arguments(parser, SamplingParams.__dataclass_fields__)
    parser.add_argument("--num_threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--kv_cache_max_tokens", type=int, metavar="N", help="tokens that the KV cache holds")
    add_session_arguments(parser)
    parser.add_argument(
        "--show_k",
        action="store_true",
        help="print each token with its mean k over the layers, then k by layer",
    )


def run(args: argparse.Namespace) -> int:
    """Stream the answer to stdout and a line of figures to stderr."""
    from adaptive_k_moe.errors import EngineError
    from adaptive_k_moe.runtime import LLM, KvCacheConfig

    prompt, params = read_prompt(args), SamplingParams(**given_options(args))
    kv_cache = KvCacheConfig(max_tokens=args.kv_cache_max_tokens, dtype=args.kv_cache_dtype)
    with LLM(args.engine_dir, num_threads=args.num_threads, device=args.device, kv_cache_config=kv_cache) as llm:
        output: RequestOutput | None = None
        for output in llm.generate_async(
            prompt, params, streaming=True, chat_template_kwargs=args.chat_template_kwargs
        ):
            answer = output.outputs[0]
            if args.show_k:
                sys.stdout.write(_with_k(answer))
            else:
                sys.stdout.write(answer.text_diff)
            sys.stdout.flush()
        sys.stdout.write("\n")
    assert output is not None
    if output.error is not None:
        raise EngineError(output.error)
    print(_figures(output), file=sys.stderr)
    return 0


def _with_k(answer: CompletionOutput) -> str:
    """A line for each new token: its text, its mean k over the layers, and k layer by layer."""
    count = len(answer.token_ids_diff)
    lines = []
    for index, row in enumerate(answer.k[len(answer.k) - count :]):
        text = answer.text_diff if index == count - 1 else ""
        lines.append(f"{text!r:<16} {row.mean():5.2f}  {' '.join(map(str, row.tolist()))}\n")
    return "".join(lines)


def _figures(output: RequestOutput) -> str:
    metrics = output.metrics
    count = len(output.outputs[0].token_ids)
    assert metrics.first_token_time is not None
    assert metrics.last_token_time is not None
    first = metrics.first_token_time - metrics.arrival_time
    decode = metrics.last_token_time - metrics.first_token_time
    speed = f"{(count - 1) / decode:.1f} tokens/s" if count > 1 and decode > 0 else "one token"
    policy = output.policy
    if output.followed_by_load is not None:
        policy += ": " + ", ".join(f"{name} {tokens}" for name, tokens in output.followed_by_load.items())
    reads = "" if output.reads_per_token is None else f", {output.reads_per_token:.3f} experts read a token"
    return (
        f"[{policy}] avg_k {output.avg_k:.3f} of {output.expert_runs.full_k}, expert runs saved "
        f"{output.compute_saved_ratio:.1%} (a count){reads}; {len(output.prompt_token_ids)} prompt tokens, "
        f"first token after {first:.3f} s, {count} tokens in {first + decode:.3f} s, decode {speed}"
    )
