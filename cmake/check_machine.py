# SPDX-License-Identifier: Apache-2.0
"""Says in one sentence what this machine lacks for `make`, before anything is downloaded; with the standard library."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "model_repository"))
from python_library import python_library, what_to_install


def main() -> int:
    """0 if nothing is missing."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    compilers = [os.environ.get("CXX", "c++"), "g++", "clang++"]
    needs = {
        f"{python}-venv": all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")),
        f"{python}-dev": Path(sysconfig.get_path("include"), "Python.h").is_file(),
        "g++": any(map(shutil.which, compilers)),
        "cmake": shutil.which("cmake") is not None,
    }
    missing = [package for package, here in needs.items() if not here]
    if missing:
        names = {f"{python}-venv": "Python's venv", f"{python}-dev": "Python's headers", "g++": "a C++ compiler"}
        what = ", ".join(names.get(package, package) for package in missing)
        print(
            f"error: {what} missing here: on Debian and Ubuntu, apt-get install {' '.join(missing)}.", file=sys.stderr
        )
        return 1
    if python_library() is None:
        print(f"error: {what_to_install()}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
