# SPDX-License-Identifier: Apache-2.0
"""The directory of one running server; and what is left of servers that were killed, which the next one removes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PREFIX = "adaptive_k_server_"
_SHARED_MEMORY = Path("/dev/shm")


class ServerDirectory(NamedTuple):
    """A directory for all files of one server.

    Attributes:
        path: the directory, which only this user may enter.
        lock: a descriptor that the server's processes shall inherit: while one of them lives, or this process, nobody
            takes the directory for left over.
    """

    path: Path
    lock: int

    @property
    def shared_memory_prefix(self) -> str:
        """What names of the server's shared memory begin with."""
        return f"{self.path.name}_"


@contextlib.contextmanager
def server_directory() -> Iterator[ServerDirectory]:
    """A new directory; it and the shared memory named after it are gone afterwards.

    What servers left that were killed together with their starters is gone, too.
    """
    _remove_leftovers()
    directory = _make()
    try:
        yield directory
    finally:
        _remove(directory)
        os.close(directory.lock)


def _make() -> ServerDirectory:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with contextlib.suppress(FileNotFoundError):  # another took it for left over before it was locked
            lock = os.open(path, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if path.exists():
                return ServerDirectory(path, lock)
            os.close(lock)


def _remove_leftovers() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        _remove_if_left(path)


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
    for region in _SHARED_MEMORY.glob(f"{directory.shared_memory_prefix}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(directory.path, ignore_errors=True)
