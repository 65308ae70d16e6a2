# SPDX-License-Identifier: Apache-2.0
"""One real Triton server for all serving tests, over a copy of the engine whose policies may change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptive_k_moe.client import Client
from adaptive_k_moe.model_repository import TritonServer

# Below what max_seq_len leaves room for.
MAX_INPUT_LEN = 450


@pytest.fixture(scope="session")
def served_engine_dir(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "engine"
    shutil.copytree(engine_dir, directory)
    (directory / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
        "{% if enable_thinking %}[think]{% endif %}"
    )
    config = json.loads((directory / "config.json").read_text())
    config["build_config"]["max_input_len"] = MAX_INPUT_LEN
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def server(served_engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log_file = tmp_path_factory.mktemp("log") / "triton.log"
    with TritonServer(
        served_engine_dir, http_port=0, grpc_port=0, metrics_port=0, log_file=log_file, num_threads=2
    ) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=60) as client:
        yield client
