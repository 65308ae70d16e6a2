# SPDX-License-Identifier: Apache-2.0
"""Runs a real Triton server for one engine, from before its first byte to after its last process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import IO

from adaptive_k_moe.arguments import check_arguments
from adaptive_k_moe.engine_config import read_engine_config
from adaptive_k_moe.errors import ServerError
from adaptive_k_moe.model_repository.contract import MODELS
from adaptive_k_moe.model_repository.installation import find_tritonserver
from adaptive_k_moe.model_repository.observation_options import ObservationOptions
from adaptive_k_moe.model_repository.repository import write_model_repository
from adaptive_k_moe.model_repository.server_directory import ServerDirectory, server_directory
from adaptive_k_moe.model_repository.socket_directory import socket_directory

_POLL_SECONDS = 0.1
_DRAIN_SECONDS = 5
_KILL_AFTER_SECONDS = 15.0
# What lines of a request log that goes to standard output begin with.
_REQUEST_LINE = b'{"ts":'
_PORT_NAMES = ("HTTP", "gRPC", "metrics")


class TritonServer:
    """A Triton server that serves one engine; a context manager that starts and stops it.

    Example::

        with TritonServer("engine", http_port=0, grpc_port=0, metrics_port=0) as server:
            print(server.grpc_url)

    Args:
        engine_dir: the engine to serve.
        http_port: port of HTTP; 0 picks a free one, here and for the others.
        grpc_port: port of gRPC.
        metrics_port: port of the Prometheus metrics.
        host: address to listen on.
        model_repository: where to write the models; None is a temporary directory.
        tritonserver: the server's executable; None finds one (see `find_tritonserver`).
        log_file: where the server's log goes; None is standard error.
        log_verbose: Triton's verbosity, 0 is none.
        num_threads: CPU threads of the engine; None leaves it to the runtime.
        kv_cache_max_tokens: tokens that the KV cache holds over all sequences; None leaves it to the runtime.
        decoupled: let requests stream and have several answers; if not, unary calls are allowed (see `serve`).
        observation: what the server writes down of its requests besides metrics; None is nothing.
        ready_timeout: seconds that the server may take to load the engine.
        end_with_thread: on Linux, have the server end when the thread that calls `start` ends for whatever
            reason, `kill -9` of this process among them. For a thread that lives as long as the server should.

    Raises:
        EngineError: the engine directory is missing, incomplete, or of another version.
        DependencyError: there is no Triton server on this machine.
        ServerError: a port is in use, or the server does not start (an altered engine shows here).
    """

    def __init__(
        self,
        engine_dir: str | Path,
        *,
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        host: str = "127.0.0.1",
        model_repository: str | Path | None = None,
        tritonserver: str | Path | None = None,
        log_file: str | Path | None = None,
        log_verbose: int = 0,
        num_threads: int | None = None,
        kv_cache_max_tokens: int | None = None,
        decoupled: bool = True,
        observation: ObservationOptions | None = None,
        ready_timeout: float = 600.0,
        end_with_thread: bool = False,
    ) -> None:
        check_arguments(ServerError, str | os.PathLike, engine_dir=engine_dir)
        check_arguments(ServerError, int, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port)
        check_arguments(ServerError, str, host=host)
        check_arguments(ServerError, bool, decoupled=decoupled)
        paths = {"model_repository": model_repository, "tritonserver": tritonserver, "log_file": log_file}
        check_arguments(ServerError, str | os.PathLike | None, **paths)
        check_arguments(ServerError, int, log_verbose=log_verbose)
        check_arguments(ServerError, int | None, num_threads=num_threads, kv_cache_max_tokens=kv_cache_max_tokens)
        check_arguments(ServerError, ObservationOptions | None, observation=observation)
        check_arguments(ServerError, float, ready_timeout=ready_timeout)
        check_arguments(ServerError, bool, end_with_thread=end_with_thread)
        self.engine_dir = Path(engine_dir)
        self.host = host
        self._asked_ports = (http_port, grpc_port, metrics_port)
        self._model_repository = None if model_repository is None else Path(model_repository)
        self._tritonserver = tritonserver
        self._log_file = log_file
        self._log_verbose = log_verbose
        self._num_threads = num_threads
        self._kv_cache_max_tokens = kv_cache_max_tokens
        self._decoupled = decoupled
        self._observation = observation or ObservationOptions()
        self._ready_timeout = ready_timeout
        self._end_with_thread = end_with_thread
        self._process: subprocess.Popen[bytes] | None = None
        self._log_tail: deque[str] = deque(maxlen=400)
        self._resources = contextlib.ExitStack()

    @property
    def http_url(self) -> str:
        """HOST:PORT of HTTP."""
        return f"{self._contact}:{self._ports[0]}"

    @property
    def grpc_url(self) -> str:
        """HOST:PORT of gRPC."""
        return f"{self._contact}:{self._ports[1]}"

    @property
    def metrics_url(self) -> str:
        """HOST:PORT of the metrics."""
        return f"{self._contact}:{self._ports[2]}"

    @property
    def pid(self) -> int | None:
        """The server's process; None when it is not running."""
        return self._process.pid if self._process else None

    @property
    def log_tail(self) -> str:
        """The last lines that the server wrote."""
        return "\n".join(self._log_tail)

    def start(self, stop_asked: threading.Event | None = None) -> bool:
        """Start the server and wait until it serves.

        Args:
            stop_asked: gives up waiting once it is set.

        Returns:
            Whether the server is ready; False only if `stop_asked` was set before.
        """
        # The model checks the hashes when it loads; reading a large engine twice would double the wait.
        read_engine_config(self.engine_dir, verify_files=False)
        self._observation.check()
        installation = find_tritonserver(self._tritonserver)
        self._ports = _reserve_ports(self.host, self._asked_ports)
        try:
            self._directory = directory = self._resources.enter_context(server_directory())
            repository = (self._model_repository or directory.path / "models").absolute()
            write_model_repository(
                repository,
                self.engine_dir,
                num_threads=self._num_threads,
                kv_cache_max_tokens=self._kv_cache_max_tokens,
                parameters=self._observation.to_parameters(),
                decoupled=self._decoupled,
            )
            options, environment = installation.prepare(directory.path)
            environment["TMPDIR"] = str(directory.path)  # the models' sockets lie there, too
            command = [str(installation.program.absolute()), *self._options(repository, directory), *options]
            self._launch(command, {**os.environ, **environment}, directory)
            return self._wait_ready(stop_asked)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server; no process of it is left afterwards."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(_DRAIN_SECONDS + _KILL_AFTER_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            # Stub processes of models outlive a server that was killed; they share its group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            # A server that was killed leaves its sockets, which lie elsewhere where the path would be too long.
            shutil.rmtree(socket_directory(process.pid, self._directory.path), ignore_errors=True)
        self._resources.close()

    def wait(self, stop_asked: threading.Event) -> None:
        """Wait until `stop_asked` is set.

        Raises:
            ServerError: the server ended on its own.
        """
        while not stop_asked.wait(_POLL_SECONDS):
            self._check_alive("stopped on its own")

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _contact(self) -> str:
        address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{address}]" if ":" in address else address

    def _options(self, repository: Path, directory: ServerDirectory) -> list[str]:
        return [
            f"--model-repository={repository}",
            "--disable-auto-complete-config",  # they are complete; spares starting each model twice
            *(f"--{kind}-address={self.host}" for kind in ("http", "grpc", "metrics")),
            *(f"--{kind}-port={port}" for kind, port in zip(("http", "grpc", "metrics"), self._ports, strict=True)),
            "--grpc-header-forward-pattern=(?i)(traceparent|tracestate)",  # become the request's parameters
            f"--exit-timeout-secs={_DRAIN_SECONDS}",
            f"--log-verbose={self._log_verbose}",
            "--pinned-memory-pool-byte-size=0",  # nothing of ours travels through it
            f"--backend-config=python,shm-region-prefix-name={directory.shared_memory_prefix}",
        ]

    def _launch(self, command: list[str], environment: dict[str, str], directory: ServerDirectory) -> None:
        sink: IO[bytes] = sys.stderr.buffer
        if self._log_file is not None:
            try:
                log = Path(self._log_file).open("ab")  # noqa: SIM115  # closed when the server has stopped
                sink = self._resources.enter_context(log)
            except OSError as error:
                raise ServerError(f"cannot write the log {self._log_file}: {error.strerror}.") from None
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=directory.path,  # the backend's Python imports what lies there first, whatever it is
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(directory.lock,),
                start_new_session=True,  # its own group: Ctrl-C reaches us only, and we can end all of it
                preexec_fn=_end_with_parent if self._end_with_thread and sys.platform == "linux" else None,
            )
        except OSError as error:
            raise ServerError(f"cannot start {command[0]}: {error.strerror}.") from None
        reader = threading.Thread(target=self._copy_log, args=(self._process.stdout, sink), daemon=True)
        reader.start()
        # Runs before the sink is closed, when all writers of the pipe have gone.
        self._resources.callback(reader.join, 5.0)

    def _copy_log(self, source: IO[bytes], sink: IO[bytes]) -> None:
        with source:
            for line in source:
                if line.startswith(_REQUEST_LINE):
                    self._copy_request(line)
                    continue
                self._log_tail.append(line.decode(errors="replace").rstrip())
                with contextlib.suppress(OSError, ValueError):  # the reader of our standard error has gone
                    sink.write(line)
                    sink.flush()

    def _copy_request(self, line: bytes) -> None:
        """Pass a line of the request log on to standard output."""
        with contextlib.suppress(OSError, ValueError):  # its reader has gone
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()

    def _wait_ready(self, stop_asked: threading.Event | None) -> bool:
        deadline = time.monotonic() + self._ready_timeout
        while time.monotonic() < deadline:
            self._check_alive("did not start")
            if all(_is_ready(f"http://{self.http_url}/v2/models/{model}/ready") for model in MODELS):
                return True
            if stop_asked is None:
                time.sleep(_POLL_SECONDS)
            elif stop_asked.wait(_POLL_SECONDS):
                return False
        raise ServerError(f"the Triton server was not ready after {self._ready_timeout:g} s: {self._reason()}")

    def _check_alive(self, what: str) -> None:
        if self._process is None or self._process.poll() is None:
            return
        status = self._process.returncode
        time.sleep(_POLL_SECONDS)  # let the log's last lines arrive
        if status < 0:
            raise ServerError(f"the Triton server {what}: signal {-status} ({signal.strsignal(-status)}) ended it.")
        raise ServerError(f"the Triton server {what} (exit status {status}): {self._reason()}")

    def _reason(self) -> str:
        """The log's own account of what went wrong, shortened to its sentences."""
        found: list[str] = []
        for line in self._log_tail:
            # "E1124 05:53:00.435649 5760 file.cc:241] message", or "error: message" from the server itself.
            match = re.match(r"E\d{4} [\d:.]+ \d+ [\w.]+:\d+\] (.*)|error: (.*)", line)
            if match is None or "CudaDriverHelper" in line:  # said on every machine without a GPU
                continue
            # A model's error is "...TritonModelException: sentence\n\nAt:\n  file(line): function".
            message = (match[1] or match[2]).strip('"').split("\\n\\nAt:")[0]
            message = message.rpartition("TritonModelException: ")[2]
            if not any(message in other or other in message for other in found):
                found.append(message)
        return "; ".join(found[:2]) or "its log says nothing of an error."


def _end_with_parent() -> None:
    """Ask Linux, in the child, for a SIGTERM when the parent's thread ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _reserve_ports(host: str, asked: tuple[int, ...]) -> list[int]:
    """The ports to use, checked to be free at this moment; a 0 becomes a free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as probes:
        ports = []
        for name, port in zip(_PORT_NAMES, asked, strict=True):
            probe = probes.enter_context(socket.socket(family, socket.SOCK_STREAM))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen()
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise ServerError(
                    f"the {name} port {port} of {host} cannot be used ({reason}): "
                    f"choose another with --{name.lower()}_port."
                ) from None
            ports.append(probe.getsockname()[1])
        return ports


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
