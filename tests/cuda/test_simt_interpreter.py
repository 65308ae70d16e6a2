# SPDX-License-Identifier: Apache-2.0
"""The interpreter that the kernel tests stand on: it computes what CUDA would, and objects to what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_build import ROOT, build
from cuda_launcher import Interpreter

from checkpoints import SUPPORT

CHECKS = {
    "exchange": "ok",
    "exchange_without_barrier": "wrong with seed",
    "shuffles": "ok",
    "counts": "ok",
    "async_copy": "ok",
    "async_copy_too_early": "wrong with seed",
    "abandoned_copy": "nobody waited for",
    "divergent_barrier": "divergent barriers",
    "early_exit": "while other threads have ended",
    "not_in_mask": "not in its mask",
    "missing_lane": "which has ended",
    "lane_at_barrier": "for lanes that never come",
    "different_masks": "another mask",
    "outside_source": "reads a lane that is not in its mask",
    "mixed_operations": "meets",
    "misaligned": "misaligned vector access",
    "too_much_shared": "bytes of shared memory",
    "too_many_threads": "that no GPU takes",
}


@pytest.mark.parametrize("name", CHECKS)
def test_interpreter_tells_right_from_wrong(interpreter: Interpreter, name: str) -> None:
    done = subprocess.run([ROOT / "build" / "simt" / "simt_check", name], capture_output=True, text=True, check=True)
    assert CHECKS[name] in done.stdout


@pytest.fixture(scope="session")
def sanitized() -> Path:
    """The same library watched by AddressSanitizer and UBSan."""
    directory = ROOT / "build" / "simt-sanitized"
    build(ROOT / "plugin" / "testing" / "simt", directory, "-DCMAKE_BUILD_TYPE=Release", "-DADAPTIVE_K_SANITIZE=ON")
    return directory


def environment() -> dict[str, str]:
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def test_sanitizers_see_an_access_past_shared_memory(sanitized: Path) -> None:
    done = subprocess.run([sanitized / "simt_check", "past_shared"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr


def test_kernels_are_clean_under_sanitizers(sanitized: Path) -> None:
    """Every kernel and path once, in a process of its own, on arrays that end where the allocation ends."""
    script = SUPPORT / "sanitized_run.py"
    done = subprocess.run(
        [sys.executable, script, sanitized / "libadaptive_k_simt.so"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.strip().endswith("clean")
