# SPDX-License-Identifier: Apache-2.0
"""End to end: prefill and decode tokens/s of an engine and of `transformers`, same checkpoint, same run.

    python benchmarks/generate.py --checkpoint_dir examples/models/mixtral-small
    python benchmarks/generate.py --random            # a Mixtral of 791 M parameters whose experts dominate

Every figure is the median of `--repeats`; engine and peer take turns, so a slow minute of a shared machine
falls on both. "of roofline" is decode at batch 1 against the bytes that a token reads over the bandwidth
measured in the same run. int8 and int4 weights (of a bfloat16 engine) have no peer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.model_config import PretrainedConfig
from adaptive_k_moe.policy import PolicySet
from adaptive_k_moe.runtime import LLM, SamplingParams

from _results import cpu_name, write_results
from _roofline import BITS, read_bandwidth

PREFILL, PROMPT, DECODE = 512, 128, 32

Measure = Callable[[], dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint_dir", type=Path)
    source.add_argument("--random", action="store_true", help="make a random Mixtral of 791 M parameters")
    parser.add_argument("--dtype", choices=BITS, nargs="+", default=list(BITS), help="of the weights; default: all")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num_threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/generate.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = args.checkpoint_dir or random_checkpoint(Path(scratch) / "mixtral-random")
        run(args, checkpoint, Path(scratch))


def random_checkpoint(directory: Path) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        sliding_window=None,
    )
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def run(args: argparse.Namespace, checkpoint: Path, scratch: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    bandwidth = read_bandwidth(args.num_threads)
    console.print(f"{args.num_threads} threads, read bandwidth {bandwidth / 1e9:.1f} GB/s, {cpu_name()}")
    rows = []
    for dtype in args.dtype:
        integers = dtype.startswith("int")
        peers = {} if integers else {"transformers (fixed top-k)": transformers_runner(checkpoint, dtype, args)}
        directory = scratch / f"engine-{dtype}"
        half = {"policies": {"half": {"kind": "fixed", "k": 1}}}
        config = build(
            checkpoint,
            directory,
            dtype="bfloat16" if integers else dtype,
            weight_only_precision=dtype if integers else None,
            policy=PolicySet.model_validate(half),
            max_seq_len=1024,
        )
        model = config.pretrained_config
        with LLM(directory, skip_tokenizer_init=True, num_threads=args.num_threads) as llm:
            runners: dict[str, Measure] = {
                **peers,
                "engine, policy full": engine_runner(llm, "full", args.batch_sizes),
                "engine, k = 1": engine_runner(llm, "half", args.batch_sizes),
            }
            measured: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
            for runner in runners.values():
                runner()
            for _ in range(args.repeats):
                for name, runner in runners.items():
                    measured[name].append(runner())
        for name, results in measured.items():
            row: dict[str, Any] = {"dtype": dtype, "stack": name}
            row.update({key: statistics.median(r[key] for r in results) for key in results[0]})
            if name.startswith("engine"):
                k = 1 if name.endswith("1") else model.num_experts_per_tok
                row["bytes_per_token"] = bytes_per_token(model, dtype, k)
                row["of_roofline"] = row["decode_1"] * row["bytes_per_token"] / bandwidth
            rows.append(row)
    print_table(console, rows, args.batch_sizes)
    write_results(args.output, {"threads": args.num_threads, "read_bandwidth": bandwidth, "rows": rows})


def engine_runner(llm: LLM, policy: str, batch_sizes: list[int]) -> Measure:
    rng = np.random.default_rng(0)
    vocab = llm.config.pretrained_config.vocab_size

    def prompts(count: int, length: int) -> list[list[int]]:
        return [rng.integers(3, vocab, length).tolist() for _ in range(count)]

    def measure() -> dict[str, float]:
        one = SamplingParams(max_tokens=1, end_id=-1, adaptive_k_policy=policy)
        metrics = llm.generate(prompts(1, PREFILL), one)[0].metrics
        assert metrics.first_token_time is not None and metrics.first_scheduled_time is not None
        found = {"prefill": PREFILL / (metrics.first_token_time - metrics.first_scheduled_time)}
        many = SamplingParams(max_tokens=DECODE + 1, end_id=-1, adaptive_k_policy=policy)
        for batch in batch_sizes:
            outputs = llm.generate(prompts(batch, PROMPT), many)
            # From the moment that all have their first token, so that no prefill is in the time.
            begin = max(o.metrics.first_token_time or 0.0 for o in outputs)
            end = max(o.metrics.last_token_time or 0.0 for o in outputs)
            found[f"decode_{batch}"] = batch * DECODE / (end - begin)
        return found

    return measure


def transformers_runner(checkpoint: Path, dtype: str, args: argparse.Namespace) -> Measure:
    """The peer with whichever of its experts implementations decodes fastest here."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.num_threads)

    def runner(implementation: str) -> Measure:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), experts_implementation=implementation
        ).eval()

        @torch.no_grad()
        def measure() -> dict[str, float]:
            vocab = model.config.vocab_size
            ids = torch.randint(3, vocab, (1, PREFILL))
            start = time.perf_counter()
            model(ids, use_cache=True, logits_to_keep=1)
            found = {"prefill": PREFILL / (time.perf_counter() - start)}
            for batch in args.batch_sizes:
                output = model(torch.randint(3, vocab, (batch, PROMPT)), use_cache=True, logits_to_keep=1)
                start = time.perf_counter()
                for _ in range(DECODE):
                    tokens = output.logits[:, -1:].argmax(-1)
                    output = model(tokens, past_key_values=output.past_key_values, use_cache=True)
                found[f"decode_{batch}"] = batch * DECODE / (time.perf_counter() - start)
            return found

        return measure

    best: tuple[float, str] = (0.0, "")
    # batched_mm gathers each token's weights: at 512 tokens of this size it asks for more memory than there is.
    for implementation in ("eager", "grouped_mm"):
        candidate = runner(implementation)
        candidate()
        best = max(best, (candidate()["decode_1"], implementation))
    print(f"{dtype}: transformers' fastest experts are {best[1]}")
    return runner(best[1])


