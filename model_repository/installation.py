# SPDX-License-Identifier: Apache-2.0
"""Finds a Triton server on this machine and says how to start it with this interpreter's packages."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from adaptive_k_moe.errors import DependencyError
from adaptive_k_moe.model_repository.python_library import python_library, what_to_install

WHEEL = "nvidia-pytriton==0.7.0"
"""A wheel with a Triton server inside. Nothing of ours imports its Python code, and what that asks for (NumPy below 2)
shall not decide what users may have, so it is installed with --no-deps and no extra names it."""

_STUB = "triton_python_backend_stub"


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
            DependencyError: the wheel has no Python backend for this version, or this Python has no shared library.
        """
        if self.wheel_dir is not None:
            _stub_and_library(self.wheel_dir)

    def prepare(self, directory: Path) -> tuple[list[str], dict[str, str]]:
        """What this server needs besides its model repository.

        Args:
            directory: where files go that it needs; the folder to start it in.

        Returns:
            Command-line options, and environment variables to set.

        Raises:
            DependencyError: as `check` does.
        """
        # The backend's stub process finds its packages through the `bin` that leads PATH.
        environment = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
        if self.wheel_dir is None:
            return [], environment
        stub, library = _stub_and_library(self.wheel_dir)
        # The wheel ships the stubs apart from the backend; they are joined outside site-packages.
        backend, libraries = directory / "backends" / "python", directory / "libraries"
        backend.mkdir(parents=True)
        libraries.mkdir()
        for source in [*(self.wheel_dir / "backends" / "python").iterdir(), stub]:
            if source.is_file():
                shutil.copy2(source, backend)
        (backend / _STUB).chmod(0o755)
        _keep_environments_here(backend / "libtriton_python.so")
        # A link to this Python's library, as its folder may have others that the server must not load. The stub for
        # 3.13 names one that the wheel brings: it gets this Python's too, as the modules are this Python's.
        for name in set(re.findall(rb"libpython3[\w.-]*\.so\.1\.0", stub.read_bytes())):
            (libraries / name.decode()).symlink_to(library)
        search = [libraries, self.wheel_dir.parent.parent / "nvidia_pytriton.libs", os.environ.get("LD_LIBRARY_PATH")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(str(folder) for folder in search if folder)
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
        f"there is no Triton server here: install one with pip install --no-deps {WHEEL}, "
        "or run inside NVIDIA's Triton container."
    )


def _installation(program: Path) -> Installation:
    home = program.resolve().parent.parent
    return Installation(program, home if (home / "python_backend_stubs").is_dir() else None)


def _stub_and_library(wheel_dir: Path) -> tuple[Path, Path]:
    """The wheel's Python backend for this Python, and this Python's shared library, which it loads.

    Raises:
        DependencyError: one of them is missing.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = wheel_dir / "python_backend_stubs" / version / _STUB
    if not stub.is_file():
        raise DependencyError(
            f"the nvidia-pytriton wheel has no Python backend for Python {version}: use one of "
            f"{', '.join(sorted(path.name for path in stub.parent.parent.glob('3.*')))}, "
            "or install NVIDIA's Triton server."
        )
    library = python_library()
    if library is None:
        raise DependencyError(what_to_install())
    return stub, library


def _keep_environments_here(backend: Path) -> None:
    """Have a copy of Triton's Python backend make its folder for environments where the server starts.

    It makes one in /tmp whatever TMPDIR says, and a server that is killed leaves it. No other backend is changed.
    """
    absolute, relative = b"/tmp/python_env_", b"././/python_env_"
    code = backend.read_bytes()
    if code.count(absolute) == 1:
        backend.write_bytes(code.replace(absolute, relative))
