# SPDX-License-Identifier: Apache-2.0
"""Where the models of one server meet."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# A Unix socket's path holds 107 bytes at most; the name in the directory takes some.
_LONGEST_DIRECTORY = 90


def socket_directory(server_pid: int, temporary: Path | None = None) -> Path:
    """The directory of the sockets of a server's models, which are children of one process.

    Args:
        server_pid: that process.
        temporary: where it keeps temporary files; None is where this process does.
    """
    name = f"adaptive_k_{os.getuid()}_{server_pid}"
    directory = Path(temporary or tempfile.gettempdir(), name)
    return directory if len(os.fsencode(directory)) <= _LONGEST_DIRECTORY else Path("/tmp", name)
