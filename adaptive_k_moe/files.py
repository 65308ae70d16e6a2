# SPDX-License-Identifier: Apache-2.0
"""Files that are whole at every moment."""

from __future__ import annotations

import errno
import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half of it.

    A symbolic link stays one: what it leads to is written. What is no file (`/dev/stdout`) is written to as it is.

    Raises:
        OSError: it cannot be written; what was there stays as it was.
    """
    place = Path(path).resolve()
    if place.is_symlink():  # a link that leads to itself, which Python 3.13 leaves as it is
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if place.exists() and not place.is_file():
        Path(path).write_text(text, encoding="utf-8")
        return
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
        temporary.replace(place)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file as `write_text` does, in ASCII: a file's name may have what UTF-8 has not."""
    write_text(path, json.dumps(content, indent=2) + "\n")
