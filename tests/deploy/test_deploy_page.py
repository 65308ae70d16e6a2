# SPDX-License-Identifier: Apache-2.0
"""docs/deploy.md: what can run without Docker and a GPU is run as it stands there; of the rest, each of our own
commands is at least one that the command line takes."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from container_image import REPOSITORY, as_in_the_image, free_ports

from adaptive_k_moe.cli import COMMANDS
from adaptive_k_moe.client import Client
from adaptive_k_moe.model_repository.installation import find_tritonserver
from adaptive_k_moe.model_repository.repository import write_model_repository

PAGE = (REPOSITORY / "docs" / "deploy.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
RUN = [block for block in BLOCKS if not block.startswith("# needs ")]
NOT_RUN = [block for block in BLOCKS if block.startswith("# needs ")]


def test_the_page_walks_from_checkpoint_to_answer(tmp_path: Path) -> None:
    """All blocks that need no more than this machine, as one shell script, in a folder of its own."""
    for name in ("examples", "docker"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    script = "\n".join(RUN)
    ports = dict(zip(("http", "grpc", "metrics"), free_ports(3), strict=True))
    for usual, port in zip((8000, 8001, 8002), ports.values(), strict=True):
        script = script.replace(f"localhost:{usual}", f"localhost:{port}")
    chosen = " ".join(f"--{name}_port {port}" for name, port in ports.items())
    script = script.replace("adaptive-k serve", f"adaptive-k serve {chosen}")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=as_in_the_image(HOME=str(tmp_path), OMP_NUM_THREADS="2"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"serving engine: grpc 127.0.0.1:{ports['grpc']}" in done.stdout
    assert "k=" in done.stdout  # the streamed answer, token by token
    assert "data: {" in done.stdout  # the same over HTTP
    assert re.search(r"^adaptive_k_requests_total\{.*\} [12]$", done.stdout, re.MULTILINE)
    assert "engine_dir" in done.stdout
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"ensemble", "tensorrt_llm_bls", "tensorrt_llm"}


def test_any_triton_serves_the_repository_that_was_written(engine_dir: Path, tmp_path: Path) -> None:
    """The page's own line, with the wheel's server put where NVIDIA's image has its own: on PATH."""
    (line,) = [block.splitlines()[1] for block in NOT_RUN if block.startswith("# needs Triton\n")]
    write_model_repository(tmp_path / "models", engine_dir, num_threads=1)
    installation = find_tritonserver()
    options, environment = installation.prepare(tmp_path)
    program = tmp_path / "bin" / "tritonserver"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {installation.program} {shlex.join(options)} "$@"\n')
    program.chmod(0o755)
    http, grpc, metrics = free_ports(3)
    ports = f"--http-port={http} --grpc-port={grpc} --metrics-port={metrics}"
    path = f"{environment.pop('PATH')}:{program.parent}"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            shlex.split(f"{line} {ports}"),
            executable=program,
            cwd=tmp_path,
            env=as_in_the_image(**environment, PATH=path),
            stdout=log,
            stderr=log,
        )
    try:
        with Client(f"127.0.0.1:{grpc}", timeout=60) as client:
            deadline = time.monotonic() + 180
            while not client.is_ready():
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.1)
            assert client.generate("import os", max_tokens=8).num_output_tokens == 8
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: block.splitlines()[1][:40])
def test_what_is_not_run_is_taken_by_the_command_line(block: str) -> None:
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "adaptive-k-moe" in words and words[:2] == ["docker", "run"]:
            _parse(words[words.index("adaptive-k-moe") + 1 :])
        if words[:1] == ["adaptive-k"]:
            _parse(words[1:])


def test_every_block_says_what_it_needs_or_is_run() -> None:
    assert len(RUN) >= 2
    assert len(BLOCKS) == PAGE.count("```sh")
    for block in RUN:
        assert "docker " not in block and "gpu" not in block.lower()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:docker|tests|benchmarks)/[\w./]+)`", PAGE))))
def test_files_that_are_named_are_there(path: str) -> None:
    assert (REPOSITORY / path).exists() or path.startswith("benchmarks/results/")


def _parse(words: list[str]) -> None:
    """Give the words to the command's own parser, which ends the process on one that it does not know."""
    name, *arguments = words or ["serve", "--engine_dir", "/engine"]
    parser = argparse.ArgumentParser(prog=name)
    importlib.import_module(COMMANDS[name].module).add_arguments(parser)
    parser.parse_args(arguments)
