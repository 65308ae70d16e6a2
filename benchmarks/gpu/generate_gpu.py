# SPDX-License-Identifier: Apache-2.0
"""End to end on a GPU: prefill and decode tokens/s of a TensorRT engine by policy, and of `transformers` beside it.

    adaptive-k build --checkpoint_dir CHECKPOINT --target tensorrt --output_dir engine --policy POLICIES
    python benchmarks/gpu/generate_gpu.py --engine_dir engine [--checkpoint_dir CHECKPOINT] [--policies full,fast]

Each figure is the median of `--repeats`; engine and peer take turns. The peer runs where `--checkpoint_dir` is given
and torch has CUDA. Prints a table and writes benchmarks/results/generate_gpu.json. It runs an engine of any target, so
a CPU engine tries the script out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from generate import DECODE, PREFILL, PROMPT, Measure, engine_runner  # noqa: E402

from adaptive_k_moe.runtime import LLM  # noqa: E402

from _results import write_results  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine_dir", type=Path, required=True)
    parser.add_argument("--checkpoint_dir", type=Path, help="run transformers on it, too")
    parser.add_argument("--policies", help="comma-separated (default: all of the engine's)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="(default: 1, 8 and the engine's largest)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/generate_gpu.json")
    args = parser.parse_args()
    with LLM(args.engine_dir, skip_tokenizer_init=True) as llm:
        build = llm.config.build_config
        largest = build.max_batch_size
        batch_sizes = args.batch_sizes or sorted({1, min(8, largest), largest})
        if build.max_seq_len <= max(PREFILL, PROMPT + DECODE) or max(batch_sizes) > largest:
            parser.error(f"build the engine for more than {PREFILL} tokens and for {max(batch_sizes)} sequences.")
        policies = args.policies.split(",") if args.policies else llm.policies.names
        runners: dict[str, Measure] = {f"engine, {name}": engine_runner(llm, name, batch_sizes) for name in policies}
        if args.checkpoint_dir is not None:
            runners["transformers"] = transformers_runner(args.checkpoint_dir, batch_sizes)
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
        for runner in runners.values():
            for _ in range(2):  # a decode's second run is captured
                runner()
        for _ in range(args.repeats):
            for name, runner in runners.items():
                measured[name].append(runner())
    rows: list[dict[str, Any]] = [
        {"stack": name, **{key: statistics.median(result[key] for result in results) for key in results[0]}}
        for name, results in measured.items()
    ]
    columns = ["prefill", *(f"decode_{batch}" for batch in batch_sizes)]
    table = Table("stack", f"prefill {PREFILL}", *(f"decode, batch {batch}" for batch in batch_sizes))
    for row in rows:
        table.add_row(row["stack"], *(f"{row[column]:.1f} tok/s" for column in columns))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    write_results(args.output, {"gpu": gpu_name(), "target": build.target, "rows": rows})


def gpu_name() -> str:
    """The GPU's name, if there is one."""
    try:
        from cuda.bindings import runtime as cudart
    except ImportError:
        return "unknown"
    status, properties = cudart.cudaGetDeviceProperties(0)
    return "none" if int(status) else properties.name.decode().rstrip("\0")


def transformers_runner(checkpoint: Path, batch_sizes: list[int]) -> Measure:
    """The peer, in bfloat16 on the GPU, with its experts as grouped products."""
    import torch
    import transformers

    if not torch.cuda.is_available():
        raise SystemExit("torch has no CUDA here: leave out --checkpoint_dir.")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    )
    model = model.eval().to("cuda")

    @torch.no_grad()
    def measure() -> dict[str, float]:
        vocab = model.config.vocab_size

        def prompts(batch: int, length: int) -> Any:
            return torch.randint(3, vocab, (batch, length), device="cuda")

        def seconds(start: float) -> float:
            torch.cuda.synchronize()
            return time.perf_counter() - start

        ids = prompts(1, PREFILL)
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        found = {"prefill": PREFILL / seconds(start)}
        for batch in batch_sizes:
            output = model(prompts(batch, PROMPT), use_cache=True, logits_to_keep=1)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(DECODE):
                tokens = output.logits[:, -1:].argmax(-1)
                output = model(tokens, past_key_values=output.past_key_values, use_cache=True)
            found[f"decode_{batch}"] = batch * DECODE / seconds(start)
        return found

    return measure


if __name__ == "__main__":
    main()
