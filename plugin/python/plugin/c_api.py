# SPDX-License-Identifier: Apache-2.0
"""The C interface of the CUDA library through ctypes (``plugin/cuda/*/c_api.h``): its structures and its calls.

The structures' order is that of the operators' tables. Nothing here knows where memory lies: addresses are numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

from adaptive_k_moe.plugin.description import MAMBA, MOE, Operator

ELEMENTS = {"float16": 0, "bfloat16": 1, "float32": 2}
"""The numbers of the types that hidden states may have."""

PATHS = {"auto": 0, "decode": 1, "prefill": 2, "route": 3}
"""The numbers of a launch's paths."""

_SIZES = {
    MOE.name: (
        "hidden",
        "intermediate",
        "experts",
        "policies",
        "choices",
        "element",
        "group_size",
        "path",
        "local_experts",
    ),
    MAMBA.name: ("sequences", "slots", "heads", "head_dim", "state_size", "taps", "element"),
}
_PREFIX = {MOE.name: "adaptive_k_cuda_", MAMBA.name: "adaptive_k_cuda_mamba_"}


class Interface:
    """An operator's calls.

    Args:
        library: the loaded library, or the interpreter's.
        operator: whose.

    Attributes:
        pointers: names of the addresses that a launch takes, in lower case, inputs and then outputs.
    """

    def __init__(self, library: ctypes.CDLL, operator: Operator) -> None:
        self._library = library
        self._operator = operator
        self._sizes = _SIZES[operator.name]
        self.pointers = [tensor.name.lower() for tensor in (*operator.inputs, *operator.outputs)]
        fields: list[tuple[str, Any]] = [("tokens", ctypes.c_int64), *((name, ctypes.c_int32) for name in self._sizes)]
        fields.append(("attributes", ctypes.c_double * len(operator.attributes)))
        self._layer: Any = type("Layer", (ctypes.Structure,), {"_fields_": fields})
        addresses = [(name, ctypes.c_void_p) for name in self.pointers]
        self._pointers: Any = type("Pointers", (ctypes.Structure,), {"_fields_": addresses})
        prefix = _PREFIX[operator.name]
        self._check, self._workspace_size, self._launch = (
            getattr(library, prefix + name) for name in ("check", "workspace_size", "launch")
        )
        self._check.restype = ctypes.c_char_p
        self._workspace_size.restype = ctypes.c_size_t
        self._launch.argtypes = [ctypes.c_void_p] * 4

    def layer(self, sizes: Mapping[str, int], attributes: Mapping[str, Any]) -> Any:
        """A layer's structure.

        Args:
            sizes: `tokens` and the others by their names in ``c_api.h``; more are passed over, and 0 stands for those
                that are missing.
            attributes: all of the operator's; more are passed over.
        """
        layer = self._layer(**{name: sizes.get(name, 0) for name in ("tokens", *self._sizes)})
        layer.attributes[:] = [
            attribute.words.index(attributes[attribute.name]) if attribute.words else float(attributes[attribute.name])
            for attribute in self._operator.attributes
        ]
        return layer

    def check(self, layer: Any) -> str | None:
        """The sentence that says why such a layer cannot run, or None."""
        wrong: bytes | None = self._check(ctypes.byref(layer))
        return None if wrong is None else wrong.decode()

    def workspace_size(self, layer: Any) -> int:
        """Bytes of scratch memory that a launch needs."""
        return int(self._workspace_size(ctypes.byref(layer)))

    def launch(self, layer: Any, pointers: Mapping[str, int | None], workspace: int | None, stream: int | None) -> int:
        """Enqueues the layer on the stream; returns a `cudaError_t`. Absent addresses are null."""
        addresses = self._pointers(**pointers)
        return int(self._launch(ctypes.byref(layer), ctypes.byref(addresses), workspace, stream))


class MoeInterface(Interface):
    """AdaptiveKMoe's calls."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library, MOE)
        self._library.adaptive_k_cuda_workspace_offset.restype = ctypes.c_int64

    def workspace_offset(self, layer: Any, name: str) -> int:
        """Where in the workspace a launch leaves the array of that name; -1 for others."""
        return int(self._library.adaptive_k_cuda_workspace_offset(ctypes.byref(layer), name.encode()))

    def path(self, layer: Any) -> str:
        """The path that a launch takes."""
        number = self._library.adaptive_k_cuda_path(ctypes.byref(layer))
        return next(name for name, value in PATHS.items() if value == number)
