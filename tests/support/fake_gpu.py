# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N802, N803, N815 (the names are CUDA's)
"""A GPU for tests, below the session's seam: the parts of `cuda.bindings.runtime` that it calls, and a ``tensorrt``.

Device memory is NumPy's, at addresses that the host cannot read, and full of NaN at first. Work given to a stream is
done late and, where streams do not wait for each other, in a random order; so whatever the host reads or overwrites
too early comes out wrong. What CUDA and TensorRT leave undefined is a `MisuseError`, and noted, since a serving engine
turns an error into an answer.
"""

from __future__ import annotations

import bisect
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import numpy as np

ALIGNMENT = 256


class MisuseError(AssertionError):
    """What real hardware would answer with an error, a wrong number, or not at all."""


Error = IntEnum(
    "Error",
    {
        "cudaSuccess": 0,
        "cudaErrorInvalidValue": 1,
        "cudaErrorMemoryAllocation": 2,
        "cudaErrorIllegalAddress": 700,
        "cudaErrorStreamCaptureUnsupported": 900,
    },
)
Kind = IntEnum("Kind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaMemcpyDeviceToDevice": 3})
CaptureMode = IntEnum("CaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})

Op = Callable[[], None]


class Memory:
    """Allocations at made-up addresses, with gaps between."""

    def __init__(self, gpu: Gpu, capacity: int) -> None:
        self._gpu, self.capacity, self.used = gpu, capacity, 0
        self._starts: list[int] = []
        self._buffers: dict[int, np.ndarray] = {}
        self._next = 1 << 40

    def allocate(self, size: int) -> int | None:
        if self.used + size > self.capacity:
            return None
        address = self._next
        self._next += -(-size // ALIGNMENT) * ALIGNMENT + 4096
        self._buffers[address] = np.full(size, 0xFF, np.uint8)
        bisect.insort(self._starts, address)
        self.used += size
        return address

    def free(self, address: int) -> None:
        if address not in self._buffers:
            raise self._gpu.misuse(f"free of {address:#x}, which is not allocated")
        self.used -= self._buffers.pop(address).size
        self._starts.remove(address)

    def view(self, address: int, size: int) -> np.ndarray:
        index = bisect.bisect_right(self._starts, address) - 1
        start = self._starts[index] if index >= 0 else 0
        if index < 0 or address + size > start + self._buffers[start].size:
            raise self._gpu.misuse(f"{size} bytes at {address:#x} are not within one allocation")
        return self._buffers[start][address - start : address - start + size]


class Gpu:
    """The device; see the module.

    Args:
        seed: of the order in which independent work is done.
        capacity: bytes of device memory.
    """

    def __init__(self, seed: int = 0, capacity: int = 1 << 30) -> None:
        self.memory = Memory(self, capacity)
        self.pinned: dict[int, np.ndarray] = {}
        self.streams: dict[int, deque[Op | tuple[int, int]]] = {}
        self.events: dict[int, int] = {}  # records asked for
        self.done: dict[int, int] = {}  # records passed
        self.graphs: dict[int, list[Op]] = {}
        self.executables: dict[int, list[Op]] = {}
        self.capturing: tuple[int, list[Op]] | None = None
        self.sticky: Error | None = None
        self.failures: dict[str, Error] = {}
        self.counts: dict[str, int] = {}
        self.tensorrt_refuses_capture = False
        self.misuses: list[str] = []
        self._random = random.Random(seed)
        self._handles = 1000
        self.cudart: Any = Cudart(self)

    @contextmanager
    def installed(self) -> Iterator[Gpu]:
        """Its modules in the place of CUDA's and TensorRT's; at the end nothing may be left on it, or be wrong."""
        from fake_tensorrt import make_tensorrt

        names: dict[str, Any] = {"cuda.bindings.runtime": self.cudart, "tensorrt": make_tensorrt(self)}
        before = {name: sys.modules.get(name) for name in names}
        sys.modules.update(names)
        try:
            yield self
        finally:
            for name, module in before.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module
        if self.misuses:
            raise MisuseError("; ".join(self.misuses))
        if left := self.left:
            raise MisuseError(f"left behind: {left}")

    @property
    def left(self) -> dict[str, int]:
        """What was allocated or created and is still there."""
        held = {"bytes": self.memory.used, "pinned": len(self.pinned), "streams": len(self.streams)}
        held |= {"events": len(self.events), "graphs": len(self.graphs), "executables": len(self.executables)}
        return {kind: count for kind, count in held.items() if count}

    def handle(self) -> int:
        self._handles += 1
        return self._handles

    def misuse(self, sentence: str) -> MisuseError:
        self.misuses.append(sentence)
        return MisuseError(sentence)

    def push(self, stream: int, op: Op) -> None:
        if self.capturing is not None and self.capturing[0] == stream:
            self.capturing[1].append(op)
        else:
            self.streams[stream].append(op)

    def host(self, address: int, size: int) -> np.ndarray:
        """Pinned memory at an address."""
        for start, array in self.pinned.items():
            if start <= address and address + size <= start + array.size:
                return array[address - start : address - start + size]
        raise self.misuse(f"{size} bytes at {address:#x} on the host are not page-locked")

    def synchronize(self, stream: int) -> None:
        """Do a stream's work, and as much of the others' as chance has it, or as it waits for."""
        while self.streams[stream]:
            others = [other for other in self.streams if other != stream]
            if others and self._random.random() < 0.3:
                self._advance(self._random.choice(others))
            if not self._advance(stream) and not any(self._advance(other) for other in others):
                raise self.misuse("streams wait for each other, or for an event that nobody records")

    def drain(self) -> None:
        for stream in list(self.streams):
            self.synchronize(stream)

    def _advance(self, stream: int) -> bool:
        queue = self.streams[stream]
        if not queue:
            return False
        op = queue[0]
        if isinstance(op, tuple):
            event, record = op
            if self.done[event] < record:
                return False
            queue.popleft()
            return True
        queue.popleft()
        if self.sticky is None:
            op()
        return True


class Cudart:
    """`cuda.bindings.runtime`."""

    cudaError_t = Error
    cudaMemcpyKind = Kind
    cudaStreamCaptureMode = CaptureMode
    cudaHostAllocDefault = 0
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(found) or isinstance(found, type):
            return found
        gpu = self._gpu

        def call(*arguments: Any) -> Any:
            gpu.counts[name] = gpu.counts.get(name, 0) + 1
            if name in gpu.failures:
                return gpu.failures.pop(name), None
            if gpu.sticky is not None and name != "cudaGetErrorString":
                return gpu.sticky, None
            allowed = (
                "cudaStreamEndCapture",
                "cudaGetLastError",
                "cudaMemcpyAsync",
                "cudaMemcpy2DAsync",
                "cudaMemsetAsync",
            )
            if gpu.capturing is not None and name not in allowed:
                gpu.misuse(f"{name} during capture")
                return Error.cudaErrorStreamCaptureUnsupported, None
            return found(*arguments)

        return call

    def cudaGetDeviceCount(self) -> Any:
        return Error.cudaSuccess, 1

    def cudaGetLastError(self) -> Any:
        return (self._gpu.sticky or Error.cudaSuccess,)

    def cudaGetErrorString(self, error: Error) -> Any:
        return Error.cudaSuccess, f"error {int(error)}".encode()

    def cudaMalloc(self, size: int) -> Any:
        address = self._gpu.memory.allocate(size)
        return (Error.cudaErrorMemoryAllocation, None) if address is None else (Error.cudaSuccess, address)

    def cudaFree(self, devPtr: int) -> Any:
        self._gpu.drain()
        self._gpu.memory.free(devPtr)
        return (Error.cudaSuccess,)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        array = np.full(size, 0xEE, np.uint8)
        self._gpu.pinned[array.ctypes.data] = array
        return Error.cudaSuccess, array.ctypes.data

    def cudaFreeHost(self, ptr: int) -> Any:
        self._gpu.drain()
        del self._gpu.pinned[ptr]
        return (Error.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        assert flags == self.cudaStreamNonBlocking
        handle = self._gpu.handle()
        self._gpu.streams[handle] = deque()
        return Error.cudaSuccess, handle

    def cudaStreamDestroy(self, stream: int) -> Any:
        self._gpu.synchronize(stream)
        del self._gpu.streams[stream]
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> Any:
        self._gpu.synchronize(stream)
        return (self._gpu.sticky or Error.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> Any:
        self._gpu.streams[stream].append((event, self._gpu.events[event]))
        return (Error.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        handle = self._gpu.handle()
        self._gpu.events[handle] = self._gpu.done[handle] = 0
        return Error.cudaSuccess, handle

    def cudaEventDestroy(self, event: int) -> Any:
        del self._gpu.events[event]
        return (Error.cudaSuccess,)

    def cudaEventRecord(self, event: int, stream: int) -> Any:
        gpu = self._gpu
        gpu.events[event] += 1
        record = gpu.events[event]

        def passed() -> None:
            gpu.done[event] = max(gpu.done[event], record)

        gpu.push(stream, passed)
        return (Error.cudaSuccess,)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> Any:
        gpu = self._gpu
        gpu.push(stream, lambda: gpu.memory.view(devPtr, count).fill(value))
        return (Error.cudaSuccess,)

    def cudaMemset2DAsync(self, devPtr: int, pitch: int, value: int, width: int, height: int, stream: int) -> Any:
        assert width <= pitch
        gpu = self._gpu

        def fill() -> None:
            for row in range(height):
                gpu.memory.view(devPtr + row * pitch, width).fill(value)

        gpu.push(stream, fill)
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Kind, stream: int) -> Any:
        gpu = self._gpu

        def copy() -> None:
            if kind is Kind.cudaMemcpyHostToDevice:
                gpu.memory.view(dst, count)[:] = gpu.host(src, count)
            else:
                assert kind is Kind.cudaMemcpyDeviceToHost
                gpu.host(dst, count)[:] = gpu.memory.view(src, count)

        gpu.push(stream, copy)
        return (Error.cudaSuccess,)

    def cudaMemcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: Kind, stream: int
    ) -> Any:
        assert kind is Kind.cudaMemcpyDeviceToDevice
        assert width <= min(dpitch, spitch)
        gpu = self._gpu

        def copy() -> None:
            for row in range(height):
                gpu.memory.view(dst + row * dpitch, width)[:] = gpu.memory.view(src + row * spitch, width)

        gpu.push(stream, copy)
        return (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: CaptureMode) -> Any:
        assert mode is CaptureMode.cudaStreamCaptureModeThreadLocal
        self._gpu.capturing = (stream, [])
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> Any:
        assert self._gpu.capturing is not None
        captured, ops = self._gpu.capturing
        assert captured == stream
        self._gpu.capturing = None
        handle = self._gpu.handle()
        self._gpu.graphs[handle] = ops
        return Error.cudaSuccess, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:
        assert flags == 0
        handle = self._gpu.handle()
        self._gpu.executables[handle] = list(self._gpu.graphs[graph])
        return Error.cudaSuccess, handle

    def cudaGraphDestroy(self, graph: int) -> Any:
        del self._gpu.graphs[graph]
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> Any:
        for op in self._gpu.executables[graphExec]:
            self._gpu.push(stream, op)
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, graphExec: int) -> Any:
        del self._gpu.executables[graphExec]
        return (Error.cudaSuccess,)
