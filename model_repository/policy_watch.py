# SPDX-License-Identifier: Apache-2.0
"""Notices that an engine's policies were changed on disk."""

from __future__ import annotations

from pathlib import Path


class PolicyWatch:
    """Watches the file in an engine directory that holds the policies, by its time stamp, size and inode."""

    def __init__(self, engine_dir: Path) -> None:
        self._path = engine_dir / "config.json"
        self._found = self._accepted = self._stamp()
        self._refused: tuple[int, int, int] | None = None

    def changed(self) -> bool:
        """Whether the file is another one than the one last `accept`ed; one `stat`."""
        self._found = self._stamp()
        return self._found is not None and self._found != self._accepted

    def accept(self) -> None:
        """What `changed` found has been taken over."""
        self._accepted = self._found

    def first_refusal(self) -> bool:
        """What `changed` found could not be taken over; whether that is new, and worth a line in the log."""
        first = self._found != self._refused
        self._refused = self._found
        return first

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:  # being replaced at this moment, or gone: what was read goes on being true
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
