# SPDX-License-Identifier: Apache-2.0
"""Starting and stopping a server: what is refused before it starts, what is left after it has ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import adaptive_k_moe.model_repository
from adaptive_k_moe import cli
from adaptive_k_moe.client import Client, CompletionStream
from adaptive_k_moe.errors import ClientError, DependencyError, EngineError, ServerError
from adaptive_k_moe.model_repository import TritonServer
from adaptive_k_moe.model_repository.installation import find_tritonserver
from adaptive_k_moe.model_repository.socket_directory import socket_directory
from adaptive_k_moe.model_repository.supervisor import server_directory

from waiting import eventually

ANY_PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}


def _living(group: int) -> list[str]:
    """Processes of a group, without those that have ended and only wait to be collected."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, fields = status.read_text().rpartition(")")[::2]
            state, _, process_group = fields.split()[:3]
            if int(process_group) == group and state != "Z":
                found.append(name)
    return found


def _directory(server: int) -> Path:
    """The folder for all files of a server."""
    return Path(f"/proc/{server}/cwd").resolve()


def _leftovers(server: int, directory: Path) -> list[Path]:
    places = [directory, socket_directory(server, directory)]
    return [*Path("/dev/shm").glob(f"{directory.name}_*"), *filter(Path.exists, places)]


