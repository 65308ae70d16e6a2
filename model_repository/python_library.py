# SPDX-License-Identifier: Apache-2.0
"""The shared library of this Python, which Triton's Python backend loads. Imports only the standard library."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_NAME = f"libpython{_VERSION}.so.1.0"


def python_library() -> Path | None:
    """The file of the library; None where this Python has none."""
    # A venv has no library of its own. conda and uv link theirs into the program and keep it beside, in prefix/lib.
    library, multiarch = Path(sys.base_prefix, "lib"), sysconfig.get_config_var("MULTIARCH")
    folders = [sysconfig.get_config_var("LIBDIR"), library, library / multiarch if multiarch else None]
    files = (Path(folder, _NAME) for folder in folders if folder)
    return next((file for file in files if file.is_file()), None)


def what_to_install() -> str:
    """A sentence for whoever has no library."""
    return (
        f"Triton's Python backend needs {_NAME}, and the Python in {sys.base_prefix} has none: install it (Debian and "
        f"Ubuntu: apt-get install libpython{_VERSION}; pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install "
        f"{_VERSION}), or use a Python of uv or conda, which bring it."
    )
