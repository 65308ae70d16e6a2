# SPDX-License-Identifier: Apache-2.0
"""Finds a Triton server on this machine and says how to start it with this interpreter's packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from adaptive_k_moe.errors import DependencyError
from adaptive_k_moe.model_repository import triton_wheel


class Installation(NamedTuple):
    """A Triton server.

    Attributes:
        program: the `tritonserver` executable.
        wheel_dir: where the nvidia-pytriton wheel keeps the server, if it is that one.
    """

    program: Path
    wheel_dir: Path | None

    def check(self) -> None:
        """Refuse a server that cannot run this Python.

        Raises:
            DependencyError: why, and what to install.
        """
        if self.wheel_dir is not None:
            triton_wheel.check(self.wheel_dir)

    def prepare(self, directory: Path) -> tuple[list[str], dict[str, str]]:
        """What this server needs besides its model repository.

        Args:
            directory: where files go that it needs; the folder to start it in.

        Returns:
            Command-line options, and environment variables to set.

        Raises:
            DependencyError: as `check` does.
        """
        options, environment = ([], {}) if self.wheel_dir is None else triton_wheel.prepare(self.wheel_dir, directory)
        # The backend's stub process finds its packages through the `bin` that leads PATH.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        return options, environment


def find_tritonserver(program: str | Path | None = None) -> Installation:
    """The server to run: `program` if given, else the one on PATH, else the nvidia-pytriton wheel's.

    Raises:
        DependencyError: there is none.
    """
    if program is not None:
        found = shutil.which(program)
        if found is None:
            raise DependencyError(f"{program} is not a program: give --tritonserver the server's executable.")
        return _installation(Path(found))
    if found := shutil.which("tritonserver"):
        return _installation(Path(found))
    package = importlib.util.find_spec("pytriton")
    for location in (package.submodule_search_locations or []) if package else []:
        if (wheel_program := Path(location, "tritonserver", "bin", "tritonserver")).is_file():
            return _installation(wheel_program)
    raise DependencyError(
        f"there is no Triton server here: install one with pip install --no-deps {triton_wheel.WHEEL}, "
        "or run inside NVIDIA's Triton container."
    )


def _installation(program: Path) -> Installation:
    home = program.resolve().parent.parent
    return Installation(program, home if (home / "python_backend_stubs").is_dir() else None)
