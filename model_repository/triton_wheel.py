# SPDX-License-Identifier: Apache-2.0
"""The Triton server that the nvidia-pytriton wheel carries, made to run with this Python and its packages.

Nothing of the wheel is changed: its Python backend is copied, and the copy is.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from adaptive_k_moe.errors import DependencyError
from adaptive_k_moe.model_repository.python_library import python_library, what_to_install

WHEEL = "nvidia-pytriton==0.7.0"
"""To be installed with --no-deps, and in no extra: nothing of ours imports its Python code, and what that asks for
(NumPy below 2, of which Python 3.13 has no wheel) shall not decide what users may have."""

_STUB = "triton_python_backend_stub"

# What is replaced in the copies: old bytes, how often they are there, new bytes.
#
# The stub was built for NumPy 1 and reads the size of an array's elements at byte 32 of a `PyArray_Descr`. NumPy 2 has
# it at byte 40, and flags at 32. The instructions are movslq 0x20(%rax),%rax where outputs are sent, and where inputs
# come mov %rax,%r14; mov (%rsi),%rax; mov 0x20(%rax),%eax; mov %eax,... (In source, it is pull request 384 of Triton's
# python_backend, which later servers have.)
_NUMPY_2 = {
    b"\x48\x63\x40\x20": (4, b"\x48\x63\x40\x28"),
    b"\x49\x89\xc6\x48\x8b\x06\x8b\x40\x20\x89": (1, b"\x49\x89\xc6\x48\x8b\x06\x8b\x40\x28\x89"),
}
# In the backend: the folder for packed environments, which it makes in /tmp whatever TMPDIR says and a killed server
# leaves. Now where the server starts.
_ENVIRONMENTS = {b"/tmp/python_env_": (1, b"././/python_env_")}


def check(wheel_dir: Path) -> None:
    """Refuse a wheel that cannot run this Python.

    Args:
        wheel_dir: the wheel's folder `tritonserver`.

    Raises:
        DependencyError: it has no Python backend for this Python's version or NumPy's, or this Python has no shared
            library.
    """
    stub = _stub(wheel_dir)
    if python_library() is None:
        raise DependencyError(what_to_install())
    if _has_numpy_2() and _replaced(stub, _NUMPY_2) is None:
        raise DependencyError(
            f"this nvidia-pytriton wheel is not {WHEEL} for x86-64, and its Python backend does not know NumPy 2: "
            "pip install 'numpy<2', or use NVIDIA's Triton server."
        )


def prepare(wheel_dir: Path, directory: Path) -> tuple[list[str], dict[str, str]]:
    """Copy the Python backend to `directory`, in which the server is to be started.

    Returns:
        Command-line options, and environment variables to set.

    Raises:
        DependencyError: as `check` does.
    """
    check(wheel_dir)
    # The wheel ships the stubs apart from the backend; they are joined outside site-packages.
    backend, libraries = directory / "backends" / "python", directory / "libraries"
    backend.mkdir(parents=True)
    libraries.mkdir()
    stub = _stub(wheel_dir)
    for source in [*(wheel_dir / "backends" / "python").iterdir(), stub]:
        if source.is_file():
            shutil.copy2(source, backend)
    if _has_numpy_2():
        _replace(backend / _STUB, _NUMPY_2)
    _replace(backend / "libtriton_python.so", _ENVIRONMENTS)
    (backend / _STUB).chmod(0o755)
    # Links to this Python's library, as its folder may have others that the server must not load. The stub for 3.13
    # names one that the wheel brings: it gets this Python's, too, whose modules it will load.
    library = python_library()
    for name in set(re.findall(rb"libpython3[\w.-]*\.so\.1\.0", stub.read_bytes())):
        (libraries / name.decode()).symlink_to(str(library))
    search = [libraries, wheel_dir.parent.parent / "nvidia_pytriton.libs", os.environ.get("LD_LIBRARY_PATH")]
    environment = {"LD_LIBRARY_PATH": os.pathsep.join(str(folder) for folder in search if folder)}
    # This build has no GPU support to report on.
    return [f"--backend-directory={backend.parent}", "--allow-gpu-metrics=false"], environment


def _stub(wheel_dir: Path) -> Path:
    """The process of a model, for this version of Python."""
    stubs = wheel_dir / "python_backend_stubs"
    stub = stubs / f"{sys.version_info.major}.{sys.version_info.minor}" / _STUB
    if not stub.is_file():
        versions = sorted((path.name for path in stubs.glob("3.*")), key=lambda name: int(name.partition(".")[2]))
        raise DependencyError(
            f"the nvidia-pytriton wheel has no Python backend for Python {stub.parent.name}: use one of "
            f"{', '.join(versions)}, or NVIDIA's Triton server."
        )
    return stub


def _has_numpy_2() -> bool:
    return int(version("numpy").partition(".")[0]) >= 2


def _replaced(file: Path, replacements: dict[bytes, tuple[int, bytes]]) -> bytes | None:
    """A file's bytes after the replacements; None if what they replace is not there as often as it should be."""
    content = file.read_bytes()
    for old, (times, new) in replacements.items():
        if content.count(old) != times:
            return None
        content = content.replace(old, new)
    return content


def _replace(file: Path, replacements: dict[bytes, tuple[int, bytes]]) -> None:
    content = _replaced(file, replacements)
    if content is not None:
        file.write_bytes(content)
