# SPDX-License-Identifier: Apache-2.0
"""``adaptive-k generate``: answer one prompt with an engine, with no server."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from adaptive_k_moe.arguments import json_object

if TYPE_CHECKING:
    from adaptive_k_moe.runtime.outputs import CompletionOutput, RequestOutput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--engine_dir", required=True, help="directory written by `adaptive-k build`")
    parser.add_argument("--prompt", required=True, help="text to continue; - reads standard input")
    parser.add_argument(
        "--apply_chat_template",
        action="store_true",
        help="the prompt is a user's message: put it into the model's chat template",
    )
    parser.add_argument("--system_prompt", metavar="TEXT", help="the system's message before it")
    parser.add_argument(
        "--chat_template_kwargs", type=json_object, metavar="JSON", help="what else the template knows, as an object"
    )
    parser.add_argument("--max_tokens", type=int, default=128, help="most tokens to generate (default: 128)")
    parser.add_argument("--adaptive_k_policy", metavar="NAME", help="policy to follow (default: the engine's)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top_k", type=int, default=0, help="sample among the likeliest TOP_K tokens")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample among the tokens that make up TOP_P")
    parser.add_argument("--min_p", type=float, default=0.0, help="drop tokens below MIN_P of the likeliest")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 discourages repetition")
    parser.add_argument("--seed", type=int, help="of the random choices (default: a new one each time)")
    parser.add_argument("--stop", nargs="+", metavar="STR", help="strings that end the answer")
    parser.add_argument("--num_threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--kv_cache_max_tokens", type=int, metavar="N", help="tokens that the KV cache holds")
    parser.add_argument(
        "--show_k",
        action="store_true",
        help="print each token with its mean k over the layers, then k by layer",
    )


def run(args: argparse.Namespace) -> int:
    """Stream the answer to stdout and a line of figures to stderr."""
    from adaptive_k_moe.errors import EngineError, RequestError
    from adaptive_k_moe.runtime import LLM, KvCacheConfig, SamplingParams

    if not args.apply_chat_template and (args.system_prompt is not None or args.chat_template_kwargs is not None):
        raise RequestError(
            "--system_prompt and --chat_template_kwargs are for a chat: give --apply_chat_template, too."
        )
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=args.stop,
        adaptive_k_policy=args.adaptive_k_policy,
    )
    kv_cache = KvCacheConfig(max_tokens=args.kv_cache_max_tokens)
    with LLM(args.engine_dir, num_threads=args.num_threads, kv_cache_config=kv_cache) as llm:
        if args.apply_chat_template:
            turns = [("system", args.system_prompt), ("user", prompt)]
            prompt = [{"role": role, "content": text} for role, text in turns if text is not None]
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
    return (
        f"[{output.policy}] avg_k {output.avg_k:.3f} of {output.expert_runs.full_k}, expert runs saved "
        f"{output.compute_saved_ratio:.1%} (a count); {len(output.prompt_token_ids)} prompt tokens, "
        f"first token after {first:.3f} s, {count} tokens in {first + decode:.3f} s, decode {speed}"
    )
