# SPDX-License-Identifier: Apache-2.0
"""CUDA's runtime as the session needs it: memory, streams, events and graphs, with errors as exceptions."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.engine_format.tensorrt import ALIGNMENT
from adaptive_k_moe.errors import DependencyError, DeviceError, DeviceMemoryError

Bytes = npt.NDArray[np.uint8]


def aligned(size: int) -> int:
    """The size rounded up to whole units of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def import_cudart() -> Any:
    """The module `cuda.bindings.runtime`, with a GPU behind it.

    Raises:
        DependencyError: cuda-python is not installed.
        DeviceError: there is no GPU, or its driver does not fit.
    """
    try:
        cudart: Any = importlib.import_module("cuda.bindings.runtime")
        status, count = cudart.cudaGetDeviceCount()
    except (ImportError, RuntimeError) as error:
        raise DependencyError(
            f"running a TensorRT engine needs cuda-python ({str(error).splitlines()[0]}): install it with "
            "pip install 'adaptive-k-moe[tensorrt]'; an engine built with --target openvino runs without a GPU."
        ) from None
    if int(status) != 0 or not count:
        reason = cudart.cudaGetErrorString(status)[1].decode() if int(status) else "there is none"
        raise DeviceError(
            f"no NVIDIA GPU can be used here ({reason}): start it where there is one, with its driver; an engine built "
            "with --target openvino runs without a GPU."
        )
    return cudart


class Cuda:
    """The present device's memory, streams, events and graphs; addresses and handles are plain integers.

    Whatever was allocated or created is freed by `close` at the latest.

    Args:
        cudart: the module `cuda.bindings.runtime`.

    Raises:
        DeviceMemoryError: by every allocation that finds no room.
        DeviceError: by every call that fails. CUDA also reports here what earlier asynchronous work did wrong.
    """

    def __init__(self, cudart: Any) -> None:
        self._cudart = cudart
        # What frees what, in order of creation: handle, function.
        self._held: list[tuple[int, str]] = []

    def allocate(self, size: int) -> int:
        """Device memory of at least one byte, aligned to `ALIGNMENT`; what it holds is undefined."""
        return self._hold(int(self._allocate("cudaMalloc", max(size, 1))), "cudaFree")

    def allocate_pinned(self, size: int) -> Bytes:
        """Page-locked host memory [size], which copies can run from and to beside other work."""
        flags = self._cudart.cudaHostAllocDefault
        address = self._hold(int(self._allocate("cudaHostAlloc", max(size, 1), flags)), "cudaFreeHost")
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._held.remove((address, "cudaFree"))
        self._call("cudaFree", address)

    def make_stream(self) -> int:
        """A stream that does not wait for the default one."""
        flags = self._cudart.cudaStreamNonBlocking
        return self._hold(int(self._call("cudaStreamCreateWithFlags", flags)), "cudaStreamDestroy")

    def make_event(self) -> int:
        """An event that takes no times."""
        flags = self._cudart.cudaEventDisableTiming
        return self._hold(int(self._call("cudaEventCreateWithFlags", flags)), "cudaEventDestroy")

    def record(self, event: int, stream: int) -> None:
        """Let the event stand for all work that the stream has now."""
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """Let the stream's further work wait for the event; the host does not."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def synchronize(self, stream: int) -> None:
        """Wait on the host until the stream has done its work."""
        self._call("cudaStreamSynchronize", stream)

    def clear(self, address: int, size: int, stream: int) -> None:
        """Fill device memory with zeros."""
        self._call("cudaMemsetAsync", address, 0, size, stream)

    def clear_rows(self, address: int, *, width: int, height: int, pitch: int, stream: int) -> None:
        """Fill `height` rows of `width` bytes with zeros; they lie `pitch` bytes apart."""
        self._call("cudaMemset2DAsync", address, pitch, 0, width, height, stream)

    def upload(self, address: int, pinned: Bytes, stream: int) -> None:
        """Copy page-locked memory to the device; it must stay as it is until the stream has done so."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, pinned.ctypes.data, pinned.nbytes, kind, stream)

    def download(self, pinned: Bytes, address: int, stream: int) -> None:
        """Copy device memory to page-locked memory; it is there when the stream has done so."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", pinned.ctypes.data, address, pinned.nbytes, kind, stream)

    def copy_rows(self, to: int, source: int, *, width: int, height: int, pitch: int, stream: int) -> None:
        """Copy `height` rows of `width` bytes within the device; rows lie `pitch` bytes apart on both sides."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", to, pitch, source, pitch, width, height, kind, stream)

    def begin_capture(self, stream: int) -> None:
        """From here to `end_capture`, work given to the stream is noted and not done."""
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        """What was noted, as a graph that `launch` takes."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._hold(int(self._call("cudaGraphInstantiate", graph, 0)), "cudaGraphExecDestroy")
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        """Do a graph's work."""
        self._call("cudaGraphLaunch", graph, stream)

    def close(self) -> None:
        """Free everything that is still held, the latest first; a device that is lost keeps nobody from going on."""
        while self._held:
            handle, function = self._held.pop()
            getattr(self._cudart, function)(handle)

    def _hold(self, handle: int, function: str) -> int:
        self._held.append((handle, function))
        return handle

    def _allocate(self, function: str, size: int, *flags: int) -> Any:
        status, address = getattr(self._cudart, function)(size, *flags)
        if status == self._cudart.cudaError_t.cudaErrorMemoryAllocation:
            self._cudart.cudaGetLastError()
            where = "the GPU has" if function == "cudaMalloc" else "the host has"
            raise DeviceMemoryError(f"{where} no room for another {size / 1e6:.1f} MB.")
        self._require(function, status)
        return address

    def _call(self, function: str, *arguments: Any) -> Any:
        status, *results = getattr(self._cudart, function)(*arguments)
        self._require(function, status)
        return results[0] if results else None

    def _require(self, function: str, status: Any) -> None:
        if int(status) != 0:
            self._cudart.cudaGetLastError()  # or the next to ask would take it for its own
            reason = self._cudart.cudaGetErrorString(status)[1].decode()
            raise DeviceError(f"the GPU failed in {function}: {reason}.")
