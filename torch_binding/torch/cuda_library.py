# SPDX-License-Identifier: Apache-2.0
"""Launches of the CUDA library on torch's tensors.

A launch takes its workspace from torch's allocator and the tensors' addresses, checks shapes, and enqueues: it never
waits for the device and reads nothing back, so that it can be captured in a CUDA graph. The stream is a number, so the
interpreter of the kernels (`plugin/testing/simt`), whose memory is the host's, takes the same launches.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from adaptive_k_moe.errors import DependencyError, DeviceError
from adaptive_k_moe.libraries import find_library
from adaptive_k_moe.plugin import _plugin
from adaptive_k_moe.plugin.c_api import ELEMENTS, PATHS, Interface, MoeInterface
from adaptive_k_moe.plugin.description import MAMBA, MOE, Operator

VARIABLE = "ADAPTIVE_K_CUDA_LIBRARY"
NAME = "libadaptive_k_cuda.so"

Tensors = dict[str, Any]
Attributes = dict[str, Any]

# What vector loads and cp.async need of an address, by the launchers' headers.
_ALIGNMENT = 16
_ALIGNED = frozenset(
    {"hidden_states", "up", "down", "conv_input", "conv_weight", "conv_bias", "conv_state", "ssm_state"}
)


class CudaLibrary:
    """The library, loaded.

    Args:
        path: of `libadaptive_k_cuda.so`, or of the interpreter's library.

    Raises:
        DependencyError: it does not load.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise DependencyError(f"the CUDA library {path} does not load: {error}.") from None
        self._moe = MoeInterface(library)
        self._mamba = Interface(library, MAMBA)

    def on_stream(self, name: str, tensors: Tensors, attributes: Attributes) -> Any:
        """Calls `moe`, `route` or `mamba2` on the current stream of the tensors' device."""
        device = next(tensor.device for tensor in tensors.values() if tensor is not None)
        with torch.cuda.device(device):
            return getattr(self, name)(tensors, attributes, torch.cuda.current_stream(device).cuda_stream)

    def moe(self, tensors: Tensors, attributes: Attributes, stream: int | None) -> tuple[Any, Any, Any, Any]:
        """Output, k, entropy and the tokens of each expert."""
        hidden, logits = tensors["hidden_states"], tensors["router_logits"]
        sizes = _plugin.moe_sizes(attributes, _shapes(MOE, tensors), 8 * tensors["up"].element_size())
        sizes["element"] = _element(MOE, hidden)
        layer = self._moe.layer(sizes, attributes)
        tokens, experts = sizes["tokens"], sizes["experts"]
        outputs = {
            "output": torch.empty_like(hidden),
            "k": logits.new_empty(tokens, dtype=torch.int32),
            "entropy": logits.new_empty(tokens),
            "expert_load": logits.new_zeros(experts, dtype=torch.int32),  # of no tokens nothing is launched
        }
        self._launch(self._moe, MOE, layer, tensors, outputs, stream)
        return outputs["output"], outputs["k"], outputs["entropy"], outputs["expert_load"]

    def route(self, tensors: Tensors, attributes: Attributes, stream: int | None) -> tuple[Any, Any, Any, Any]:
        """K, entropy, experts and weights."""
        logits = tensors["router_logits"]
        sizes = _plugin.moe_sizes(attributes, _shapes(MOE, tensors), 8)
        layer = self._moe.layer({**sizes, "path": PATHS["route"]}, attributes)
        tokens, width = sizes["tokens"], sizes["largest_k"]
        outputs = {"k": logits.new_empty(tokens, dtype=torch.int32), "entropy": logits.new_empty(tokens)}
        workspace = self._launch(self._moe, MOE, layer, tensors, outputs, stream)
        # Copies, so that the results share no memory and keep no workspace.
        lists = (
            self._left(layer, workspace, name, dtype, tokens * width).view(tokens, width).clone()
            for name, dtype in (("experts", torch.int32), ("weights", torch.float32))
        )
        return *outputs.values(), *lists

    def mamba2(self, tensors: Tensors, attributes: Attributes, stream: int | None) -> Any:
        """The outputs; the states are updated in place."""
        conv_input, states = tensors["conv_input"], [tensors["conv_state"], tensors["ssm_state"]]
        sizes = _plugin.mamba_sizes(attributes, _shapes(MAMBA, tensors))
        layer = self._mamba.layer({**sizes, "element": _element(MAMBA, conv_input)}, attributes)
        y = conv_input.new_empty(sizes["tokens"], sizes["heads"] * sizes["head_dim"])
        outputs = dict(zip(MAMBA.output_names(), (y, *states), strict=True))
        self._launch(self._mamba, MAMBA, layer, tensors, outputs, stream)
        return y

    def _launch(
        self,
        interface: Interface,
        operator: Operator,
        layer: Any,
        tensors: Tensors,
        outputs: Tensors,
        stream: int | None,
    ) -> Any:
        """Enqueues a launch; its workspace, which the caching allocator gives to none but later work of the stream."""
        if (wrong := interface.check(layer)) is not None:
            raise ValueError(f"{operator.name}: {wrong}")
        pointers = {name: tensor.data_ptr() for name, tensor in (tensors | outputs).items() if tensor is not None}
        for name in _ALIGNED & pointers.keys():
            if pointers[name] % _ALIGNMENT:
                raise ValueError(f"{operator.name}: input {name} must begin at a multiple of {_ALIGNMENT} bytes")
        some = next(iter(outputs.values()))
        # The launcher wants 256 bytes; torch gives 512 on GPUs and 64 on CPUs.
        memory = torch.empty(interface.workspace_size(layer) + 256, dtype=torch.uint8, device=some.device)
        workspace = memory[-memory.data_ptr() % 256 :]
        if (status := interface.launch(layer, pointers, workspace.data_ptr(), stream)) != 0:
            raise DeviceError(f"{operator.name}: the launch failed with CUDA's error {status}.")
        return workspace

    def _left(self, layer: Any, workspace: Any, name: str, dtype: Any, count: int) -> Any:
        """An array of 32-bit numbers that a launch leaves in its workspace."""
        begin = self._moe.workspace_offset(layer, name)
        return workspace[begin : begin + 4 * count].view(dtype)


def _element(operator: Operator, tensor: Any) -> int:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in ELEMENTS:
        raise ValueError(f"{operator.name}: {operator.inputs[0].name} is {name} but must be one of {list(ELEMENTS)}")
    return ELEMENTS[name]


def _shapes(operator: Operator, tensors: Tensors) -> list[list[int] | None]:
    values = (tensors[tensor.name.lower()] for tensor in operator.inputs)
    return [None if value is None else list(value.shape) for value in values]


@functools.cache
def cuda_library() -> CudaLibrary:
    """The library: where the environment says, or in the installed package.

    Raises:
        DependencyError: it is not there, or does not load.
    """
    return CudaLibrary(find_library(NAME, VARIABLE, "CUDA library", "build it with `make cuda`, in build/cuda,"))
