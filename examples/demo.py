# SPDX-License-Identifier: Apache-2.0
"""`make demo`: a checkpoint becomes an engine, a real Triton server streams from it, and the costs are shown.

Everything lies in `demo_output/`; the server listens on free loopback ports and is gone at the end.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from adaptive_k_moe.client import Client
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.errors import AdaptiveKError
from adaptive_k_moe.model_repository.server import TritonServer
from adaptive_k_moe.runtime import LLM
from adaptive_k_moe.runtime.perplexity import measure_policies
from adaptive_k_moe.signals import end_with_parent, unwinding_when_terminated

EXAMPLES = Path(__file__).resolve().parent
PROMPTS = [
    "And it came to pass in those days, that the king",
    "The following example shows how to open a file and",
]
STREAMED = ("full", "balanced")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mixtral-small", help="a checkpoint under examples/models")
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--max_tokens", type=int, default=40, help="tokens of each answer")
    parser.add_argument("--heldout_tokens", type=int, default=8192, help="held-out tokens for the perplexity")
    parser.add_argument("--end_with_parent", type=int, metavar="PID", help="end when this parent process does")
    args = parser.parse_args()
    try:
        with unwinding_when_terminated():
            if args.end_with_parent is not None:
                end_with_parent(args.end_with_parent)
            demo(args, Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120))
    except AdaptiveKError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def demo(args: argparse.Namespace, console: Console) -> None:
    checkpoint = EXAMPLES / "models" / args.model
    engine_dir = args.output_dir / "engine"
    console.rule("1. checkpoint to engine")
    shutil.rmtree(args.output_dir, ignore_errors=True)
    start = time.monotonic()
    config = build(
        checkpoint, engine_dir, policy=EXAMPLES / "policies" / f"{args.model}.json", dtype="float32", max_seq_len=512
    )
    model = config.pretrained_config
    console.print(
        f"{checkpoint.name}: {model.architecture}, {model.num_experts} experts, top-{model.num_experts_per_tok}, "
        f"{model.num_moe_layers} layers; engine in {time.monotonic() - start:.1f} s"
    )

    console.rule("2. a Triton server, and tokens streamed over gRPC, each with its k averaged over layers")
    log = args.output_dir / "tritonserver.log"
    with TritonServer(engine_dir, http_port=0, grpc_port=0, metrics_port=0, log_file=log) as server:
        console.print(f"tritonserver (pid {server.pid}) on {server.grpc_url}, log in {log}")
        with Client(server.grpc_url, timeout=120) as client:
            for prompt in PROMPTS:
                for policy in STREAMED:
                    stream_answer(console, client, prompt, policy, args.max_tokens)
    console.print("\nserver stopped")

    console.rule("3. what it saves and what it costs, on held-out text")
    table = measure(engine_dir, checkpoint / "heldout.txt", args.heldout_tokens)
    console.print(table)
    console.print(
        "experts saved is a count; time saved is the wall clock of the same run on this machine, reading the text in "
        "windows.\nA model this small spends much of its time outside the experts. balanced_static is balanced's plain "
        "opponent: a fixed k in each layer, the same average. Half of this text's windows were calibrated on: "
        "docs/results.md has the figures of the other half, with intervals."
    )


def stream_answer(console: Console, client: Client, prompt: str, policy: str, max_tokens: int) -> None:
    """Print an answer as it comes; behind each token stands the mean of its k over the layers."""
    console.print(f"\n[bold]{policy}[/bold]: {prompt}", end="")
    average = float("nan")
    chunks = client.generate(
        prompt, max_tokens=max_tokens, stream=True, adaptive_k_policy=policy, return_k=True, temperature=0.7, seed=7
    )
    for chunk in chunks:
        console.print(chunk.text, end="", markup=False)
        if chunk.k is not None and len(chunk.k):
            console.print("".join(f"⟨{k:.1f}⟩" for k in np.mean(chunk.k, axis=1)), end="", style="dim")
        average = chunk.avg_k
    console.print(f"\n  average k over prompt and answer: {average:.2f}", style="dim")


def measure(engine_dir: Path, heldout: Path, num_tokens: int) -> Table:
    """Perplexity, average k and time of every policy, beside `full`."""
    table = Table("policy", "average k", "experts saved", "time saved", "perplexity", "change")
    with LLM(engine_dir) as llm:
        token_ids = llm.tokenizer.encode(heldout.read_text(encoding="utf-8"))[:num_tokens]
        in_steps = llm.policies.step_policies
        names = [name for name in llm.policies.names if name not in in_steps]
        results = measure_policies(llm, token_ids, names, window=256)
    if in_steps:
        table.caption = f"{', '.join(in_steps)}: measured in decode steps, by adaptive-k eval"
    full = next(result for result in results if result.policy == "full")
    for result in results:
        table.add_row(
            result.policy,
            f"{result.avg_k:.2f}",
            f"{result.compute_saved_ratio:.1%}",
            f"{1 - result.seconds / full.seconds:.1%}",
            f"{result.perplexity:.2f}",
            f"{result.perplexity / full.perplexity - 1:+.1%}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
