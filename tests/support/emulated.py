# SPDX-License-Identifier: Apache-2.0
"""The compiled operators of another processor, run by an emulator, in the place of this machine's (`make arm`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptive_k_moe.plugin.description import MAMBA

from checkpoints import REPOSITORY

PROGRAM = REPOSITORY / "build" / "arm" / "build" / "plugin" / "testing" / "call" / "adaptive_k_call"
EMULATOR = "qemu-aarch64-static"
LIBRARIES = "/usr/aarch64-linux-gnu"  # Debian's, which come with the cross compiler


def missing() -> str | None:
    """What is not here; with ADAPTIVE_K_REQUIRE_ARM set that is an error."""
    here = PROGRAM.exists() and shutil.which(EMULATOR) is not None
    reason = None if here else f"{PROGRAM.relative_to(REPOSITORY)} or {EMULATOR} is not here: make arm"
    if reason and os.environ.get("ADAPTIVE_K_REQUIRE_ARM"):
        raise RuntimeError(reason)
    return reason


class Emulated:
    """What `adaptive_k_moe.plugin` calls of its compiled module, answered by plugin/testing/call under the emulator."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [EMULATOR, "-L", LIBRARIES, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def instruction_set(self) -> str:
        return self._ask("instruction_set", None, {}, []).decode()

    def moe(
        self, attributes: dict[str, Any], inputs: Sequence[Any], num_threads: int | None, *outputs: np.ndarray[Any, Any]
    ) -> None:
        _fill(outputs, self._ask("moe", num_threads, attributes, inputs))

    def route(self, attributes: dict[str, Any], inputs: Sequence[Any], *outputs: np.ndarray[Any, Any]) -> None:
        _fill(outputs, self._ask("route", None, attributes, inputs))

    def mamba2(
        self, attributes: dict[str, Any], inputs: Sequence[Any], num_threads: int | None, y: np.ndarray[Any, Any]
    ) -> None:
        states = [inputs[MAMBA.input_index(name)] for name in ("conv_state", "ssm_state")]
        _fill([y, *states], self._ask("mamba2", num_threads, attributes, inputs))

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0

    def _ask(self, call: str, threads: int | None, attributes: dict[str, Any], inputs: Sequence[Any]) -> bytes:
        arrays = {place: np.ascontiguousarray(array) for place, array in enumerate(inputs) if array is not None}
        lines = [call, threads or 0, len(attributes)]
        lines += [f"{name} {int(value) if isinstance(value, bool) else value}" for name, value in attributes.items()]
        lines += [len(arrays)]
        lines += [" ".join(map(str, (place, array.itemsize, *array.shape))) for place, array in arrays.items()]
        asked, answered = self._process.stdin, self._process.stdout
        assert asked is not None and answered is not None
        request = b"".join([*(f"{line}\n".encode() for line in lines), *(array.tobytes() for array in arrays.values())])
        with self._lock:
            try:
                asked.write(request)
                asked.flush()
                word, _, rest = answered.readline().decode().rstrip("\n").partition(" ")
                answer = answered.read(int(rest)) if word == "ok" else b""
            except BaseException:  # a test's time is over: the next would read this one's answer
                self._process.kill()
                raise
        if word == "error":
            raise ValueError(rest)
        assert word == "ok", f"the program ended with {self._process.wait()}"
        return answer


def _fill(outputs: Sequence[np.ndarray[Any, Any]], answer: bytes) -> None:
    assert sum(output.nbytes for output in outputs) == len(answer)
    for output in outputs:
        output[...] = np.frombuffer(answer, output.dtype, output.size).reshape(output.shape)
        answer = answer[output.nbytes :]
