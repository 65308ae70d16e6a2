# SPDX-License-Identifier: Apache-2.0
"""Programs with a limit of time, ended with everything that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_running: set[int] = set()  # process groups


@dataclass
class Ended:
    """How a program ended."""

    error: str | None
    """A sentence, or None for status 0."""
    output: str
    seconds: float


def run(command: list[str], limit: float, log: Path, env: dict[str, str] | None = None) -> Ended:
    """Runs a program whose output goes to the end of `log`.

    Args:
        limit: seconds until it is killed.
        env: what differs from this process's environment.
    """
    began = time.monotonic()
    with log.open("ab") as out:
        out.write(f"\n$ {' '.join(command)}\n".encode())
        out.flush()
        start = out.tell()
        program = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
    _running.add(program.pid)
    error = None
    try:
        status = program.wait(max(limit, 0))
        if status < 0:
            error = f"ended by {signal.Signals(-status).name}"
        elif status > 0:
            error = f"ended with status {status}"
    except subprocess.TimeoutExpired:
        error = f"killed after its limit of {limit:.0f} s"
    finally:
        kill(program.pid)  # what it started, also when it ended by itself
        _running.discard(program.pid)
        try:
            program.wait(5)
        except subprocess.TimeoutExpired:  # not even SIGKILL ends a process that waits inside the driver
            error = f"{error}, and could not be killed"
    with log.open("rb") as written:
        written.seek(start)
        output = written.read().decode(errors="replace")
    return Ended(error, output, time.monotonic() - began)


def kill(group: int) -> None:
    """Ends a process group, if there is still one."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def kill_all() -> None:
    """Ends everything that run() waits for."""
    for group in list(_running):
        kill(group)
