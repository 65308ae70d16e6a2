# SPDX-License-Identifier: Apache-2.0
"""libadaptive_k_cuda.so on a GPU, through the driver's own interface (no torch, no cudart)."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda_launcher import DTYPES, POINTERS, Layer, Library, Result, read_workspace

Array = npt.NDArray[Any]
ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(os.environ.get("ADAPTIVE_K_CUDA_LIBRARY", ROOT / "build" / "cuda" / "libadaptive_k_cuda.so"))


DRIVER = os.environ.get("ADAPTIVE_K_LIBCUDA", "libcuda.so.1")


class CudaError(RuntimeError):
    """A call of the driver or the library failed; the message ends in the error's name and number."""


def error_name(status: int) -> str:
    """CUDA's name and number of an error (a cudaError_t is a CUresult, but for a few that never reach a launch)."""
    name = ctypes.c_char_p()
    found = ctypes.CDLL(DRIVER).cuGetErrorName(status, ctypes.byref(name)) == 0 and name.value
    return f"{found.decode() if found else 'error'} ({status})"


def missing() -> str | None:
    """Why GPU tests cannot run here, or None."""
    if not LIBRARY.exists():
        return f"{LIBRARY} is not built: make cuda"
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return f"no NVIDIA driver here ({DRIVER})"
    count = ctypes.c_int()
    if (status := driver.cuInit(0)) != 0 or (status := driver.cuDeviceGetCount(ctypes.byref(count))) != 0:
        return f"no NVIDIA GPU here: {error_name(status)}"
    return None if count.value else "no NVIDIA GPU here"


class Driver:
    """The few driver calls that tests and benchmarks need, on device 0's primary context.

    fill() and write() have ended on the device when they return: the driver puts both on the default stream, which
    the streams of launches do not wait for.
    """

    def __init__(self) -> None:
        self._driver = ctypes.CDLL(DRIVER)
        self._call("cuInit", 0)
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, 256, device)
        self.name = name.value.decode()
        numbers = [ctypes.c_int() for _ in range(2)]
        for number, attribute in zip(numbers, (75, 76), strict=True):
            self._call("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
        self.capability = f"{numbers[0].value}.{numbers[1].value}"

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._driver, function)(*arguments)
        if status != 0:
            raise CudaError(f"{function} returned {error_name(status)}")

    def broken(self) -> str | None:
        """The error that this process's context is lost to, or None; waits for all work."""
        status = self._driver.cuCtxSynchronize()
        return error_name(status) if status else None

    def version(self) -> str:
        """The newest CUDA that the driver knows."""
        number = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def free_memory(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def fill(self, address: int, byte: int, size: int) -> None:
        self._call("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_ubyte(byte), ctypes.c_size_t(size))
        self._call("cuCtxSynchronize")

    def write(self, address: int, array: Array) -> None:
        array = np.ascontiguousarray(array)
        if array.nbytes:
            size = ctypes.c_size_t(array.nbytes)
            self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data), size)
            self._call("cuCtxSynchronize")

    def read(self, address: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        if size:
            self._call("cuMemcpyDtoH_v2", buffer, ctypes.c_uint64(address), ctypes.c_size_t(size))
        return buffer.raw

    def copy(self, to: int, address: int, size: int, stream: int) -> None:
        addresses = ctypes.c_uint64(to), ctypes.c_uint64(address)
        self._call("cuMemcpyDtoDAsync_v2", *addresses, ctypes.c_size_t(size), ctypes.c_void_p(stream))

    def stream(self) -> int:
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), 1)  # does not wait for the default stream
        return stream.value or 0

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def begin_capture(self, stream: int) -> None:
        """From here to end_capture() whatever would wait for the device, or allocate, is an error."""
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), 0)

    def end_capture(self, stream: int) -> int:
        """The captured work as an executable graph."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        self._call("cuGraphDestroy", graph)
        return executable.value or 0

    def launch_graph(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def free_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", ctypes.c_void_p(graph))

    def event(self) -> int:
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), 0)
        return event.value or 0

    def record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def milliseconds(self, begin: int, end: int) -> float:
        self._call("cuEventSynchronize", ctypes.c_void_p(end))
        time = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(time), ctypes.c_void_p(begin), ctypes.c_void_p(end))
        return time.value


class DeviceLayer:
    """A layer whose inputs, outputs and workspace lie on the GPU, ready to launch any number of times."""

    def __init__(self, gpu: Gpu, layer: Layer, inputs: dict[str, Array | None]) -> None:
        self.gpu, self.layer = gpu, layer
        driver = gpu.driver
        self.pointers: dict[str, int | None] = dict.fromkeys(POINTERS)
        for name, array in inputs.items():
            if array is not None:
                self.pointers[name] = driver.allocate(array.nbytes)
                self.update(name, array)
        sizes = {
            "output": layer.tokens * layer.hidden * DTYPES[layer.element].itemsize,
            "k": layer.tokens * 4,
            "entropy": layer.tokens * 4,
            "expert_load": layer.experts * 4,
        }
        for name, size in sizes.items():
            self.pointers[name] = driver.allocate(size)
            driver.fill(self.pointers[name] or 0, 0xC5, max(size, 1))
        self._sizes = sizes
        size = gpu.workspace_size(layer)
        self.workspace = driver.allocate(size)
        driver.fill(self.workspace, 0xC5, size)

    def update(self, name: str, array: Array) -> None:
        self.gpu.driver.write(self.pointers[name] or 0, array)

    def launch(self, stream: int) -> None:
        status = self.gpu.launch(self.layer, self.pointers, self.workspace, stream)
        if status != 0 and (wrong := self.gpu.check(self.layer)):
            raise CudaError(f"the launch was refused: {wrong}")
        if status != 0:
            raise CudaError(f"launch returned {error_name(status)}")

    def result(self) -> Result:
        layer, read = self.layer, self.gpu.driver.read
        output = np.frombuffer(read(self.pointers["output"] or 0, self._sizes["output"]), DTYPES[layer.element])
        result = Result(
            output.reshape(layer.tokens, layer.hidden),
            np.frombuffer(read(self.pointers["k"] or 0, self._sizes["k"]), np.int32),
            np.frombuffer(read(self.pointers["entropy"] or 0, self._sizes["entropy"]), np.float32),
            np.frombuffer(read(self.pointers["expert_load"] or 0, self._sizes["expert_load"]), np.int32),
        )
        if layer.tokens:
            parts = read_workspace(self.gpu, layer, lambda at, size: read(self.workspace + at, size))
            for name, value in parts.items():
                setattr(result, name, value)
        return result

    def free(self) -> None:
        for pointer in (*self.pointers.values(), self.workspace):
            if pointer is not None:
                self.gpu.driver.free(pointer)


class Gpu(Library):
    """The library, and the device that it runs on."""

    def __init__(self) -> None:
        super().__init__(str(LIBRARY))
        self.driver = Driver()
        self.stream = self.driver.stream()

    def run(self, layer: Layer, inputs: dict[str, Array | None]) -> Result:
        """One launch, waited for."""
        on_device = DeviceLayer(self, layer, inputs)
        on_device.launch(self.stream)
        self.driver.synchronize(self.stream)
        result = on_device.result()
        on_device.free()
        return result
