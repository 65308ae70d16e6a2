# SPDX-License-Identifier: Apache-2.0
"""What policies save in vLLM for CPUs: decode and prefill of a random MoE, plain and with the plugin (`make vllm`)."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "_peers"))

from worker import Column, Worker

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = [Column("decode", 1, 32, 24), Column("decode", 8, 32, 24), Column("prefill", 1, 512, 512)]
TOP_K = 8
MODEL = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
}
POLICIES: dict[str, Any] = {
    "plain": None,
    "full": {"kind": "fixed", "k": TOP_K},
    "half": {"kind": "fixed", "k": TOP_K // 2},
    # Half as well, but the kernels are given places for all: what a policy costs that may run the trained top-k.
    "half, at most all": {"kind": "top_p", "p": 1e-9, "k_min": TOP_K // 2},
}


def make_model(target: Path) -> Path:
    """A Qwen3-MoE in bfloat16, once."""
    if not (target / "config.json").exists():
        import torch
        import transformers

        torch.manual_seed(0)
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**MODEL)).bfloat16()
        model.save_pretrained(target, save_original_format=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--compiled", action="store_true", help="by torch.compile, as vLLM does it by default")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    folder = ROOT / "build" / "vllm-benchmark"
    checkpoint = make_model(folder / "model")
    settings = {
        "model": str(checkpoint),
        "dtype": "bfloat16",
        "eager": not arguments.compiled,
        "vocab_size": MODEL["vocab_size"],
    }
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[: arguments.threads])),
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    python = ROOT / "build" / "vllm" / "bin" / "python"
    workers = {}
    rates: dict[str, list[list[float]]] = {name: [[] for _ in COLUMNS] for name in arguments.variants}
    try:
        for name in arguments.variants:
            variables = dict(environment)
            if POLICIES[name]:
                policy = folder / f"{name}.json"
                policy.write_text(json.dumps({"default": "it", "policies": {"it": POLICIES[name]}}))
                variables["ADAPTIVE_K_POLICY"] = str(policy)
            workers[name] = Worker(python, "serve_vllm.py", settings, folder / f"{name}.log", environment=variables)
        for index, column in enumerate(COLUMNS):
            for _ in range(arguments.rounds):
                for name, worker in workers.items():
                    rates[name][index].append(worker.measure(column))
    finally:
        for worker in workers.values():
            worker.close()
    titles = [f"{column.kind} {column.batch if column.kind == 'decode' else column.tokens}" for column in COLUMNS]
    print(f"| tokens/s | {' | '.join(titles)} |\n| --- |{' --- |' * len(titles)}")
    for name in arguments.variants:
        print(f"| {name} | {' | '.join(f'{statistics.median(rate):.4g}' for rate in rates[name])} |")
    if arguments.output:
        arguments.output.write_text(json.dumps({"columns": titles, "rates": rates}, indent=1))


if __name__ == "__main__":
    main()
