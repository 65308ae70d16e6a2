# SPDX-License-Identifier: Apache-2.0
"""Expert parallel: what each process reads in a decode step, and how even the experts' tokens lie, by policy.

    torchrun --nproc_per_node 2 benchmarks/expert_parallel.py [--checkpoint_dir DIR] [--policy FILE]
        [--policies full,decode_16] [--batch_size 16] [--new_tokens 16] [--device cuda] [--dtype bfloat16]

Every process loads its own experts alone and answers the same windows of a text (DIR/heldout.txt, or --text), with gloo
on CPUs and NCCL on GPUs. The first process prints a table and writes JSON (--output). Means
over decode steps and MoE layers:

    reads       experts whose weights the process reads
    tokens      rows that its experts run: tokens, each counted once an expert
    balance     the most rows of a process over the mean of all, in the same step and layer: 1 is even
    step ms     from one step's begin to the next, all-reduces and all else included; on shared cores it says nothing
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from adaptive_k_moe.torch import Adapted, adapt, load_expert_parallel
from adaptive_k_moe.torch.adapt import moe_blocks

from _results import write_results

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 64


@dataclass
class Row:
    """One policy."""

    policy: str
    avg_k: float
    reads: list[float]  # by process
    tokens: list[float]
    balance: float
    step_milliseconds: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_dir", type=Path, default=ROOT / "examples" / "models" / "olmoe-small")
    parser.add_argument("--policy", type=Path, default=ROOT / "examples" / "policies" / "olmoe-small.json")
    parser.add_argument("--policies", default="full,decode_16")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "expert_parallel.json")
    return parser.parse_args()


def windows(text: Path, checkpoint: Path, count: int) -> Any:
    """[count, WINDOW] token ids from all over a text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    starts = torch.linspace(0, len(tokens) - WINDOW, count).long()
    return torch.stack([tokens[start : start + WINDOW] for start in starts])


def measure(model: Any, adapted: Adapted, name: str, prompt: Any, new_tokens: int, edges: list[int]) -> Row:
    """Answers the prompts under a policy."""
    adapted.policy_index = name
    begins: list[float] = []
    timer = model.register_forward_pre_hook(lambda *_: begins.append(time.perf_counter()))
    adapted.steps.clear()
    model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    timer.remove()
    adapted.check_agreement()
    decode = list(adapted.steps)[1:]
    load = torch.stack([step.expert_load for step in decode]).cpu()  # [steps, L, E]
    parts = [load[..., first:end] for first, end in itertools.pairwise(edges)]
    rows = torch.stack([part.sum(-1) for part in parts]).double()  # [processes, steps, L]
    mean = rows.mean(0)
    return Row(
        name,
        float(torch.stack([step.k for step in decode]).double().mean()),
        [float((part > 0).sum(-1).double().mean()) for part in parts],
        [float(part.sum(-1).double().mean()) for part in parts],
        float((rows.max(0).values / mean)[mean > 0].mean()),
        1e3 * (begins[-1] - begins[1]) / (len(begins) - 2),
    )


def table(rows: list[Row], ranks: int) -> str:
    """Aligned columns."""
    heads = ["policy", "avg k", *(f"reads {rank}" for rank in range(ranks)), "all reads"]
    heads += [*(f"tokens {rank}" for rank in range(ranks)), "balance", "step ms"]
    lines = [heads]
    for row in rows:
        values = [row.avg_k, *row.reads, sum(row.reads), *row.tokens, row.balance, row.step_milliseconds]
        lines.append([row.policy, *(f"{value:.2f}" for value in values)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    """See the module."""
    asked = arguments()
    if asked.new_tokens < 3:
        raise SystemExit(
            "--new_tokens must be at least 3: the first step reads the prompts, and one step has no interval."
        )
    if "RANK" not in os.environ:
        raise SystemExit("start it with torchrun --nproc_per_node RANKS, which gives it its ranks.")
    dist.init_process_group("nccl" if asked.device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = (
        torch.device(asked.device, int(os.environ["LOCAL_RANK"])) if asked.device == "cuda" else torch.device("cpu")
    )
    if asked.device == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    group, dtype = dist.group.WORLD, getattr(torch, asked.dtype)
    model = load_expert_parallel(asked.checkpoint_dir, group, dtype=dtype).to(device)
    text = asked.text or asked.checkpoint_dir / "heldout.txt"
    prompt = windows(text, asked.checkpoint_dir, asked.batch_size).to(device)
    with adapt(model, asked.policy, history=None, expert_parallel_group=group) as adapted:
        experts, layers = adapted.config.num_experts, adapted.config.num_moe_layers
        edges = [experts * edge // ranks for edge in range(ranks + 1)]
        held = sum(weight.nbytes for block in moe_blocks(model) for weight in block.experts.parameters())
        rows = [measure(model, adapted, name, prompt, asked.new_tokens, edges) for name in asked.policies.split(",")]
    if rank == 0:
        width = adapted.config.moe.latent_size or adapted.config.hidden_size
        summed = layers * asked.batch_size * width * dtype.itemsize
        print(f"{asked.checkpoint_dir.name}, {ranks} x {asked.device}, {asked.dtype}, batch {asked.batch_size}")
        print(f"{experts} experts in {layers} layers; this process holds {edges[1]} of each, {held / 1e6:.1f} MB")
        print(f"all-reduces: {summed / 1e3:.1f} kB in a step")
        print(table(rows, ranks))
        content = {"processes": ranks, "device": asked.device, "dtype": asked.dtype, "batch_size": asked.batch_size}
        write_results(asked.output, {**content, "rows": [asdict(row) for row in rows]})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
