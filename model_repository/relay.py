# SPDX-License-Identifier: Apache-2.0
"""How the models without an engine reach it: a Unix socket between two of Triton's model processes.

Each Triton model is a process of its own, and the engine shall be in memory once. Triton's two ways of
forwarding do not serve: an `ensemble` configuration does not tell its running step that the client has
gone, so the engine would go on; and decoupled requests from model to model (BLS) with 16 streaming clients
ended or hung server 2.51 within seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import stat
import threading
from collections.abc import Callable
from multiprocessing.connection import Client as connect
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from adaptive_k_moe.errors import ServerError
from adaptive_k_moe.model_repository.calls import Sender
from adaptive_k_moe.model_repository.pace import Pace
from adaptive_k_moe.model_repository.requests import Inputs
from adaptive_k_moe.model_repository.responses import Outputs
from adaptive_k_moe.model_repository.socket_directory import socket_directory

Begin = Callable[[str, Inputs, dict[str, Any], Sender], None]
"""Starts a request: its id, tensors, parameters, and where its responses go."""

_GONE = (EOFError, OSError)
_POLL_SECONDS = 0.05


class RelayServer:
    """The engine's end: takes requests from other models of the same server."""

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._peers: list[_Peer] = []
        # Messages are pickled, so nobody but this user may speak: the directory admits no one else.
        self._directory = socket_directory(os.getppid())
        self._directory.mkdir(mode=0o700, exist_ok=True)
        _check_private(self._directory)
        # While Triton reloads the model, the old process and the new one each have a socket.
        path = self._directory / f"{os.getpid()}.sock"
        path.unlink(missing_ok=True)
        self._listener = Listener(str(path), "AF_UNIX", backlog=16)
        threading.Thread(target=self._accept, name="adaptive-k-relay", daemon=True).start()

    def close(self) -> None:
        """Take no more requests, and tell the other models so; requests that run go on."""
        self._listener.close()
        for peer in self._peers:
            peer.put("close")
        with contextlib.suppress(OSError):  # a newer version of the model has its socket there
            self._directory.rmdir()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return
            self._peers.append(_Peer(connection, self._begin))


class _Peer:
    """One connected model: a thread reads its requests, another writes the responses to them."""

    def __init__(self, connection: Connection[Any, Any], begin: Begin) -> None:
        self._connection = connection
        self._begin = begin
        self._senders: dict[int, _RelaySender] = {}
        self._outgoing: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        for loop in (self._read, self._write):
            threading.Thread(target=loop, name="adaptive-k-relay", daemon=True).start()

    def forget(self, number: int) -> None:
        """A request has ended."""
        self._senders.pop(number, None)

    def put(self, *message: Any) -> None:
        """Queue a message, so that no one waits for the other model to read it."""
        self._outgoing.put(message)

    def _read(self) -> None:
        try:
            while True:
                kind, number, *content = self._connection.recv()
                if kind == "infer":
                    sender = self._senders[number] = _RelaySender(self, number)
                    request_id, inputs, parameters = content
                    self._begin(request_id, inputs, parameters, sender)
                elif number in self._senders:
                    self._senders[number].cancel()
        except _GONE:
            for sender in list(self._senders.values()):
                sender.cancel()

    def _write(self) -> None:
        try:
            while True:
                self._connection.send(self._outgoing.get())
        except _GONE:
            pass


class _RelaySender:
    """A `Sender` over a relay connection."""

    def __init__(self, peer: _Peer, number: int) -> None:
        self._peer = peer
        self._number = number
        self._cancelled = False

    def send(self, outputs: Outputs) -> None:
        self._peer.put("send", self._number, outputs)

    def fail(self, message: str, code: str) -> None:
        self._peer.put("fail", self._number, message, code)
        self._peer.forget(self._number)

    def finish(self) -> None:
        self._peer.put("finish", self._number)
        self._peer.forget(self._number)

    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        self._cancelled = True


class RelayClient:
    """The other end: hands requests to the engine's model and passes its responses on.

    Responses, and the questions whether clients have gone, are left to `step`, which one thread calls
    again and again.
    """

    def __init__(self) -> None:
        self._connection = _connect()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._senders: dict[int, Sender] = {}
        self._closed = False
        self._pace = Pace(_POLL_SECONDS)

    def begin(self, request_id: str, inputs: Inputs, parameters: dict[str, Any], sender: Sender) -> None:
        """Hand a request over.

        Raises:
            ServerError: the connection has broken; the sender has not been used.
        """
        with self._lock:
            number = next(self._numbers)
            try:
                if self._closed:
                    raise EOFError
                self._connection.send(("infer", number, request_id, inputs, parameters))
            except _GONE:
                raise ServerError("the model that holds the engine has gone.") from None
            self._senders[number] = sender

    def step(self) -> bool:
        """Wait a moment for responses and pass them on; now and then, tell of clients that have gone.

        Returns:
            Whether to go on; if not, the connection has ended, and its requests have ended or failed.
        """
        try:
            if self._connection.poll(self._pace.seconds_left()):
                self._pass_on(*self._connection.recv())
            if not self._pace.seconds_left():
                with self._pace.look():
                    self._cancel_abandoned()
        except _GONE:
            with self._lock:
                self._closed = True
                senders = list(self._senders.values())
                self._senders.clear()
            self._connection.close()
            for sender in senders:
                sender.fail("the model that holds the engine has gone.", "UNAVAILABLE")
            return False
        return self.busy() or not self._closed

    def busy(self) -> bool:
        """Whether requests are running."""
        return bool(self._senders)

    def _cancel_abandoned(self) -> None:
        with self._lock:
            senders = list(self._senders.items())
        for number, sender in senders:
            if sender.cancelled():
                with self._lock:
                    self._connection.send(("cancel", number))

    def _pass_on(self, kind: str, number: int = -1, *content: Any) -> None:
        # `begin` registers a sender after its request is on the way: the lock makes the answer wait for it.
        with self._lock:
            if kind == "close":
                self._closed = True
                return
            sender = self._senders[number] if kind == "send" else self._senders.pop(number)
        getattr(sender, kind)(*content)


def _connect() -> Connection[Any, Any]:
    """A connection to the engine's model; to the newest if there are two.

    Raises:
        ServerError: there is none.
    """
    directory = socket_directory(os.getppid())
    with contextlib.suppress(OSError):
        _check_private(directory)
        for path in sorted(directory.glob("*.sock"), key=lambda path: path.stat().st_mtime, reverse=True):
            with contextlib.suppress(OSError):
                return connect(str(path), "AF_UNIX")
    raise ServerError("the model that holds the engine is not loaded.")


def _check_private(directory: Path) -> None:
    """Refuse a directory that another user could have made.

    Raises:
        PermissionError: it is not this user's alone.
    """
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{directory} is open to other users.")
