# SPDX-License-Identifier: Apache-2.0
"""How commands end: with their parent, where they are told to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from waiting import eventually

CHILD = """
import os, sys, time
from adaptive_k_moe.signals import end_with_parent
end_with_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(600)
"""


def _lives(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_a_process_ends_with_its_parent_however_that_ends() -> None:
    line = f"{sys.executable} -P -c '{CHILD}' $$; true"  # the shell stays, as make does
    with subprocess.Popen(["sh", "-c", line], stdout=subprocess.PIPE, text=True) as shell:
        child = int(shell.stdout.readline())
        assert _lives(child)
        shell.send_signal(signal.SIGKILL)
        assert eventually(lambda: not _lives(child))


def test_a_process_whose_parent_has_ended_before_ends() -> None:
    assert os.getpid() != 1
    done = subprocess.run([sys.executable, "-P", "-c", CHILD, "1"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")
