# SPDX-License-Identifier: Apache-2.0
"""Processes that share out experts: how tests start them with torchrun, and what each does and tells."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from adaptive_k_moe.errors import AdaptiveKError
from adaptive_k_moe.torch import Adapted, adapt, load_expert_parallel
from adaptive_k_moe.torch.adapt import moe_blocks

Told = list[dict[str, Any]]
"""What was found, by rank."""


def torchrun(directory: Path, ranks: int, tasks: list[dict[str, Any]], device: str = "cpu") -> list[Told]:
    """What each rank told of each task."""
    (directory / "tasks.json").write_text(json.dumps(tasks))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    done = subprocess.run(
        [*command, __file__, str(directory), device],
        capture_output=True, text=True, timeout=400, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return [
        [torch.load(directory / f"{number}-{rank}.pt", weights_only=False, map_location="cpu") for rank in range(ranks)]
        for number in range(len(tasks))
    ]


def answers(model: Any, adapted: Adapted, policies: list[str], prompt: Any, new_tokens: int) -> dict[str, Any]:
    """By policy: the prompt's logits, tokens, and what each step decided."""
    found = {}
    for name in policies:
        adapted.policy_index = name
        with torch.no_grad():
            logits = model(prompt, use_cache=False).logits
        adapted.steps.clear()
        # With a cache, Nemotron's step of a single token forgets the limit of the step sizes.
        options = {"use_cache": "NemotronH" not in type(model).__name__, "eos_token_id": None, "pad_token_id": 0}
        tokens = model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, **options)
        adapted.check_agreement()
        found[name] = {
            "logits": logits,
            "tokens": tokens,
            "k": [step.k for step in adapted.steps],
            "entropy": [step.entropy for step in adapted.steps],
            "load": torch.stack([step.expert_load for step in adapted.steps]),
        }
    return found


def expert_bytes(model: Any) -> int:
    """What the experts' weights take in memory, whatever part of it is looked at."""
    weights = (weight for block in moe_blocks(model) for weight in block.experts.parameters())
    return sum(weight.untyped_storage().nbytes() for weight in weights)


def sentence_of(call: Any) -> str:
    """What a call is refused with."""
    try:
        call()
    except AdaptiveKError as error:
        return f"{type(error).__name__}: {error}"
    return "it was accepted"


def run(task: dict[str, Any], device: Any) -> dict[str, Any]:
    group, rank = dist.group.WORLD, dist.get_rank()
    dtype = getattr(torch, task.get("dtype", "float32"))
    prompt = torch.tensor(task["prompt"], device=device)
    checkpoint = Path(task["checkpoint"].format(rank=rank))
    try:
        if task["load"] == "whole":
            model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
        else:
            model = load_expert_parallel(checkpoint, group, dtype=dtype)
        model.to(device)
        told: dict[str, Any] = {"bytes before": expert_bytes(model)}
        adapted = adapt(model, task["policies"], history=None, expert_parallel_group=group)
    except AdaptiveKError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    told |= answers(model, adapted, task["names"], prompt, task["new_tokens"])
    told["bytes"] = expert_bytes(model)
    told["range"] = adapted.share.first, adapted.share.end
    if task.get("refusals"):
        with torch.no_grad():
            model(prompt.roll(rank, dims=1), use_cache=False)
        told["other tokens"] = sentence_of(adapted.check_agreement)
        adapted.remove()
        told["removed"] = sentence_of(lambda: model(prompt))
        told["without a group"] = sentence_of(lambda: adapt(model))
        with adapt(model, task["policies"], history=None, expert_parallel_group=group) as again:
            told["again"] = answers(model, again, task["names"][:1], prompt, 1)
    return told


def main() -> None:
    """Do every task of the directory's `tasks.json`; `NUMBER-RANK.pt` is what was found."""
    directory, device = Path(sys.argv[1]), torch.device(sys.argv[2])
    torch.set_num_threads(1)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    for number, task in enumerate(json.loads((directory / "tasks.json").read_text())):
        torch.save(run(task, device), directory / f"{number}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
