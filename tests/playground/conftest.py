# SPDX-License-Identifier: Apache-2.0
"""A real Triton server whose model writes HTML and control characters, and the playground's own server before it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playground_process import HOSTILE, playground

from adaptive_k_moe.model_repository import TritonServer

POLICIES = {
    "default": "balanced",
    "policies": {"balanced": {"kind": "entropy", "thresholds": [1.2], "k": [1, 2]}, "top1": {"kind": "fixed", "k": 1}},
}


@pytest.fixture(scope="session")
def hostile_engine_dir(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of the bundled model whose tokenizer decodes " the" to `HOSTILE`."""
    from adaptive_k_moe.engine_builder import build
    from adaptive_k_moe.policy import PolicySet

    directory = tmp_path_factory.mktemp("hostile")
    checkpoint = directory / "checkpoint"
    shutil.copytree(checkpoint_dir, checkpoint)
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    swap = {"type": "Replace", "pattern": {"String": "\u0120the"}, "content": HOSTILE}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [swap, tokenizer["decoder"]]}
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    (checkpoint / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }} And")
    engine = directory / "engine"
    build(checkpoint, engine, policy=PolicySet.model_validate(POLICIES), max_batch_size=8, max_seq_len=1024)
    return engine


@pytest.fixture(scope="session")
def server(hostile_engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log_file = tmp_path_factory.mktemp("log") / "triton.log"
    with TritonServer(
        hostile_engine_dir, http_port=0, grpc_port=0, metrics_port=0, log_file=log_file, num_threads=1
    ) as server:
        yield server


@pytest.fixture(scope="session")
def page(server: TritonServer) -> Iterator[str]:
    with playground(server.grpc_url, server.metrics_url) as address:
        yield address
