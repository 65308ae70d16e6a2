# SPDX-License-Identifier: Apache-2.0
"""Mamba2 on a GPU: a layer whose inputs, states, outputs and workspace lie there."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gpu_device import CudaError, Gpu, error_name

from cuda_launcher import DTYPES  # isort: skip
from cuda_mamba import MambaLayer, MambaLibrary, layer_of  # isort: skip
from mamba_oracle import Case  # isort: skip

Array = npt.NDArray[Any]


class DeviceMamba:
    """A step ready to be launched any number of times; the states are updated in place."""

    def __init__(self, gpu: Gpu, layer: MambaLayer, inputs: dict[str, Array]) -> None:
        self.gpu, self.layer, self.library = gpu, layer, MambaLibrary(gpu)
        driver = gpu.driver
        self.pointers: dict[str, int | None] = {}
        for name, array in inputs.items():
            self.pointers[name] = driver.allocate(array.nbytes)
            self.update(name, array)
        self._shapes = {
            "y": ((layer.tokens, layer.heads * layer.head_dim), DTYPES[layer.element]),
            "conv_state": (inputs["conv_state"].shape, DTYPES[layer.element]),
            "ssm_state": (inputs["ssm_state"].shape, np.dtype(np.float32)),
        }
        size = self._size("y")
        self.pointers["y"] = driver.allocate(size)
        driver.fill(self.pointers["y"] or 0, 0xC5, max(size, 1))
        size = self.library.workspace_size(layer)
        self.workspace = driver.allocate(size)
        driver.fill(self.workspace, 0xC5, max(size, 1))

    def _size(self, name: str) -> int:
        shape, dtype = self._shapes[name]
        return int(np.prod(shape)) * dtype.itemsize

    def update(self, name: str, array: Array) -> None:
        self.gpu.driver.write(self.pointers[name] or 0, array)

    def launch(self, stream: int) -> None:
        states = {f"present_{name}": self.pointers[name] for name in ("conv_state", "ssm_state")}
        status = self.library.launch(self.layer, {**self.pointers, **states}, self.workspace, stream)
        if status != 0:
            raise CudaError(f"launch returned {error_name(status)}")

    def result(self) -> tuple[Array, Array, Array]:
        """y, convolution and scan states as they are now."""

        def read(name: str) -> Array:
            shape, dtype = self._shapes[name]
            data = self.gpu.driver.read(self.pointers[name] or 0, self._size(name))
            return np.frombuffer(data, dtype).reshape(shape)

        return read("y"), read("conv_state"), read("ssm_state")

    def free(self) -> None:
        for pointer in (*self.pointers.values(), self.workspace):
            self.gpu.driver.free(pointer or 0)


def run(gpu: Gpu, case: Case, inputs: dict[str, Array], element: str) -> tuple[Array, Array, Array]:
    """One launch, waited for, on inputs as `cuda_mamba.make` gives them."""
    step = DeviceMamba(gpu, layer_of(case, inputs, element), inputs)
    step.launch(gpu.stream)
    gpu.driver.synchronize(gpu.stream)
    result = step.result()
    step.free()
    return result
