# SPDX-License-Identifier: Apache-2.0
"""Servers that do not come up: one sentence within seconds, and nothing is left. Interpreters that cannot run Triton's
Python backend are refused before anything starts."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import tomllib

from adaptive_k_moe import cli
from adaptive_k_moe.client import Client
from adaptive_k_moe.errors import DependencyError, ServerError
from adaptive_k_moe.model_repository import TritonServer, triton_wheel
from adaptive_k_moe.model_repository.contract import MODELS
from adaptive_k_moe.model_repository.installation import find_tritonserver
from adaptive_k_moe.model_repository.python_library import python_library

from waiting import eventually

ANY_PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
NO_PORTS = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}_port", "0")]
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
# Long enough for a busy machine; without a check, it would be the ready timeout of ten minutes.
WITHIN_SECONDS = 60


def _wheel(directory: Path, change: Callable[[bytes], bytes]) -> Path:
    """The wheel's server with another stub; its program."""
    real = find_tritonserver().wheel_dir
    assert real is not None
    home = directory / "pytriton" / "tritonserver"
    stub = home / "python_backend_stubs" / VERSION / "triton_python_backend_stub"
    stub.parent.mkdir(parents=True)
    stub.write_bytes(change((real / stub.relative_to(home)).read_bytes()))
    (home / "bin").mkdir()
    shutil.copy2(real / "bin" / "tritonserver", home / "bin")
    (home / "backends").symlink_to(real / "backends")
    (directory / "nvidia_pytriton.libs").symlink_to(real.parent.parent / "nvidia_pytriton.libs")
    return home / "bin" / "tritonserver"


def _without_a_library(stub: bytes) -> bytes:
    """It asks the loader for a library that is nowhere."""
    changed = re.sub(rb"libcudart-[0-9a-f]{2}", b"libcudart-xx", stub)
    assert changed != stub
    return changed


def _stubs(server: TritonServer) -> dict[str, int]:
    """The processes of the models, by model."""
    found = {}
    for children in Path(f"/proc/{server.pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in children.read_text().split():
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if Path(words[0]).name == "triton_python_backend_stub":
                    found[Path(words[1]).parts[-3]] = int(pid)
    return found


def _signal_the_engines_stub(server: TritonServer, number: signal.Signals) -> threading.Thread:
    """Send a signal to the process that loads the engine, once it is there; that takes it a second."""

    def send() -> None:
        assert eventually(lambda: server.pid and "ensemble" in _stubs(server))
        os.kill(_stubs(server)["ensemble"], number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_a_stub_that_the_loader_cannot_load_is_one_sentence(engine_dir: Path, tmp_path: Path) -> None:
    program = _wheel(tmp_path, _without_a_library)
    server = TritonServer(engine_dir, tritonserver=program, log_file=tmp_path / "log", **ANY_PORTS)
    start = time.monotonic()
    with pytest.raises(ServerError) as failed:
        server.start()
    assert time.monotonic() - start < WITHIN_SECONDS
    assert str(failed.value).startswith("the Triton server did not start, as a model's process ended")
    assert "error while loading shared libraries: libcudart-xx" in str(failed.value)
    assert "\n" not in str(failed.value)
    assert server.pid is None


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_commands_say_so_and_leave_nothing(command: str, engine_dir: Path, tmp_path: Path, repository: Path) -> None:
    program = _wheel(tmp_path / "wheel", _without_a_library)
    line = {
        "serve": [sys.executable, "-m", "adaptive_k_moe", "serve", "--engine_dir", str(engine_dir), *NO_PORTS],
        "demo": [sys.executable, str(repository / "examples" / "demo.py"), "--output_dir", str(tmp_path / "demo")],
    }[command]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(program.parent), os.environ["PATH"]]),
        "ADAPTIVE_K_TEST": str(tmp_path),
    }
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=WITHIN_SECONDS)
    assert done.returncode == 1
    errors = [text for text in done.stderr.splitlines() if "error: the Triton server did not start" in text]
    assert len(errors) == 1 and "libcudart-xx" in errors[0]
    for each in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            assert f"ADAPTIVE_K_TEST={tmp_path}".encode() not in each.read_bytes()


