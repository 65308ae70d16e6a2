# SPDX-License-Identifier: Apache-2.0
"""``adaptive-k eval``: what an engine's policies save and cost, all in one run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptive_k_moe.calibration.evaluation import PolicyEvaluation
    from adaptive_k_moe.calibration.evaluator import Evaluator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--engine_dir", type=Path, help="directory written by `adaptive-k build`")
    model.add_argument("--checkpoint_dir", type=Path, help="Hugging Face checkpoint, run by transformers on --device")
    parser.add_argument("--policy", type=Path, metavar="FILE", help="policy file, for --checkpoint_dir")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of --checkpoint_dir (default: cpu)")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--adaptive_k_policy", nargs="+", metavar="NAME", help="policies (default: all of the engine)")
    parser.add_argument("--window", type=int, help="tokens in a window (default: 256, or what the engine takes)")
    parser.add_argument("--max_tokens", type=int, help="use about this many tokens of each text")
    parser.add_argument(
        "--batch_size",
        type=int,
        nargs="+",
        default=[1, 4, 16, 64],
        metavar="B",
        help="sequences in a step, for decode and the times (default: 1 4 16 64, as they fit the engine and the text)",
    )
    parser.add_argument(
        "--max_steps",
        type=int,
        default=1024,
        help="most decode steps of each policy and batch size; 0 reads none (default: 1024)",
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing; 0 takes no times (default: 15)")
    parser.add_argument("--num_threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures there, too")


def run(args: argparse.Namespace) -> int:
    """Measure and print the tables."""
    from adaptive_k_moe.calibration.decoding import decode_table, why_too_large
    from adaptive_k_moe.calibration.evaluation import evaluate
    from adaptive_k_moe.calibration.windows import make_windows, read_text
    from adaptive_k_moe.engine_builder.commands.console import progress_bar
    from adaptive_k_moe.files import write_json

    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)  # or fails now, not when all is measured
    texts = {str(path): read_text(path) for path in args.text}
    with progress_bar("opening") as report:
        with _open(args) as evaluator:
            build = evaluator.config.build_config
            window = args.window or min(256, build.max_seq_len, build.max_num_tokens)
            evaluator.check_window(window)
            windows = make_windows(evaluator.tokenizer, texts, window, max_tokens=args.max_tokens)
            results, decodings = evaluate(
                evaluator,
                windows,
                args.adaptive_k_policy or list(evaluator.config.policies_for_model().policies),
                batches=args.batch_size,
                rounds=args.rounds,
                max_steps=args.max_steps,
                progress=report,
            )
            too_large = {batch: why_too_large(evaluator, windows, batch) for batch in args.batch_size}
            asked = args.adaptive_k_policy or evaluator.config.policy_tables().names
            in_steps = [name for name in evaluator.config.policy_tables().step_policies if name in asked]
    print(f"{len(windows)} windows of {window} tokens; intervals are 95 %, over windows or rounds")
    print(table(results))
    if in_steps:
        print(
            f"\n{', '.join(in_steps)}: measured in decode steps alone, since windows read whole say nothing of rules "
            "that differ by phase or see the whole step."
        )
    if decodings:
        print(decode_table(decodings))
    for batch, reason in too_large.items():
        if reason is not None:
            print(f"batch {batch} left out: {reason}")
    if args.output:
        content = {
            "texts": windows.names,
            "window": window,
            "num_windows": len(windows),
            "decode": [decoding.to_json() for decoding in decodings],
        }
        write_json(args.output, {**content, "policies": [result.to_json() for result in results]})
    return 0


def _open(args: argparse.Namespace) -> Evaluator:
    """The engine, or the checkpoint on a device with the policies of the file."""
    from adaptive_k_moe.calibration.errors import CalibrationError
    from adaptive_k_moe.calibration.evaluator import Evaluator
    from adaptive_k_moe.policy import read_policy_file

    if args.engine_dir is not None:
        if args.policy is not None or args.device != "cpu":
            raise CalibrationError("--policy and --device go with --checkpoint_dir: an engine has its own.")
        return Evaluator(args.engine_dir, num_threads=args.num_threads)
    from adaptive_k_moe.calibration.torch_session import CheckpointEvaluator

    policies = None if args.policy is None else read_policy_file(args.policy)
    return CheckpointEvaluator(args.checkpoint_dir, args.device, policies=policies)


def table(results: Sequence[PolicyEvaluation]) -> str:
    """Quality, k by layer and token class, and times, as text."""
    from adaptive_k_moe.calibration import bootstrap

    width = max(6, *(len(result.policy) for result in results))
    lines = [
        f"\n{'policy':<{width}}  {'avg k':>6}  {'experts saved':>13}  {'perplexity':>10}  {'change':>24}  "
        f"{'KL to full, nats':>26}  same top token"
    ]
    for result in results:
        scores = result.scores
        change, kl = bootstrap.perplexity_change(scores.nll, result.full.nll), bootstrap.mean(scores.kl)
        lines.append(
            f"{result.policy:<{width}}  {scores.avg_k:>6.3f}  {1 - scores.avg_k / result.full_k:>13.1%}  "
            f"{scores.perplexity:>10.3f}  {change.value:>+8.2%} ({change.low:+.2%} {change.high:+.2%})  "
            f"{kl.value:>8.5f} ({kl.low:.5f} {kl.high:.5f})  {scores.agreement.mean():>14.1%}"
        )
    layers = range(results[0].scores.k.shape[1])
    lines.append(f"\naverage k by layer\n{'policy':<{width}}  " + "  ".join(f"{layer:>5}" for layer in layers))
    lines += [
        f"{result.policy:<{width}}  " + "  ".join(f"{k:>5.2f}" for k in result.scores.k.mean(axis=0))
        for result in results
    ]
    classes = list(results[0].class_avg_k)
    lines.append(f"\naverage k by token class\n{'policy':<{width}}  " + "  ".join(f"{name:>11}" for name in classes))
    lines += [
        f"{result.policy:<{width}}  " + "  ".join(f"{result.class_avg_k[name]:>11.2f}" for name in classes)
        for result in results
    ]
    columns = [(timing.phase, timing.batch) for timing in results[0].timings]
    if columns:
        lines.append("\ntime against full (interval over rounds), and tokens/s")
        lines.append(f"{'policy':<{width}}  " + "  ".join(f"{f'{phase} x{batch}':>28}" for phase, batch in columns))
        for result in results:
            cells = [
                f"{t.ratio.value:.3f} ({t.ratio.low:.3f} {t.ratio.high:.3f}) {t.tokens_per_second:>7.0f}"
                for t in result.timings
            ]
            lines.append(f"{result.policy:<{width}}  " + "  ".join(f"{cell:>28}" for cell in cells))
    return "\n".join(lines)
