# SPDX-License-Identifier: Apache-2.0
"""An engine's graph as functions of torch: a small table of standard ops, and the weights, loaded once.

Values that say a shape or an index are Python's own numbers and lists, on the host; all others are tensors.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from adaptive_k_moe.errors import EngineError

Function = Callable[..., Any]
Operators = Mapping[str, Function]

_DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT4: torch.int8,  # two in a byte
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
}


class _Call(NamedTuple):
    """A node: what it calls, and the values that nobody needs after it."""

    function: Function
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last: tuple[str, ...]


class Graph:
    """A graph whose nodes run one after another.

    Nodes of constants alone (a weight's transposition, integers that become floats) run once, here.

    Args:
        path: the ``.onnx`` file; its weights are mapped, and copied only to other devices than the CPU.
        device: where weights go and nodes run.
        operators: the functions of nodes that are no standard ops, by type; each is called with the node's attributes
            as a dictionary and then its inputs.

    Raises:
        EngineError: a node is of a type that is not known here.
    """

    def __init__(self, path: Path, device: Any, operators: Operators) -> None:
        proto = onnx.load(path, load_external_data=False).graph
        self._outputs = tuple(output.name for output in proto.output)
        self._device = device
        # Private: pages are shared between processes as long as nobody writes.
        data = path.with_name(f"{path.name}.data")
        self._data = torch.from_file(str(data), shared=False, size=data.stat().st_size, dtype=torch.uint8)
        self._tensors = {tensor.name: tensor for tensor in proto.initializer}
        self._constants: dict[str, Any] = {}

        fed = {value.name for value in proto.input}
        calls, folded = [], {}
        for node in proto.node:
            function = _function(node, operators)
            if fed.isdisjoint(node.input):
                folded[node.output[0]] = function, tuple(node.input)
            else:
                fed.update(node.output)
                calls.append((function, tuple(node.input), tuple(node.output)))
        uses = Counter(name for _, inputs, _ in calls for name in inputs)
        uses.update(self._outputs)
        self._weights = {name: self._constant(name, folded) for name in uses if name not in fed}
        del self._constants, self._tensors
        self._calls = []
        for function, inputs, outputs in calls:
            uses.subtract(inputs)
            last = tuple(name for name in {*inputs, *outputs} if not uses[name] and name not in self._weights)
            self._calls.append(_Call(function, inputs, outputs, last))

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        """The outputs, in the graph's order, for inputs by name."""
        values: dict[str, Any] = {**self._weights, **feeds}
        for function, inputs, outputs, last in self._calls:
            found = function(*[values[name] for name in inputs])
            if len(outputs) == 1:
                values[outputs[0]] = found
            else:
                values.update(zip(outputs, found, strict=True))
            for name in last:
                del values[name]
        return [values[name] for name in self._outputs]

    def _constant(self, name: str, folded: Mapping[str, tuple[Function, Sequence[str]]]) -> Any:
        """A weight, or what nodes make of weights alone; kept while the graph is loaded, for those that share one."""
        if name not in self._constants:
            if name in folded:
                function, inputs = folded[name]
                self._constants[name] = function(*[self._constant(each, folded) for each in inputs])
            else:
                self._constants[name] = self._load(self._tensors[name])
        return self._constants[name]

    def _load(self, tensor: TensorProto) -> Any:
        if tensor.data_location != TensorProto.EXTERNAL:
            array = numpy_helper.to_array(tensor)
            if array.dtype.kind == "i" or array.ndim == 0:  # a shape, an index or a limit
                return array.tolist()
            return torch.tensor(array.astype("float32")).to(self._device, _DTYPES[tensor.data_type])
        place = {entry.key: entry.value for entry in tensor.external_data}
        begin, length = int(place["offset"]), int(place["length"])
        values = self._data[begin : begin + length].view(_DTYPES[tensor.data_type])
        shape = list(tensor.dims)
        if tensor.data_type == TensorProto.INT4:
            return _unpack_int4(values.to(self._device)).view(shape)
        return values.view(shape).to(self._device)


def _function(node: onnx.NodeProto, operators: Operators) -> Function:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    call: Function | None
    if node.domain:
        known: Function | None = operators.get(node.op_type)
        words = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
        call = None if known is None else partial(known, words)
    else:
        maker = _OPS.get(node.op_type)
        call = None if maker is None else maker(**attributes)
    if call is None:
        raise EngineError(
            f"the engine's node {node.name} is a {node.op_type}, which this release does not run on torch: build the "
            "engine again."
        )
    return call


def _unpack_int4(values: Any) -> Any:
    """Each byte's two numbers, the low half's first."""
    return torch.stack([(values << 4) >> 4, values >> 4], dim=-1).flatten()


def _dequantize(axis: int, block_size: int = 0) -> Function:
    def call(integers: Any, scales: Any) -> Any:
        if block_size:
            spread = scales.repeat_interleave(block_size, dim=axis)
        else:
            spread = scales.view([-1 if dim == axis else 1 for dim in range(integers.dim())])
        return (integers.float() * spread.float()).to(scales.dtype)

    return call


def _gather(axis: int = 0) -> Function:
    def call(values: Any, index: Any) -> Any:
        if isinstance(index, int):
            return values.select(axis, index)
        shape = values.shape
        return values.index_select(axis, index.flatten()).view(*shape[:axis], *index.shape, *shape[axis + 1 :])

    return call


def _norm(epsilon: float, axis: int = -1) -> Function:
    assert axis == -1
    return lambda values, weight: functional.rms_norm(values, weight.shape, weight, epsilon)


def _reshape(values: Any, shape: Sequence[int]) -> Any:
    return values.reshape([values.shape[dim] if size == 0 else size for dim, size in enumerate(shape)])


def _rotary(interleaved: int = 0) -> Function:
    assert not interleaved

    def call(states: Any, cos: Any, sin: Any) -> Any:  # [B, heads, T, D], [B, T, D / 2]
        left, right = states.chunk(2, dim=-1)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    return call


def _unsqueeze(values: Any, axes: Sequence[int]) -> Any:
    for axis in axes:
        values = values.unsqueeze(axis)
    return values


# What makes a node's function of its attributes.
_OPS: Mapping[str, Callable[..., Function]] = {
    "Add": lambda: operator.add,
    "Cast": lambda to: lambda values: values.to(_DTYPES[to]),
    "Clip": lambda: torch.clamp,
    "Concat": lambda axis: lambda *values: torch.cat(values, dim=axis),
    "DequantizeLinear": _dequantize,
    "Gather": _gather,
    "Gelu": lambda approximate=b"none": partial(functional.gelu, approximate=approximate.decode()),
    "MatMul": lambda: torch.matmul,
    "Mul": lambda: operator.mul,
    "RMSNormalization": _norm,
    "Relu": lambda: torch.relu,
    "Reshape": lambda: _reshape,
    "RotaryEmbedding": _rotary,
    "Shape": lambda: lambda values: list(values.shape),
    "Sigmoid": lambda: torch.sigmoid,
    "Split": lambda axis: lambda values, sizes: values.split(sizes, dim=axis),
    "Transpose": lambda perm: lambda values: values.permute(perm),
    "Unsqueeze": lambda: _unsqueeze,
}
