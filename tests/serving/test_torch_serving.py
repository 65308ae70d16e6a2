# SPDX-License-Identifier: Apache-2.0
"""An engine of the target torch behind a real Triton server: the answers are those of the openvino target's engine."""

from __future__ import annotations

import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from adaptive_k_moe.client import Client
from adaptive_k_moe.errors import ServerError
from adaptive_k_moe.model_repository import TritonServer
from adaptive_k_moe.runtime import LLM, SamplingParams

PROMPTS = ["And it came to pass", "The king said", "In those days there", "x", "He said unto them, go"]
PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0, "num_threads": 2}


def test_answers_are_those_of_the_other_target(torch_engine_dir: Path, engine_dir: Path, tmp_path: Path) -> None:
    """All at a time, each under a policy of its own; the engine's metrics come from this session, too."""
    options = [
        {"max_tokens": 16 + index, "end_id": -1, "adaptive_k_policy": ("full", "balanced", "top1")[index % 3]}
        for index in range(len(PROMPTS))
    ]
    with LLM(engine_dir, num_threads=2) as llm:
        expected = [
            llm.generate(prompt, SamplingParams(**each)).outputs[0]  # type: ignore[arg-type]
            for prompt, each in zip(PROMPTS, options, strict=True)
        ]
    server = TritonServer(torch_engine_dir, log_file=tmp_path / "log", kv_cache_max_tokens=96, device="cpu", **PORTS)
    with server, Client(server.grpc_url, timeout=120) as client, ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda each: client.generate(each[0], **each[1]), zip(PROMPTS, options, strict=True)))
        with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=60) as answer:
            metrics = answer.read().decode().splitlines()
    for found, output in zip(answers, expected, strict=True):
        assert found.text == output.text
        np.testing.assert_array_equal(found.k, output.k)
    assert [line.split()[-1] for line in metrics if line.startswith("adaptive_k_kv_blocks{")] == ["6"]


def test_a_device_that_is_not_there_ends_the_start(torch_engine_dir: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ServerError, match="torch finds no GPU for --device cuda"):
        TritonServer(torch_engine_dir, device="cuda", **PORTS).__enter__()
