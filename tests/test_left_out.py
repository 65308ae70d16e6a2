# SPDX-License-Identifier: Apache-2.0
"""A run's last lines say which tests were left out and what brings them in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.skip(reason="build/cuda/library.so is not built: make cuda")
def test_on_a_gpu(): ...

@pytest.mark.skip(reason="the CUDA library is not built: make cuda")
def test_of_the_library(): ...

@pytest.mark.parametrize("number", range(2))
def test_in_a_browser(number):
    pytest.skip("no Chromium: apt-get install chromium")

def test_that_nobody_thought_of():
    pytest.skip("the moon")

def test_that_runs(): ...
"""


def test_what_was_left_out_stands_before_the_closing_line(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", str(repository / "pyproject.toml"), "-q"]
    environment = {**os.environ, "PYTHONPATH": str(repository / "tests")}
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert last.startswith("1 passed, 5 skipped in")
    assert lines[-4:] == [
        "left out: 2 tests, for want of a browser: apt-get install chromium",
        "left out: 1 test, for want of an NVIDIA GPU: run them where one is (docs/deploy.md)",
        "left out: 1 test, for want of the CUDA library: make cuda, where a CUDA toolkit is",
        "left out: 1 test, for want of the moon",
    ]
