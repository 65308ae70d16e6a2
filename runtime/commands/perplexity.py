# SPDX-License-Identifier: Apache-2.0
"""``adaptive-k perplexity``: quality, experts saved and time saved of each policy, in one run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adaptive_k_moe.session_arguments import add_session_arguments

if TYPE_CHECKING:
    from adaptive_k_moe.runtime.perplexity import PerplexityResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--engine_dir", required=True, help="directory written by `adaptive-k build`")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to measure on")
    parser.add_argument(
        "--adaptive_k_policy",
        nargs="+",
        metavar="NAME",
        help="policies to measure (default: all of the engine)",
    )
    parser.add_argument("--window", type=int, help="tokens in a window (default: 512, or what the engine takes)")
    parser.add_argument("--max_tokens", type=int, help="measure on the text's first tokens alone")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="times that each policy is measured; the median time counts (default: 3)",
    )
    parser.add_argument("--num_threads", type=int, help="CPU threads (default: all)")
    add_session_arguments(parser)
    parser.add_argument("--output", metavar="FILE.json", help="write the figures there, too")


def run(args: argparse.Namespace) -> int:
    """Measure the policies one after another, `full` first, and print the table."""
    from adaptive_k_moe.errors import RequestError
    from adaptive_k_moe.files import write_json
    from adaptive_k_moe.policy import FULL
    from adaptive_k_moe.runtime import LLM, KvCacheConfig
    from adaptive_k_moe.runtime.perplexity import measure_policies

    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot read the text {args.text}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise RequestError(f"{args.text} is not UTF-8 text.") from None
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)  # or fails now, not when all is measured
    kv_cache = KvCacheConfig(dtype=args.kv_cache_dtype)
    with LLM(args.engine_dir, num_threads=args.num_threads, device=args.device, kv_cache_config=kv_cache) as llm:
        assert llm.tokenizer is not None
        token_ids = llm.tokenizer.encode(text)[: args.max_tokens]
        window = min(512, llm.config.build_config.longest_prompt) if args.window is None else args.window
        in_steps = llm.policies.step_policies
        names = args.adaptive_k_policy or [name for name in llm.policies.names if name not in in_steps]
        for name in names:
            llm.policies.index(name)
        # Every policy is compared with `full`, so that one is always measured.
        policies = list(dict.fromkeys([FULL, *names]))
        results = measure_policies(llm, token_ids, policies, window, rounds=args.rounds)
    print(table(results))
    if in_steps and not args.adaptive_k_policy:
        print(
            f"{', '.join(in_steps)} left out: rules that differ by phase or see the whole step are measured by "
            "`adaptive-k eval`, in decode steps."
        )
    if args.output:
        write_json(args.output, report(results, args.text))
    return 0


def table(results: Sequence[PerplexityResult]) -> str:
    """The results beside the first one's, as text."""
    full = results[0]
    width = max(6, *(len(result.policy) for result in results))
    lines = [
        f"{full.num_tokens} tokens in windows of {full.window}",
        f"{'policy':<{width}}  {'perplexity':>10}  {'change':>8}  {'avg_k':>6}  {'experts saved':>13}  "
        f"{'seconds':>8}  {'tokens/s':>9}  {'time saved':>10}",
    ]
    lines += [
        f"{result.policy:<{width}}  {result.perplexity:>10.4f}  "
        f"{result.perplexity / full.perplexity - 1:>+8.2%}  {result.avg_k:>6.3f}  "
        f"{result.compute_saved_ratio:>13.1%}  {result.seconds:>8.3f}  "
        f"{result.tokens_per_second:>9.1f}  {1 - result.seconds / full.seconds:>10.1%}"
        for result in results
    ]
    return "\n".join(lines)


def report(results: Sequence[PerplexityResult], text: str) -> dict[str, object]:
    """The results and their ratios to the first one's, ready for `json.dump`."""
    from dataclasses import asdict

    full = results[0]
    return {
        "text": text,
        "policies": [
            {
                **asdict(result),
                "perplexity_change": result.perplexity / full.perplexity - 1,
                "time_saved_ratio": 1 - result.seconds / full.seconds,
            }
            for result in results
        ],
    }
