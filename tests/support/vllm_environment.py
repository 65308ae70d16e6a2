# SPDX-License-Identifier: Apache-2.0
"""vLLM's environment, programs in it, and models that both it and our engine run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from checkpoints import REPOSITORY, SUPPORT

PYTHON = REPOSITORY / "build" / "vllm" / "bin" / "python"
PROCESSOR = "adaptive_k_moe.vllm.requests:RequestPolicy"


def missing() -> str:
    """What is not here; with ADAPTIVE_K_REQUIRE_VLLM set that is an error."""
    reason = ""
    if not PYTHON.is_file():
        reason = "vLLM is not here: run `make vllm`"
    else:
        installed = list((PYTHON.parents[1] / "lib").glob("python3*/site-packages/adaptive_k_moe/vllm"))
        if not installed or _sources(installed[0]) != _sources(REPOSITORY / "torch_binding" / "vllm"):
            reason = "beside vLLM is another version of this package: run `make vllm`"
    if reason and os.environ.get("ADAPTIVE_K_REQUIRE_VLLM"):
        pytest.fail(reason)
    return reason


def _sources(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.py")}


class Vllm:
    """Engines of vLLM, each in a process of its own (`vllm_process.py`).

    Args:
        cache: where vLLM keeps what it compiles.
    """

    def __init__(self, cache: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "ADAPTIVE_K_"))}
        self.environment = {
            **kept,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # One thread: on a busy machine, bound ones would wait for each other in loops.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_CACHE_ROOT": str(cache),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, checkpoint: Path, rounds: list[Any], policy: Path | None = None, **engine: Any) -> dict[str, Any]:
        """What the rounds of requests gave."""
        ran = self._run(checkpoint, rounds, policy, engine)
        assert ran.returncode == 0, ran.stderr[-8000:]
        answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        return answer

    def refusal(self, checkpoint: Path, policy: Path, **engine: Any) -> str:
        """What vLLM says where it does not start, or not take its first step."""
        ran = self._run(checkpoint, [[{"prompt": [5, 6, 7], "tokens": 1, "policy": None}]], policy, engine)
        assert ran.returncode != 0
        return ran.stderr

    def _run(
        self, checkpoint: Path, rounds: list[Any], policy: Path | None, engine: dict[str, Any]
    ) -> subprocess.CompletedProcess[str]:
        usual = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "enforce_eager": True}
        order = json.dumps({"engine": {"model": str(checkpoint), **usual, **engine}, "rounds": rounds})
        return subprocess.run(
            [PYTHON, SUPPORT / "vllm_process.py", order],
            env=self.environment | ({"ADAPTIVE_K_POLICY": str(policy)} if policy else {}),
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )


def untied(checkpoint: Path, target: Path) -> Path:
    """A copy whose head is its own: vLLM's models of these families have none that is the embedding."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: value for file in checkpoint.glob("*.safetensors") for name, value in load_file(file).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return target
