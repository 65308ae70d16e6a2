# SPDX-License-Identifier: Apache-2.0
"""The CUDA launcher through its C interface, for the interpreter's library and for a GPU's alike."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from adaptive_k_moe.plugin.c_api import ELEMENTS, PATHS, MoeInterface
from adaptive_k_moe.plugin.description import MAX_K, MOE

Array = npt.NDArray[Any]

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


POINTERS = [tensor.name for tensor in (*MOE.inputs, *MOE.outputs)]


@dataclass
class Layer:
    """A layer's shape and attributes, named as the operator's."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    policies: int = 1
    choices: int = 1
    element: str = "float16"
    weights: str = "element"
    group_size: int = 0
    path: str = "auto"
    activation: str = "swiglu"
    scoring: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    max_k: int = 0
    first_expert: int = -1
    local_experts: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """As the C interface takes them."""
        return {**vars(self), "element": ELEMENTS[self.element], "path": PATHS[self.path]}

    @property
    def attributes(self) -> dict[str, Any]:
        """The operator's, all of them."""
        return {**MOE.defaults(), **vars(self), "weight_format": "" if self.weights == "element" else self.weights}

    @property
    def range(self) -> slice:
        """The experts whose weights a launch has."""
        return (
            slice(self.first_expert, self.first_expert + self.local_experts) if self.first_expert >= 0 else slice(None)
        )

    @property
    def capacity(self) -> int:
        """The most experts that a token may select."""
        selectable = self.experts // self.n_group * self.topk_group if self.n_group > 1 else self.experts
        return min(self.max_k or MAX_K, selectable)


@dataclass
class Result:
    """Outputs, and what routing and plan left in the workspace."""

    output: Array
    k: Array
    entropy: Array
    expert_load: Array
    experts: Array = field(default_factory=lambda: np.zeros(0))
    weights: Array = field(default_factory=lambda: np.zeros(0))
    offsets: Array = field(default_factory=lambda: np.zeros(0))
    active: Array = field(default_factory=lambda: np.zeros(0))
    row_token: Array = field(default_factory=lambda: np.zeros(0))
    token_rows: Array = field(default_factory=lambda: np.zeros(0))


class Library:
    """The C interface of a loaded library."""

    def __init__(self, path: str) -> None:
        self.lib = ctypes.CDLL(path)
        self.moe = MoeInterface(self.lib)

    def c(self, layer: Layer) -> Any:
        return self.moe.layer(layer.sizes, layer.attributes)

    def check(self, layer: Layer) -> str | None:
        return self.moe.check(self.c(layer))

    def workspace_size(self, layer: Layer) -> int:
        return self.moe.workspace_size(self.c(layer))

    def path(self, layer: Layer) -> str:
        return self.moe.path(self.c(layer))

    def offset(self, layer: Layer, name: str) -> int:
        return self.moe.workspace_offset(self.c(layer), name)

    def launch(self, layer: Layer, pointers: dict[str, int | None], workspace: int, stream: int | None = None) -> int:
        return self.moe.launch(self.c(layer), pointers, workspace, stream)


def read_workspace(library: Library, layer: Layer, read: Callable[[int, int], bytes]) -> dict[str, Array]:
    """Routing and plan of a finished launch; read(offset, size) gives the workspace's bytes."""

    def part(name: str, dtype: type[np.generic], *shape: int) -> Array:
        size = int(np.prod(shape)) * 4
        return np.frombuffer(read(library.offset(layer, name), size), dtype).reshape(shape)

    offsets = part("offsets", np.int32, layer.experts + 1)
    active = int(part("num_active", np.int32, 1)[0])
    return {
        "experts": part("experts", np.int32, layer.tokens, layer.capacity),
        "weights": part("weights", np.float32, layer.tokens, layer.capacity),
        "offsets": offsets,
        "active": part("active", np.int32, layer.experts)[:active],
        "row_token": part("row_token", np.int32, layer.tokens * layer.capacity)[: offsets[-1]],
        "token_rows": part("token_rows", np.int32, layer.tokens, layer.capacity),
    }


class Interpreter(Library):
    """The kernels in the interpreter, on NumPy arrays."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.lib.simt_last_error.restype = ctypes.c_char_p
        self.lib.simt_launches.restype = ctypes.c_char_p
        self.lib.simt_set_seed.argtypes = [ctypes.c_uint64]

    def launches(self) -> set[tuple[str, int, int]]:
        """Kernels launched so far, without template arguments, with their threads and shared memory."""
        lines = self.lib.simt_launches().decode().splitlines()
        found = set()
        for line in lines:
            name, threads, shared = line.rsplit(maxsplit=2)
            found.add((name.strip("()").split("<")[0], int(threads), int(shared)))
        return found

    def run(
        self,
        layer: Layer,
        inputs: dict[str, Array | None],
        *,
        seed: int = 0,
        fault: int = 0,
        multiprocessors: int = 4,
        garbage: int = 0xC5,
    ) -> Result:
        """Runs one launch, with workspace and shared memory full of that byte before.

        Raises:
            RuntimeError: A kernel failed; the message is the interpreter's sentence.
        """
        self.lib.simt_clear_error()
        self.lib.simt_set_seed(seed)
        self.lib.simt_set_fault(fault)
        self.lib.simt_set_multiprocessors(multiprocessors)
        self.lib.simt_set_garbage(garbage)
        output = np.full((layer.tokens, layer.hidden), 77, DTYPES[layer.element])
        k = np.full(layer.tokens, -1, np.int32)
        entropy = np.full(layer.tokens, np.nan, np.float32)  # read too early, it keeps a token from sharing
        load = np.full(layer.experts, -1, np.int32)
        # As large as promised, with room to align it.
        size = self.workspace_size(layer)
        memory = np.full(size + 256, garbage, np.uint8)
        skip = -memory.ctypes.data % 256
        guard = memory[skip + size :].copy()
        arrays = {**inputs, "output": output, "k": k, "entropy": entropy, "expert_load": load}
        pointers = {name: None if arrays.get(name) is None else arrays[name].ctypes.data for name in POINTERS}
        status = self.launch(layer, pointers, memory.ctypes.data + skip)
        self.lib.simt_set_fault(0)
        if status != 0:
            raise RuntimeError(f"launch returned {status}: {self.lib.simt_last_error().decode()}")
        if not (memory[skip + size :] == guard).all():
            raise RuntimeError("the workspace was written past its end")
        result = Result(output, k, entropy, load)
        if layer.tokens:
            parts = read_workspace(self, layer, lambda at, size: memory[skip + at : skip + at + size].tobytes())
            for name, value in parts.items():
                setattr(result, name, value)
        return result