def bytes_per_token(model: PretrainedConfig, dtype: str, k: int) -> float:
    """Weight bytes that decoding one token reads: chosen experts, attention, head; not the cache.

    The experts have the engine's dtype; OpenVINO keeps the other matrices as float32, unless they are integers.
    Scales are float32.
    """
    quantization = model.quantization
    expert_bits: float = BITS[dtype]
    if quantization is not None and quantization.group_size is not None:
        expert_bits += 32 / quantization.group_size
    attention_bits = 32 if quantization is None else expert_bits
    moe, hidden = model.moe, model.hidden_size
    gated = 3 if moe.activation in ("swiglu", "geglu") else 2
    experts = k * gated * hidden * moe.intermediate_size * expert_bits / 8
    heads = model.num_attention_heads + model.num_key_value_heads
    attention = 2 * hidden * model.head_dim * heads * attention_bits / 8
    router = moe.num_experts * hidden * 4
    return model.num_hidden_layers * (experts + attention + router) + model.vocab_size * hidden * 4


def print_table(console: Console, rows: list[dict[str, Any]], batch_sizes: list[int]) -> None:
    table = Table("weights", "stack", f"prefill {PREFILL}", *(f"decode, batch {b}" for b in batch_sizes), "of roofline")
    for row in rows:
        figures = [row["prefill"], *(row[f"decode_{batch}"] for batch in batch_sizes)]
        share = f"{row['of_roofline']:.0%}" if "of_roofline" in row else ""
        table.add_row(row["dtype"], row["stack"], *(f"{figure:.1f} tok/s" for figure in figures), share)
    console.print(table)


if __name__ == "__main__":
    main()
