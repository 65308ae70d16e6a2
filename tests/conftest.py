# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: the bundled model's checkpoint and its engine, built once; what was left out, in the
last lines of a run."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Peers and engines share two cores; more threads than cores make everything slower.
if "PYTEST_XDIST_WORKER" in os.environ:  # which shares them with another
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

with contextlib.suppress(ImportError):  # a machine for tests/gpu may do without
    import hypothesis

    # How long it takes to draw a case, or to run it, says only how busy the machine is.
    hypothesis.settings.register_profile(
        "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("patient")

from checkpoints import MIXTRAL_SMALL, REPOSITORY

if TYPE_CHECKING:
    from adaptive_k_moe.engine_config import Target

POLICIES = {
    "unit": "nats",
    "default": "full",
    "policies": {
        "balanced": {"kind": "entropy", "thresholds": [1.2], "k": [1, 2]},
        "top1": {"kind": "fixed", "k": 1},
        "mass": {"kind": "top_p", "p": 0.6, "k_min": 1},
        "relative": {"kind": "ratio", "ratio": 0.5},
    },
}


# What skipped tests lack and what brings them in, by words of their reasons.
LEFT_OUT = (
    (r"Prometheus|promtool|prometheus", "Prometheus: make prometheus, on Debian or Ubuntu"),
    (r"Chromium", "a browser: apt-get install chromium"),
    (r"\bGPU\b|NVIDIA driver", "an NVIDIA GPU: run them where one is (docs/deploy.md)"),
    (r"make cuda|CUTLASS|cuobjdump|nvcc", "the CUDA library: make cuda, where a CUDA toolkit is"),
    (r"make arm", "the kernels for ARM and an emulator: make arm, on Debian or Ubuntu"),
    (r"tensorrt_rtx", "TensorRT for RTX: x86-64, and a Python that its wheels are for"),
    (r"TensorRT|NvInfer", "TensorRT: TENSORRT_ROOT=... make cuda, and its Python package (docs/tensorrt_plugin.md)"),
    (r"Triton is not installed", "Triton's compiler, which comes with torch for CUDA: pip install triton"),
    (r"litellm", "LiteLLM: make litellm"),
    (r"make vllm", "vLLM: make vllm"),
    (r"torch|transformers", "torch and transformers: pip install '.[training]'"),
    (r"this machine has", "other instructions than this processor's: run them on another"),
    (r"openssl", "openssl: apt-get install openssl"),
    (r"curl", "curl: apt-get install curl"),
)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """What was left out, behind all else but pytest's closing line."""
    yield
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("skipped"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = "a GPU" if "gpu" in getattr(report, "keywords", ()) else reason.removeprefix("Skipped: ")
        counts[next((way for words, way in LEFT_OUT if re.search(words, reason)), reason)] += 1
    for way, count in sorted(counts.items()):
        terminalreporter.write_line(f"left out: {count} {'test' if count == 1 else 'tests'}, for want of {way}")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def checkpoint_dir() -> Path:
    """The bundled trained Mixtral."""
    return MIXTRAL_SMALL


@pytest.fixture(scope="session")
def engine_dir(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of the bundled model with one policy of each kind; tests must not change it."""
    return _engine(checkpoint_dir, tmp_path_factory, "openvino")


@pytest.fixture(scope="session")
def torch_engine_dir(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for torch; what `engine_dir` computes, in the same precision."""
    return _engine(checkpoint_dir, tmp_path_factory, "torch")


def _engine(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory, target: Target) -> Path:
    from adaptive_k_moe.engine_builder import build
    from adaptive_k_moe.policy import PolicySet

    directory = tmp_path_factory.mktemp("engines") / "mixtral-small"
    policies = PolicySet.model_validate(POLICIES)
    build(
        checkpoint_dir,
        directory,
        target=target,
        policy=policies,
        max_batch_size=16,
        max_seq_len=512,
        dtype="float32",
    )
    return directory
