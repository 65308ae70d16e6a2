# SPDX-License-Identifier: Apache-2.0
"""Both ends of the pipe between the benchmark and a process that has one model loaded.

The process is given its settings as JSON on the command line. It answers one JSON line when the model is loaded, then
one for each column that it is asked to measure, and ends when its input or the benchmark does.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Column(NamedTuple):
    """What is measured: a prefill of `tokens`, or `tokens` decoded after a prompt by each of `batch` sequences."""

    kind: str
    batch: int
    prompt: int
    tokens: int


_PREFILLS = 3
"""Prompts of which a turn takes the median, after one more."""


class Stack(Protocol):
    """A loaded model. Both return tokens per second; random token ids are below `vocab_size`, which settings give."""

    def prefill(self, tokens: int) -> float:
        """One prompt's, until its first token is there."""

    def decode(self, batch: int, prompt: int, tokens: int) -> float:
        """Of all sequences together, while all of them decode; the prompts' prefill is not in it."""


def full_batch_rate(times: list[float], batch: int) -> float:
    """Tokens per second over steps that each gave every sequence of the batch one token.

    Args:
        times: when each such step ended, in seconds; the first only starts the clock.
        batch: sequences.

    Raises:
        RuntimeError: fewer than two such steps were seen.
    """
    if len(times) < 2:
        raise RuntimeError(f"the {batch} sequences were never decoded together: give them more tokens")
    return batch * (len(times) - 1) / (times[-1] - times[0])


def serve(load: Callable[[dict[str, Any]], tuple[Stack, dict[str, str]]]) -> None:
    """The process's end: load the model, then measure what standard input asks for.

    Args:
        load: takes the settings; returns the model and the versions of what runs it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a benchmark that is killed takes this with it
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the replies
    stack, versions = load(json.loads(sys.argv[1]))
    print(json.dumps({"versions": versions}), file=replies)
    warm: set[Column] = set()
    for line in sys.stdin:
        column = Column(**json.loads(line))
        if column not in warm:  # kernels are made and memory is taken for a shape that is seen first
            warm.add(column)
            _measure(stack, column if column.kind == "prefill" else column._replace(prompt=16, tokens=4))
        print(json.dumps({"rate": _measure(stack, column)}), file=replies)


def _measure(stack: Stack, column: Column) -> float:
    if column.kind == "prefill":
        # While the others had their turns, threads fell asleep and weights left the caches: one prompt, of a quarter of
        # a second, would measure how a stack wakes up.
        stack.prefill(column.tokens)
        return statistics.median(stack.prefill(column.tokens) for _ in range(_PREFILLS))
    return stack.decode(column.batch, column.prompt, column.tokens)


class WorkerError(Exception):
    """A process could not load its model or measure; the message is one sentence with the log's last line."""


class Worker:
    """The benchmark's end: a process of its own, with a session of its own, that holds one loaded model.

    Args:
        python: the interpreter of the stack's environment.
        script: of this folder.
        settings: what `load` is given.
        log: where the process's output goes.
        environment: variables beside the benchmark's own.
        timeout: seconds that loading, or one measurement, may take.

    Raises:
        WorkerError: the model was not loaded.
    """

    def __init__(
        self,
        python: Path,
        script: str,
        settings: dict[str, Any],
        log: Path,
        *,
        environment: dict[str, str],
        timeout: float = 600.0,
    ) -> None:
        self._log, self._timeout = log, timeout
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [python, Path(__file__).with_name(script), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        try:
            self.versions: dict[str, str] = self._reply()["versions"]
        except BaseException:
            self.close()
            raise

    def measure(self, column: Column) -> float:
        """Tokens per second of a column; the first time, after a warm-up."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(column._asdict()), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the reply says why
        return float(self._reply()["rate"])

    def close(self) -> None:
        """End the process and all that it started: by the end of its input if it is quick, else by force."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Timer(self._timeout, lambda: os.killpg(self._process.pid, signal.SIGKILL))
        late.start()
        try:
            line = self._process.stdout.readline()
        finally:
            late.cancel()
        if not line:
            raise WorkerError(f"{last_line(self._log)} (log: {self._log})")
        reply: dict[str, Any] = json.loads(line)
        return reply


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word"