def test_a_stub_that_is_killed_while_it_starts_is_one_sentence(engine_dir: Path, tmp_path: Path) -> None:
    server = TritonServer(engine_dir, log_file=tmp_path / "log", **ANY_PORTS)
    thread = _signal_the_engines_stub(server, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(ServerError, match=r"did not start.*(ended by signal 9 \(Killed\)|is not healthy)"):
        server.start()
    assert time.monotonic() - start < WITHIN_SECONDS
    thread.join()


def test_a_server_that_never_becomes_ready_is_given_up(engine_dir: Path, tmp_path: Path) -> None:
    server = TritonServer(engine_dir, log_file=tmp_path / "log", ready_timeout=6.0, **ANY_PORTS)
    thread = _signal_the_engines_stub(server, signal.SIGSTOP)
    with pytest.raises(ServerError, match="was not ready after 6 s"):
        server.start()
    thread.join()
    assert server.pid is None


def test_a_server_that_the_loader_cannot_load_is_one_sentence(engine_dir: Path, tmp_path: Path) -> None:
    program = _wheel(tmp_path, lambda stub: stub)
    program.write_bytes(program.read_bytes().replace(b"libtritonserver-7", b"libtritonserver-x"))
    with pytest.raises(ServerError, match="error while loading shared libraries: libtritonserver-x"):
        TritonServer(engine_dir, tritonserver=program, log_file=tmp_path / "log", **ANY_PORTS).start()


def test_a_server_that_the_system_cannot_run_is_one_sentence(engine_dir: Path, tmp_path: Path) -> None:
    program = tmp_path / "tritonserver"
    program.write_bytes(b"\x7fELF of no kind")
    program.chmod(0o755)
    with pytest.raises(ServerError, match=rf"cannot start {program}: Exec format error"):
        TritonServer(engine_dir, tritonserver=program, log_file=tmp_path / "log", **ANY_PORTS).start()


def test_the_stub_loads_this_interpreters_own_library(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    library = python_library()
    assert library is not None
    with TritonServer(engine_dir, log_file=tmp_path / "log", **ANY_PORTS) as server:
        stubs = _stubs(server)
        assert len(stubs) == len(MODELS)
        for stub in stubs.values():
            loaded = set(re.findall(r"\S*/libpython3\S*", Path(f"/proc/{stub}/maps").read_text()))
            assert loaded == {str(library.resolve())}


def test_an_interpreter_with_no_shared_library_is_refused_before_anything_starts(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Debian's python3 without libpython3.X: nothing where it says its library is, and nothing beside it."""
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    read = sysconfig.get_config_var
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path) if name == "LIBDIR" else read(name))
    launched: list[object] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **_: launched.append(arguments))
    assert cli.main(["serve", "--engine_dir", str(engine_dir), *NO_PORTS]) == 1
    error = capsys.readouterr().err
    assert f"needs libpython{VERSION}.so.1.0" in error
    assert f"apt-get install libpython{VERSION}" in error
    assert error.count("\n") == 1
    assert not launched


@pytest.mark.parametrize("folder", ["lib", f"lib/{sysconfig.get_config_var('MULTIARCH')}"])
def test_a_library_beside_an_interpreter_that_does_not_name_it_is_found(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """conda's and uv's programs have the library inside, and name an archive or a folder of who built them."""
    library = tmp_path / folder / f"libpython{VERSION}.so.1.0"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    read = sysconfig.get_config_var
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: "/install/lib" if name == "LIBDIR" else read(name))
    assert python_library() == library


def test_no_triton_at_all_is_one_sentence_with_the_command(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["serve", "--engine_dir", str(engine_dir), *NO_PORTS]) == 1
    error = capsys.readouterr().err
    assert f"pip install --no-deps {triton_wheel.WHEEL}" in error
    assert error.count("\n") == 1


def test_the_wheel_is_named_once_for_all_and_decides_nothing(repository: Path) -> None:
    assert f"TRITON := {triton_wheel.WHEEL}\n" in (repository / "Makefile").read_text()
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = [text for extra in project["optional-dependencies"].values() for text in extra]
    assert not [text for text in [*project["dependencies"], *extras] if "pytriton" in text]


@pytest.mark.skipif(int(version("numpy").partition(".")[0]) < 2, reason="NumPy 1 is here, which every stub knows")
def test_a_stub_that_nobody_knows_is_refused_with_numpy_2(engine_dir: Path, tmp_path: Path) -> None:
    program = _wheel(tmp_path, lambda stub: stub.replace(b"\x48\x63\x40\x20", b"\x48\x63\x40\x24"))
    with pytest.raises(DependencyError, match=r"does not know NumPy 2: pip install 'numpy<2'"):
        TritonServer(engine_dir, tritonserver=program, **ANY_PORTS).start()


def test_a_proxy_for_the_world_is_not_one_for_this_machine(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with TritonServer(engine_dir, log_file=tmp_path / "log", ready_timeout=60.0, **ANY_PORTS) as server:
        assert Client(server.grpc_url).is_ready()


@pytest.mark.parametrize("number", ["2.7", "3.10", "3.14"])
def test_make_refuses_another_python_in_a_sentence(number: str, tmp_path: Path, repository: Path) -> None:
    """The interpreter stands in for one of this version: it says so, and does nothing else."""
    python = tmp_path / "python"
    numbers = number.replace(".", ", ")
    code = f"import sys\nassert sys.argv[1] == '-c'\nsys.version_info = ({numbers}, 0)\nexec(sys.argv[2])\n"
    python.write_text(f"#!{sys.executable}\n{code}")
    python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy2(repository / name, tmp_path)
    start = time.monotonic()
    done = subprocess.run(["make", "demo", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
    assert time.monotonic() - start < 10
    assert done.returncode != 0
    assert f"error: {python} is not Python 3.11, 3.12 or 3.13: name one, make demo PYTHON=" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_what_make_needs_is_here_and_what_is_not_is_named(repository: Path) -> None:
    check = [sys.executable, str(repository / "cmake" / "check_machine.py")]
    assert subprocess.run(check, capture_output=True).returncode == 0
    bare = {**os.environ, "PATH": "/nowhere", "CXX": "/nowhere/c++"}
    done = subprocess.run(check, env=bare, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "error: a C++ compiler, cmake missing here: on Debian and Ubuntu, apt-get install g++ cmake.\n"
    )


def test_make_names_the_library_that_an_interpreter_lacks(tmp_path: Path, repository: Path) -> None:
    """As Debian's python3 without libpython3.X; the check is run as make runs it, with nothing where the library is."""
    check = repository / "cmake" / "check_machine.py"
    code = f"""
import runpy, sys, sysconfig
read = sysconfig.get_config_var
sysconfig.get_config_var = lambda name: {str(tmp_path)!r} if name == "LIBDIR" else read(name)
sys.base_prefix = {str(tmp_path)!r}
runpy.run_path({str(check)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert f"apt-get install libpython{VERSION}" in done.stderr
