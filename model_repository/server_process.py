# SPDX-License-Identifier: Apache-2.0
"""The starter's end of a supervised server: one object for all its processes, its folder and its log."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from adaptive_k_moe.errors import ServerError
from adaptive_k_moe.model_repository import supervisor

_END_SECONDS = 15.0  # a supervisor's, to end and remove everything


class EndedProcess(NamedTuple):
    """A process of a model that has ended while its server still waits for it.

    Attributes:
        pid: what it was.
        status: as of `os.waitstatus_to_exitcode`; None where the system does not tell.
    """

    pid: int
    status: int | None


class ServerProcess:
    """The processes and the folder of one server; they end and go with this process, however it ends.

    Raises:
        ServerError: the supervisor does not run, or cannot make the folder.
    """

    def __init__(self) -> None:
        self.pid: int | None = None
        """The server's process, and the group of all its processes; None before `launch`."""
        self._link, theirs = socket.socketpair()
        with theirs:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", supervisor.__file__, str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C and a terminal that closes reach us only
            )
        self._messages = self._link.makefile("rb")
        try:
            self.directory = Path(self._hear()["directory"])
            """A folder for all files of the server."""
        except BaseException:
            self.stop(0.0)
            raise

    @property
    def log(self) -> IO[bytes]:
        """What the server writes; it ends when the last process has."""
        assert self._supervisor.stdout is not None
        return self._supervisor.stdout

    def launch(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the server in its folder.

        Args:
            command: program and arguments.
            environment: variables that differ from this process's.

        Raises:
            ServerError: the program cannot be run.
        """
        self._say(command=command, environment=dict(environment))
        self.pid = self._hear()["pid"]

    def status(self) -> int | None:
        """The status with which the server has ended on its own, negative for a signal; None while it runs.

        Raises:
            ServerError: the supervisor has been ended.
        """
        if not select.select([self._link], [], [], 0)[0]:
            return None
        status: int = self._hear()["status"]
        return status

    def ended_children(self) -> Iterator[EndedProcess]:
        """Processes that the server has started, that have ended, and that it has not noticed. Linux only."""
        for children in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it went meanwhile
                for child in children.read_text().split():
                    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                    if fields[0] == "Z":
                        # Linux shows the status to those who may look into the process, and else 0.
                        status = os.waitstatus_to_exitcode(int(fields[49]))
                        yield EndedProcess(int(child), status or None)

    def stop(self, drain_seconds: float) -> None:
        """End all processes and remove all that they leave.

        Args:
            drain_seconds: how long the server may take to let running requests end.
        """
        try:
            if drain_seconds:
                self._say(drain=drain_seconds)
            else:
                with contextlib.suppress(OSError):
                    self._link.shutdown(socket.SHUT_RDWR)  # closing it would not do where a fork holds it, too
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._supervisor.wait(drain_seconds + _END_SECONDS)
        finally:
            self._messages.close()
            self._link.close()
        if self._supervisor.returncode != 0:  # something ended it, so we do its work
            self._supervisor.kill()
            if self.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            self._supervisor.wait()
            supervisor.remove_leftovers()

    def _say(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # it has gone, which shows when we listen
            self._link.sendall(json.dumps(message).encode() + b"\n")

    def _hear(self) -> dict[str, Any]:
        line = self._messages.readline()
        if not line:
            status = self._supervisor.wait()
            raise ServerError(f"the supervisor of the Triton server has ended (status {status}): start it again.")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise ServerError(message["error"])
        return message
