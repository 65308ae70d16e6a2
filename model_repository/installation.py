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

_STUB = "triton_python_backend_stub"


class Installation(NamedTuple):
    """A Triton server.

    Attributes:
        program: the `tritonserver` executable.
        wheel_dir: where the nvidia-pytriton wheel keeps the server, if it is that one.
    """

    program: Path
    wheel_dir: Path | None

    def prepare(self, directory: Path) -> tuple[list[str], dict[str, str]]:
        """What this server needs besides its model repository; files it needs go to `directory`.

        Returns:
            Command-line options, and environment variables to set.

        Raises:
            DependencyError: the wheel has no Python backend for this interpreter's version.
        """
        # The backend's stub process finds its packages through the `bin` that leads PATH.
        environment = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
        if self.wheel_dir is None:
            return [], environment
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = self.wheel_dir / "python_backend_stubs" / version / _STUB
        if not stub.is_file():
            raise DependencyError(
                f"the nvidia-pytriton wheel has no Python backend for Python {version}: use one of "
                f"{', '.join(sorted(path.name for path in stub.parent.parent.glob('3.*')))}, "
                "or install NVIDIA's Triton server."
            )
        # The wheel ships the stubs apart from the backend; they are joined outside site-packages.
        backend = directory / "backends" / "python"
        backend.mkdir(parents=True)
        for source in [*(self.wheel_dir / "backends" / "python").iterdir(), stub]:
            if source.is_file():
                shutil.copy2(source, backend)
        (backend / _STUB).chmod(0o755)
        libraries = str(self.wheel_dir.parent.parent / "nvidia_pytriton.libs")
        search = [libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(search)
        # This build has no GPU support to report on.
        return [f"--backend-directory={backend.parent}", "--allow-gpu-metrics=false"], environment


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
        "there is no Triton server here: install one with pip install 'adaptive-k-moe[engine]', "
        "or run inside NVIDIA's Triton container."
    )


def _installation(program: Path) -> Installation:
    home = program.resolve().parent.parent
    return Installation(program, home if (home / "python_backend_stubs").is_dir() else None)
