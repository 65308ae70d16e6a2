# SPDX-License-Identifier: Apache-2.0
"""Serving takes the engine's size, which processes share, and little beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adaptive_k_moe.engine_builder import build

from checkpoints import make_mixtral

# A prompt long enough for every expert to be read.
SERVE = """
import json, sys
from pathlib import Path
from adaptive_k_moe.runtime import LLM, KvCacheConfig, SamplingParams
with LLM(sys.argv[1], skip_tokenizer_init=True, kv_cache_config=KvCacheConfig(max_tokens=256)) as llm:
    llm.generate([list(range(3, 97))], SamplingParams(max_tokens=4, end_id=-1))
    print("ready", flush=True)
    sys.stdin.readline()  # until all processes are here
    figures = {}
    for name in ("status", "smaps_rollup"):
        for line in Path("/proc/self", name).read_text().splitlines():
            if line.endswith(" kB"):
                figures[line.split(":")[0]] = int(line.split()[1]) * 1024
    print(json.dumps(figures), flush=True)
    sys.stdin.readline()
"""


class Figures(NamedTuple):
    """Bytes of one of two processes that serve an engine."""

    peak: int
    private: int
    size: int


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Makes a checkpoint whose experts have so many neurons; one number of each weight is subnormal."""

    def make(intermediate_size: int) -> Path:
        directory = tmp_path_factory.mktemp("checkpoint")
        make_mixtral(directory, hidden_size=256, intermediate_size=intermediate_size, num_local_experts=24)
        for path in directory.glob("*.safetensors"):
            tensors = {name: tensor.astype(np.float32) for name, tensor in load_file(path).items()}
            for tensor in tensors.values():
                tensor.ravel()[5] = 1e-40
            save_file(tensors, path, {"format": "pt"})
        return directory

    made = {size: make(size) for size in (32, 2048)}
    return made.__getitem__


def serve_twice(engine: Path) -> Figures:
    command = [sys.executable, "-c", SERVE, str(engine)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(2)
    ]

    def line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline()

    def go_on(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.write("\n")

    assert [line(process) for process in processes] == ["ready\n"] * 2
    go_on(processes[0])
    figures = json.loads(line(processes[0]))
    for process in (processes[0], processes[1], processes[1]):
        go_on(process)
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    private = figures["Private_Clean"] + figures["Private_Dirty"]
    return Figures(figures["VmHWM"], private, sum(path.stat().st_size for path in engine.iterdir()))


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_experts_stay_in_the_file_and_are_shared(
    weights: str, checkpoint: Callable[[int], Path], tmp_path: Path
) -> None:
    """What a model takes beside its experts is measured with one that has next to none."""
    options: dict[str, Any] = {"weight_only_precision": weights} if weights.startswith("int") else {"dtype": weights}
    found = {}
    for size in (32, 2048):
        build(checkpoint(size), tmp_path / str(size), max_seq_len=128, **options)
        found[size] = serve_twice(tmp_path / str(size))
    small, large = found[32], found[2048]
    assert large.size - small.size > 20e6
    assert large.peak - small.peak <= 1.1 * (large.size - small.size)
    assert large.private - small.private <= 0.1 * (large.size - small.size)