@contextlib.contextmanager
def _serve(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "adaptive_k_moe", "serve", "--http_port", "0", "--grpc_port", "0"]
    with subprocess.Popen(
        [*command, "--metrics_port", "0", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def _drain(streams: list[CompletionStream]) -> None:
    for stream in streams:
        list(stream)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _supervisor(process: subprocess.Popen[str]) -> int:
    assert eventually(lambda: _children(process.pid))
    return _children(process.pid)[0]


def _server(process: subprocess.Popen[str]) -> int:
    supervisor = _supervisor(process)
    assert eventually(lambda: _children(supervisor))
    return _children(supervisor)[0]


def test_the_folder_in_which_it_starts_does_not_matter(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clone of the repository has a folder adaptive_k_moe, too, with half of the installed package in it.
    for name in ("adaptive_k_moe", "numpy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    with TritonServer(engine_dir, model_repository="models", **ANY_PORTS) as server:
        assert Client(server.grpc_url).generate("Once", max_tokens=1).num_output_tokens == 1
    assert (tmp_path / "models" / "ensemble" / "config.pbtxt").is_file()


def test_an_engine_that_is_missing_or_truncated_is_one_sentence(engine_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="there is no engine directory"):
        TritonServer(tmp_path / "nothing", **ANY_PORTS).start()
    shutil.copytree(engine_dir, tmp_path / "engine")
    os.truncate(tmp_path / "engine" / "rank0.bin", 1000)
    with pytest.raises(EngineError, match=r"rank0.bin has 1000 bytes instead of"):
        TritonServer(tmp_path / "engine", **ANY_PORTS).start()


def test_an_engine_that_was_altered_is_one_sentence(engine_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(engine_dir, tmp_path / "engine")
    with (tmp_path / "engine" / "rank0.bin").open("r+b") as weights:
        weights.seek(1000)
        byte = weights.read(1)[0]
        weights.seek(1000)
        weights.write(bytes([byte ^ 1]))
    server = TritonServer(tmp_path / "engine", **ANY_PORTS, log_file=tmp_path / "log")
    with pytest.raises(ServerError, match=r"rank0.bin was altered") as failed:
        server.start()
    assert "\n" not in str(failed.value)
    assert str(failed.value).count("altered") == 1
    assert server.pid is None


@pytest.mark.parametrize(
    ("option", "name"), [("http_port", "HTTP"), ("grpc_port", "gRPC"), ("metrics_port", "metrics")]
)
def test_a_port_in_use_is_named(engine_dir: Path, option: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"the {name} port {port} .* in use"):
            TritonServer(engine_dir, **{**ANY_PORTS, option: port}).start()
        ports = [word for key in ANY_PORTS if key != option for word in (f"--{key}", "0")]
        assert cli.main(["serve", "--engine_dir", str(engine_dir), f"--{option}", str(port), *ports]) == 1
    error = capsys.readouterr().err
    assert error.startswith("adaptive-k: error: ")
    assert error.count("\n") == 1


def test_a_server_program_that_is_none(engine_dir: Path) -> None:
    with pytest.raises(DependencyError, match="/no/tritonserver is not a program"):
        TritonServer(engine_dir, **ANY_PORTS, tritonserver="/no/tritonserver").start()


def test_a_program_that_is_no_server(engine_dir: Path) -> None:
    with pytest.raises(ServerError, match=r"did not start \(exit status 1\)"):
        TritonServer(engine_dir, **ANY_PORTS, tritonserver="false").start()


def test_sigterm_leaves_nothing_behind(engine_dir: Path, tmp_path: Path) -> None:
    with _serve("--engine_dir", engine_dir, "--log_file", tmp_path / "log") as process:
        line = process.stdout.readline()
        url = line.partition("grpc ")[2].partition(",")[0]
        server = _server(process)
        directory = _directory(server)
        assert _living(server)
        assert len(_leftovers(server, directory)) >= 3
        with Client(url) as client:
            stream = client.generate("import os", stream=True, max_tokens=400, end_id=-1)
            next(stream)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(ClientError):  # it may have come to its end
                list(stream)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    assert eventually(lambda: not _living(server))
    assert not _leftovers(server, directory)


def test_a_running_answer_comes_to_its_end_before_the_server_does(engine_dir: Path, tmp_path: Path) -> None:
    with TritonServer(engine_dir, log_file=tmp_path / "log", **ANY_PORTS) as server, Client(server.grpc_url) as client:
        stream = client.generate("import os", stream=True, max_tokens=100, end_id=-1)
        pieces = [next(stream)]
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        pieces += stream
        stopping.join()
        assert sum(piece.num_output_tokens for piece in pieces) == 100


@pytest.mark.parametrize("taken", [signal.SIG_DFL, signal.SIG_IGN], ids=["terminal", "nohup"])
def test_a_terminal_that_closes_ends_it_but_under_nohup(
    taken: signal.Handlers, engine_dir: Path, tmp_path: Path
) -> None:
    before = signal.signal(signal.SIGHUP, taken)  # commands inherit what is ignored
    try:
        with _serve("--engine_dir", engine_dir, "--log_file", tmp_path / "log") as process:
            process.stdout.readline()
            process.send_signal(signal.SIGHUP)
            if taken == signal.SIG_DFL:
                assert process.wait(60) == 0
                assert process.stderr.read() == ""
            else:
                time.sleep(1.0)
                assert process.poll() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigint_while_it_starts(engine_dir: Path, tmp_path: Path) -> None:
    with _serve("--engine_dir", engine_dir, "--log_file", tmp_path / "log") as process:
        server = _server(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert eventually(lambda: not _living(server))


def test_a_serve_command_that_is_killed_leaves_nothing(engine_dir: Path, tmp_path: Path) -> None:
    with _serve("--engine_dir", engine_dir, "--log_file", tmp_path / "log") as process:
        process.stdout.readline()
        server = _server(process)
        directory = _directory(server)
        assert _living(server)
        process.kill()
        process.wait(60)
    assert eventually(lambda: not _living(server))
    assert eventually(lambda: not _leftovers(server, directory))


def test_what_killed_servers_leave_the_next_one_removes_and_nothing_of_the_living(
    engine_dir: Path, tmp_path: Path
) -> None:
    with (
        _serve("--engine_dir", engine_dir, "--log_file", tmp_path / "log") as killed,
        TritonServer(engine_dir, log_file=tmp_path / "other.log", **ANY_PORTS) as living,
    ):
        killed.stdout.readline()
        server = _server(killed)
        directory = _directory(server)
        with server_directory():
            assert len(_leftovers(server, directory)) >= 3
        supervisor = _supervisor(killed)
        killed.send_signal(signal.SIGSTOP)  # so that neither of them can clean up after the server
        os.kill(supervisor, signal.SIGKILL)
        os.killpg(server, signal.SIGKILL)
        killed.kill()
        killed.wait(60)
        assert eventually(lambda: not _living(server))
        assert len(_leftovers(server, directory)) >= 3
        with server_directory() as new:
            assert not _leftovers(server, directory)
            assert new.path.is_dir()
        assert not new.path.exists()
        assert len(_leftovers(living.pid, _directory(living.pid))) >= 3
        assert Client(living.grpc_url).generate("Once", max_tokens=1).num_output_tokens == 1


def test_what_bears_the_name_of_a_servers_folder_and_is_none_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:  # pytest's own is too long a path for sockets
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        (Path(temporary) / "elsewhere").mkdir()
        (Path(temporary) / "adaptive_k_server_link").symlink_to(Path(temporary) / "elsewhere")
        (Path(temporary) / "adaptive_k_server_file").write_text("mine")
        (Path(temporary) / "adaptive_k_server_left").mkdir()
        with server_directory() as directory:
            assert directory.path.parent == Path(temporary)
        names = sorted(path.name for path in Path(temporary).iterdir())
    assert names == ["adaptive_k_server_file", "adaptive_k_server_link", "elsewhere"]


@pytest.mark.parametrize("name", ["a folder", "long" * 10, "$HOME"])
def test_a_folder_that_triton_cannot_use_is_not_used(
    name: str, engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton hands paths to a shell as they are, and sockets lie in the folder."""
    (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / name))
    with TritonServer(engine_dir, log_file=tmp_path / "log", **ANY_PORTS) as server:
        assert _directory(server.pid).parent == Path("/tmp")
        assert Client(server.grpc_url).generate("Once", max_tokens=1).num_output_tokens == 1


def test_all_files_of_a_server_lie_in_its_folder(engine_dir: Path, tmp_path: Path) -> None:
    """Triton would have one in /tmp, which nobody removes when it is killed."""
    with TritonServer(engine_dir, log_file=tmp_path / "log", **ANY_PORTS) as server:
        names = {path.name.partition("_env_")[0] for path in _directory(server.pid).iterdir()}
    assert "python" in names


def test_a_supervisor_that_is_killed_ends_the_server_and_the_command(engine_dir: Path, tmp_path: Path) -> None:
    with _serve("--engine_dir", engine_dir, "--log_file", tmp_path / "log") as process:
        process.stdout.readline()
        server = _server(process)
        directory = _directory(server)
        os.kill(_supervisor(process), signal.SIGKILL)
        assert process.wait(60) == 1
        error = process.stderr.read()
    assert error.startswith("adaptive-k: error: the supervisor of the Triton server has ended (status -9)")
    assert error.count("\n") == 1
    assert eventually(lambda: not _living(server))
    assert not _leftovers(server, directory)


def test_a_process_that_was_forked_does_not_keep_the_server(engine_dir: Path, tmp_path: Path) -> None:
    """It holds whatever the starter had open."""
    code = f"""
import os, time
from adaptive_k_moe.model_repository import TritonServer
server = TritonServer({str(engine_dir)!r}, http_port=0, grpc_port=0, metrics_port=0, log_file={str(tmp_path / "log")!r})
server.start()
if os.fork() == 0:
    time.sleep(60)
print(server.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            server = int(process.stdout.readline())
            directory = _directory(server)
            process.kill()
            assert eventually(lambda: not _living(server))
            assert eventually(lambda: not _leftovers(server, directory))
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_server_that_dies_is_reported_to_both_sides(engine_dir: Path, tmp_path: Path) -> None:
    with _serve("--engine_dir", engine_dir, "--log_file", tmp_path / "log") as process:
        url = process.stdout.readline().partition("grpc ")[2].partition(",")[0]
        server = _server(process)
        directory = _directory(server)
        with Client(url) as client:
            streams = [client.generate("import os", stream=True, max_tokens=400, end_id=-1) for _ in range(32)]
            next(streams[0])
            os.kill(server, signal.SIGKILL)
            with pytest.raises(ClientError, match="cannot be reached, or broke off"):
                _drain(streams)
            assert not client.is_ready()
        assert process.wait(60) == 1
        error = process.stderr.read()
        assert error == ("adaptive-k: error: the Triton server stopped on its own: signal 9 (Killed) ended it.\n")
    assert eventually(lambda: not _living(server))
    assert not _leftovers(server, directory)


def test_the_repository_as_it_ships_serves_and_reloads_in_any_triton(engine_dir: Path, tmp_path: Path) -> None:
    repository = Path(adaptive_k_moe.model_repository.__file__).parent
    installation = find_tritonserver()
    options, environment = installation.prepare(tmp_path / "triton")
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        http, grpc = one.getsockname()[1], other.getsockname()[1]
    models = ["ensemble", "tensorrt_llm_bls"]
    command = [
        str(installation.program),
        f"--model-repository={repository}",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in models),
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        "--allow-metrics=false",
        *options,
    ]
    environment["ADAPTIVE_K_ENGINE_DIR"] = str(engine_dir)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            cwd=tmp_path / "triton",
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        clients = [Client(f"127.0.0.1:{grpc}", model_name=model, timeout=30) for model in models]
        assert eventually(lambda: all(client.is_ready() for client in clients))
        before = [client.generate("import os", max_tokens=4, end_id=-1).text for client in clients]
        assert before[0] == before[1]
        # Triton's model control: the model is loaded anew, and the other one finds it.
        url = f"http://127.0.0.1:{http}/v2/repository/models/ensemble/load"
        body = b'{"parameters": {"config": "%s"}}' % _reloading_config(repository)
        urllib.request.urlopen(urllib.request.Request(url, body), timeout=60).close()
        time.sleep(1.0)  # the old one goes when its requests have ended
        assert [client.generate("import os", max_tokens=4, end_id=-1).text for client in clients] == before
        for client in clients:
            client.close()
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert not socket_directory(process.pid).exists()


def _reloading_config(repository: Path) -> bytes:
    """The shipped configuration, changed where it matters to no one, as the JSON that a load request takes."""
    import json

    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    config = text_format.Parse((repository / "ensemble" / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    config.metric_tags["generation"] = "2"
    text = json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True))
    return json.dumps(text)[1:-1].encode()
