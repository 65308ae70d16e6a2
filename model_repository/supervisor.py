# SPDX-License-Identifier: Apache-2.0
"""Owns the folder and the processes of one server, and removes them however its starter ends.

A program of its own, so that it outlives the starter: `python -I -S supervisor.py STARTER_PID`, with a Unix socket to
the starter as standard input and the server's log as standard output. Whatever ends the starter, SIGKILL too, closes
the socket. All that a server makes lies in a folder that is made here, so it is known from its first moment. Imports
only the standard library, to be there within milliseconds.

Messages are lines of JSON. To the starter: `{"directory": PATH}` once the folder is there; `{"pid": N}` of the server;
`{"error": SENTENCE}` where one of both cannot be had; `{"status": N}` once the server has ended on its own. From the
starter: `{"command": [...], "environment": {...}}`, once; `{"drain": SECONDS}` to let running requests end first.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_PREFIX = "adaptive_k_server_"
_SHARED_MEMORY = Path("/dev/shm")
# Triton hands paths in this folder to a shell, and a Unix socket's path holds 107 bytes, of which the names below the
# folder take 75 at most.
_USABLE_PATH = r"[\w/.,:+@-]{1,32}"
_POLL_SECONDS = 0.1
_REAP_SECONDS = 5.0


class ServerDirectory(NamedTuple):
    """A directory for all files of one server.

    Attributes:
        path: the directory, which only this user may enter.
        lock: a descriptor that the server's processes shall inherit: while one of them lives, or this process, nobody
            takes the directory for left over.
    """

    path: Path
    lock: int


def shared_memory_prefix(directory: Path) -> str:
    """What names of the shared memory begin with of the server whose folder this is."""
    return f"{directory.name}_"


@contextlib.contextmanager
def server_directory() -> Iterator[ServerDirectory]:
    """A new directory; it and the shared memory named after it are gone afterwards.

    What servers left that were killed together with their supervisors is gone, too.
    """
    remove_leftovers()
    directory = _make()
    try:
        yield directory
    finally:
        _remove(directory)
        os.close(directory.lock)


def remove_leftovers() -> None:
    """Remove the directories and shared memory of this user's servers that no process holds any more."""
    for path in _base().glob(f"{_PREFIX}*"):
        _remove_if_left(path)


def _base() -> Path:
    usual = tempfile.gettempdir()
    return Path(usual if re.fullmatch(_USABLE_PATH, usual, re.ASCII) else "/tmp")


def _make() -> ServerDirectory:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_base()))
        with contextlib.suppress(FileNotFoundError):  # another took it for left over before it was locked
            lock = os.open(path, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if path.exists():
                return ServerDirectory(path, lock)
            os.close(lock)


def _remove_if_left(path: Path) -> None:
    """Remove a directory of this user's, if no process holds it."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # gone, or another user's
        return
    try:
        if os.fstat(lock).st_uid != os.getuid():
            return
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a process lives
        return
    else:
        _remove(ServerDirectory(path, lock))
    finally:
        os.close(lock)


def _remove(directory: ServerDirectory) -> None:
    for region in _SHARED_MEMORY.glob(f"{shared_memory_prefix(directory.path)}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(directory.path, ignore_errors=True)


class _Starter:
    """The process that wants a server."""

    def __init__(self, link: socket.socket, pid: int) -> None:
        self._link = link
        self._pid = pid
        self._received = b""

    def tell(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # it has gone, which the next question shows
            self._link.sendall(json.dumps(message).encode() + b"\n")

    def ask(self, has_ended: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
        """Its next message; None if it has gone, or once `has_ended`."""
        while b"\n" not in self._received:
            # A process that the starter forked may hold the socket open, so that its end is not all that counts.
            if has_ended() or os.getppid() != self._pid:
                return None
            if select.select([self._link], [], [], _POLL_SECONDS)[0]:
                try:
                    received = self._link.recv(1 << 16)
                except OSError:
                    return None
                if not received:
                    return None
                self._received += received
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


def _supervise(starter: _Starter, directory: ServerDirectory) -> None:
    starter.tell(directory=str(directory.path))
    task = starter.ask()
    if task is None:
        return
    try:
        server = _launch(task["command"], task["environment"], directory)
    except OSError as error:
        starter.tell(error=f"cannot start {task['command'][0]}: {error.strerror}.")
        return
    try:
        starter.tell(pid=server.pid)
        if request := starter.ask(lambda: server.poll() is not None):
            _drain(server, request["drain"], starter)
        elif server.returncode is not None:
            starter.tell(status=server.returncode)
    finally:
        _end(server)


def _launch(command: list[str], environment: dict[str, str], directory: ServerDirectory) -> subprocess.Popen[bytes]:
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: None
    set_pdeathsig, set_child_subreaper = 1, 36
    prctl(set_child_subreaper, 1)  # the models' processes are ours once the server has gone
    supervisor = os.getpid()

    def end_with_supervisor() -> None:
        prctl(set_pdeathsig, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)

    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        cwd=directory.path,  # the backend's Python imports what lies there first, whatever it is
        stdin=subprocess.DEVNULL,
        pass_fds=(directory.lock,),
        start_new_session=True,  # its own group, so that all of it can be ended
        preexec_fn=end_with_supervisor,
    )


def _drain(server: subprocess.Popen[bytes], seconds: float, starter: _Starter) -> None:
    """Let running requests end: ask the server to stop, and wait until it has, or its models have.

    Triton ends its models' processes when the last answer is out and nobody is served any more. Itself it stays for up
    to two seconds longer, asleep.
    """
    deadline = time.monotonic() + seconds
    has_models = bool(_children(server.pid))
    server.terminate()

    def has_ended() -> bool:
        models_ended = has_models and not _children(server.pid)
        return server.poll() is not None or models_ended or time.monotonic() > deadline

    starter.ask(has_ended)


def _children(pid: int) -> list[str]:
    """The processes that this one's threads started; none where the kernel does not say."""
    found: list[str] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += children.read_text().split()
    return found


def _end(server: subprocess.Popen[bytes]) -> None:
    """End all processes of the server's group, and wait until they have."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    deadline = time.monotonic() + _REAP_SECONDS
    with contextlib.suppress(ChildProcessError):  # none is left
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.01)


def main() -> None:
    """Supervise one server for the process whose id is the first argument."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the starter decides; ignored ones would be so for the server, too
    with socket.socket(fileno=0) as link, contextlib.ExitStack() as stack:
        starter = _Starter(link, int(sys.argv[1]))
        try:
            directory = stack.enter_context(server_directory())
        except OSError as error:
            starter.tell(error=f"cannot make a folder for the server's files: {error.strerror}: set TMPDIR to another.")
        else:
            _supervise(starter, directory)


if __name__ == "__main__":
    main()
