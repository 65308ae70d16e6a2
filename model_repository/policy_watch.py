# SPDX-License-Identifier: Apache-2.0
"""Notices that an engine's policies were changed on disk."""

from __future__ import annotations

from pathlib import Path


class PolicyWatch:
    """Watches the file in an engine directory that holds the policies, by its time stamp, size and inode."""

    def __init__(self, engine_dir: Path) -> None:
        self._path = engine_dir / "config.json"
        self._seen = self._stamp()

    def changed(self) -> bool:
        """Whether the file is another one than at the last call (or at the start); one `stat`."""
        stamp = self._stamp()
        if stamp is None or stamp == self._seen:
            return False
        self._seen = stamp
        return True

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:  # being replaced at this moment, or gone: what was read goes on being true
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
