# SPDX-License-Identifier: Apache-2.0
"""Runs a real Triton server for one engine, from before its first byte to after its last process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
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
from adaptive_k_moe.model_config import Device, KvCacheDtype
from adaptive_k_moe.model_repository.contract import MODELS
from adaptive_k_moe.model_repository.installation import find_tritonserver
from adaptive_k_moe.model_repository.observation_options import ObservationOptions
from adaptive_k_moe.model_repository.repository import write_model_repository
from adaptive_k_moe.model_repository.server_process import EndedProcess, ServerProcess
from adaptive_k_moe.model_repository.supervisor import shared_memory_prefix

_POLL_SECONDS = 0.1
_DRAIN_SECONDS = 5
_KILL_AFTER_SECONDS = 15.0
_NOTICE_SECONDS = 2.0
# What lines of a request log that goes to standard output begin with.
_REQUEST_LINE = b'{"ts":'
_PORT_NAMES = ("HTTP", "gRPC", "metrics")


class TritonServer:
    """A Triton server that serves one engine; a context manager that starts and stops it.

    It ends when this process ends, however that happens, and leaves no process, file, socket or shared memory.

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
        device: "cpu" or "cuda", of an engine of the target "torch"; None leaves it to the runtime.
        kv_cache_max_tokens: tokens that the KV cache holds over all sequences; None leaves it to the runtime.
        kv_cache_dtype: of keys and values: "float32", "bfloat16" or "int8"; "auto" is what attention computes in.
        decoupled: let requests stream and have several answers; if not, unary calls are allowed (see `serve`).
        observation: what the server writes down of its requests besides metrics; None is nothing.
        ready_timeout: seconds that the server may take to load the engine.

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
        device: Device | None = None,
        kv_cache_max_tokens: int | None = None,
        kv_cache_dtype: KvCacheDtype = "auto",
        decoupled: bool = True,
        observation: ObservationOptions | None = None,
        ready_timeout: float = 600.0,
    ) -> None:
        check_arguments(ServerError, str | os.PathLike, engine_dir=engine_dir)
        check_arguments(ServerError, int, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port)
        check_arguments(ServerError, str, host=host)
        check_arguments(ServerError, bool, decoupled=decoupled)
        paths = {"model_repository": model_repository, "tritonserver": tritonserver, "log_file": log_file}
        check_arguments(ServerError, str | os.PathLike | None, **paths)
        check_arguments(ServerError, int, log_verbose=log_verbose)
        check_arguments(ServerError, int | None, num_threads=num_threads, kv_cache_max_tokens=kv_cache_max_tokens)
        check_arguments(ServerError, KvCacheDtype, kv_cache_dtype=kv_cache_dtype)
        check_arguments(ServerError, Device | None, device=device)
        check_arguments(ServerError, ObservationOptions | None, observation=observation)
        check_arguments(ServerError, float, ready_timeout=ready_timeout)
        self.engine_dir = Path(engine_dir)
        self.host = host
        self._asked_ports = (http_port, grpc_port, metrics_port)
        self._model_repository = None if model_repository is None else Path(model_repository)
        self._tritonserver = tritonserver
        self._log_file = log_file
        self._log_verbose = log_verbose
        self._num_threads = num_threads
        self._device = device
        self._kv_cache_max_tokens = kv_cache_max_tokens
        self._kv_cache_dtype = kv_cache_dtype
        self._decoupled = decoupled
        self._observation = observation or ObservationOptions()
        self._ready_timeout = ready_timeout
        self._process: ServerProcess | None = None
        self._drain = False
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
        installation.check()
        self._ports = _reserve_ports(self.host, self._asked_ports)
        try:
            sink = self._open_log()
            self._process = process = ServerProcess()
            reader = threading.Thread(target=self._copy_log, args=(process.log, sink), daemon=True)
            reader.start()
            # Runs before the sink is closed, when all writers of the pipe have gone.
            self._resources.callback(reader.join, 5.0)
            repository = (self._model_repository or process.directory / "models").absolute()
            write_model_repository(
                repository,
                self.engine_dir,
                num_threads=self._num_threads,
                device=self._device,
                kv_cache_max_tokens=self._kv_cache_max_tokens,
                kv_cache_dtype=self._kv_cache_dtype,
                parameters=self._observation.to_parameters(),
                decoupled=self._decoupled,
            )
            options, environment = installation.prepare(process.directory)
            environment["TMPDIR"] = str(process.directory)  # the models' sockets lie there, too
            program = str(installation.program.absolute())
            process.launch([program, *self._options(repository, process.directory), *options], environment)
            return self._wait_ready(process, stop_asked)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server; no process of it is left afterwards.

        One that is ready lets running requests end for 5 seconds.
        """
        process, self._process = self._process, None
        try:
            if process is not None:
                process.stop(_DRAIN_SECONDS + _KILL_AFTER_SECONDS if self._drain else 0.0)
        finally:
            self._drain = False
            self._resources.close()

    def wait(self, stop_asked: threading.Event) -> None:
        """Wait until `stop_asked` is set.

        Raises:
            ServerError: the server ended on its own.
        """
        while self._process is not None and not stop_asked.wait(_POLL_SECONDS):
            self._check_alive(self._process, "stopped on its own")

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

    def _options(self, repository: Path, directory: Path) -> list[str]:
        return [
            f"--model-repository={repository}",
            "--disable-auto-complete-config",  # they are complete; spares starting each model twice
            *(f"--{kind}-address={self.host}" for kind in ("http", "grpc", "metrics")),
            *(f"--{kind}-port={port}" for kind, port in zip(("http", "grpc", "metrics"), self._ports, strict=True)),
            "--grpc-header-forward-pattern=(?i)(traceparent|tracestate)",  # become the request's parameters
            f"--exit-timeout-secs={_DRAIN_SECONDS}",
            f"--log-verbose={self._log_verbose}",
            "--pinned-memory-pool-byte-size=0",  # nothing of ours travels through it
            f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix(directory)}",
        ]

    def _open_log(self) -> IO[bytes]:
        if self._log_file is None:
            return sys.stderr.buffer
        try:
            log = Path(self._log_file).open("ab")  # noqa: SIM115  # closed when the server has stopped
        except OSError as error:
            raise ServerError(f"cannot write the log {self._log_file}: {error.strerror}.") from None
        return self._resources.enter_context(log)

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

    def _wait_ready(self, process: ServerProcess, stop_asked: threading.Event | None) -> bool:
        deadline = time.monotonic() + self._ready_timeout
        ended: dict[EndedProcess, float] = {}
        while time.monotonic() < deadline:
            self._check_alive(process, "did not start")
            if all(_is_ready(f"http://{self.http_url}/v2/models/{model}/ready") for model in MODELS):
                self._drain = True
                return True
            # Triton waits for ever for a model's process that ended before it could say so; one that said what is wrong
            # it waits for, says it in its log, and ends.
            ended = {child: ended.get(child, time.monotonic()) for child in process.ended_children()}
            for child, since in ended.items():
                if time.monotonic() - since > _NOTICE_SECONDS:
                    how = "" if child.status is None else f" by {_in_words(child.status)}"
                    raise ServerError(
                        f"the Triton server did not start, as a model's process ended{how}: {self._reason()}"
                    )
            if stop_asked is None:
                time.sleep(_POLL_SECONDS)
            elif stop_asked.wait(_POLL_SECONDS):
                return False
        raise ServerError(f"the Triton server was not ready after {self._ready_timeout:g} s: {self._reason()}")

    def _check_alive(self, process: ServerProcess, what: str) -> None:
        status = process.status()
        if status is None:
            return
        time.sleep(_POLL_SECONDS)  # let the log's last lines arrive
        if status < 0:
            raise ServerError(f"the Triton server {what}: {_in_words(status)} ended it.")
        raise ServerError(f"the Triton server {what} ({_in_words(status)}): {self._reason()}")

    def _reason(self) -> str:
        """The log's own account of what went wrong, shortened to its sentences."""
        found: list[str] = []
        for line in self._log_tail:
            # "E1124 05:53:00.435649 5760 file.cc:241] message"; "error: message" from the server itself; the loader's
            # "PROGRAM: error while loading shared libraries: LIBRARY: reason".
            match = re.match(r"E\d{4} [\d:.]+ \d+ [\w.]+:\d+\] (.*)|(?:.*: )?(error(?: while loading.*?)?: .*)", line)
            if match is None or "CudaDriverHelper" in line:  # said on every machine without a GPU
                continue
            # A model's error is "...TritonModelException: sentence\n\nAt:\n  file(line): function".
            message = (match[1] or match[2].removeprefix("error: ")).strip('"').split("\\n\\nAt:")[0]
            message = message.rpartition("TritonModelException: ")[2]
            if not any(message in other or other in message for other in found):
                found.append(message)
        return "; ".join(found[:2]) or "its log says nothing of an error."


def _in_words(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"signal {-status} ({signal.strsignal(-status)})"


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
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine
    try:
        with direct.open(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
