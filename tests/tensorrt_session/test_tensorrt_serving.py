# SPDX-License-Identifier: Apache-2.0
"""A real Triton server over an engine of the target "tensorrt": the same path as on a CPU, down to the fake GPU."""

from __future__ import annotations

import shutil
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gpu_engines import make_engine

from adaptive_k_moe.cli import main
from adaptive_k_moe.client import Client
from adaptive_k_moe.engine_config import read_engine_config
from adaptive_k_moe.errors import ClientError
from adaptive_k_moe.model_repository import TritonServer
from adaptive_k_moe.runtime import LLM, SamplingParams

from checkpoints import SUPPORT

PROMPTS = ["And it came to pass", "The king", "In those days there", "import os", "x", "He said unto them, go"]


@pytest.fixture(scope="module")
def gpu_engine(checkpoint_dir: Path, engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "engine"
    policies = read_engine_config(engine_dir).adaptive_k.to_json()
    make_engine(checkpoint_dir, directory, policies=policies, max_batch_size=3, max_seq_len=128, max_num_tokens=32)
    return directory


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failures")


@pytest.fixture(scope="module")
def server(gpu_engine: Path, failures: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    models = tmp_path_factory.mktemp("models")
    # What lies beside a model is on its path.
    (models / "ensemble" / "1").mkdir(parents=True)
    beside = models / "ensemble" / "1"
    shutil.copy(SUPPORT / "fake_tensorrt_of_a_process.py", beside / "tensorrt.py")
    for name in ("fake_gpu.py", "fake_tensorrt.py"):
        shutil.copy(SUPPORT / name, beside)
    options = {"http_port": 0, "grpc_port": 0, "metrics_port": 0, "kv_cache_max_tokens": 2 * 128}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_GPU_FAILURES", str(failures))
        with TritonServer(gpu_engine, model_repository=models, log_file=models / "log", **options) as found:
            yield found


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=60) as found:
        yield found


def test_answers_are_those_of_the_cpu_engine(server: TritonServer, client: Client, engine_dir: Path) -> None:
    """More at a time than there are slots, each under a policy of its own."""
    policies = ["full", "balanced", "top1"]
    cases = [(prompt, policies[index % 3]) for index, prompt in enumerate(PROMPTS)]
    with LLM(engine_dir) as llm:
        expected = [
            llm.generate(prompt, SamplingParams(max_tokens=24, adaptive_k_policy=policy, end_id=-1))
            for prompt, policy in cases
        ]
    with ThreadPoolExecutor(len(cases)) as pool:
        found = list(
            pool.map(lambda case: client.generate(case[0], adaptive_k_policy=case[1], max_tokens=24, end_id=-1), cases)
        )
    for one, other in zip(found, expected, strict=True):
        assert one.text == other.outputs[0].text
        assert one.avg_k == pytest.approx(other.avg_k)
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    blocks = [float(line.split()[-1]) for line in lines if line.startswith("adaptive_k_kv_blocks{")]
    assert blocks == [2.0]


def test_a_failing_gpu_ends_the_request_and_not_the_server(client: Client, failures: Path) -> None:
    before = client.generate(PROMPTS[0], max_tokens=8, end_id=-1).text
    (failures / "cudaMemcpyAsync").touch()
    with pytest.raises(ClientError, match="the GPU failed in cudaMemcpyAsync"):
        client.generate(PROMPTS[0], max_tokens=8, end_id=-1)
    assert client.generate(PROMPTS[0], max_tokens=8, end_id=-1).text == before


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_without_tensorrt_a_command_says_what_it_needs(
    gpu_engine: Path, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    ports = ["--http_port", "0", "--grpc_port", "0", "--metrics_port", "0"]
    arguments = {"serve": ports, "generate": ["--prompt", "x"]}[command]
    assert main([command, "--engine_dir", str(gpu_engine), *arguments]) != 0
    sentence = capfd.readouterr().err.strip().splitlines()[-1]
    assert "running a TensorRT engine needs an NVIDIA GPU and TensorRT's Python package" in sentence
    assert "an engine built with --target openvino runs without a GPU" in sentence
