# SPDX-License-Identifier: Apache-2.0
"""Writes an ONNX model node by node while its weights stream to one external data file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from adaptive_k_moe.engine_builder.graph.weight_only import quantise
from adaptive_k_moe.errors import BuildError
from adaptive_k_moe.model_config import QuantizationConfig
from adaptive_k_moe.plugin.description import WEIGHT_FORMATS

OPSET = 24
IR_VERSION = 11

_QUANTISED = {name: form for name, form in WEIGHT_FORMATS.items() if form.quantised}

DATA_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    **{name: TensorProto.DataType.Value(name.upper()) for name in _QUANTISED},
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}
NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    **{name: np.dtype(np.int8) for name in _QUANTISED},
}

# Weights start at page boundaries, so that a runtime can map each of them.
_ALIGNMENT = 4096

Array = npt.NDArray[Any]


def _bits(dtype: str) -> int:
    """Bits of a value."""
    return _QUANTISED[dtype].bits if dtype in _QUANTISED else 8 * NUMPY_TYPES[dtype].itemsize


class GraphBuilder:
    """An ONNX graph in the making.

    Nodes and small constants are kept; a weight's bytes go straight to the data file, so the memory in
    use is that of the piece being written. Use as a context manager: it closes the data file.

    Args:
        path: the ``.onnx`` file to write; weights go beside it as ``<name>.data``.
        name: the graph's name.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self._name = name
        self._data_path = path.with_name(path.name + ".data")
        self._data = self._data_path.open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._functions: list[onnx.FunctionProto] = []

    def __enter__(self) -> GraphBuilder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._data.close()

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare a graph input and return its name."""
        self._inputs.append(helper.make_tensor_value_info(name, DATA_TYPES[dtype], shape))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare a graph output; a node must produce the value of that name."""
        self._outputs.append(helper.make_tensor_value_info(name, DATA_TYPES[dtype], shape))

    def node(self, op_type: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        return self.nodes(op_type, inputs, [output], domain=domain, **attributes)[0]

    def nodes(
        self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> Sequence[str]:
        """Add a node and return the names of its outputs."""
        self._nodes.append(
            helper.make_node(op_type, list(inputs), list(outputs), name=outputs[0], domain=domain, **attributes)
        )
        return outputs

    def constant(self, value: Any, dtype: str = "int64") -> str:
        """A small constant kept in the model file; equal ones share one name."""
        array = np.asarray(value, dtype)
        name = f"const.{dtype}.{'x'.join(map(str, array.shape))}.{'_'.join(map(str, array.ravel().tolist()))}"
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, dtype: str, shape: Sequence[int], pieces: Iterable[Array]) -> str:
        """Stream a weight to the data file.

        Args:
            name: the initializer's name.
            dtype: "float32", "float16" or "bfloat16", to which pieces of another float dtype are converted; or
                "int8" or "int4", the latter with two values a byte.
            shape: the whole weight's shape.
            pieces: its values in C order, in pieces of any shape that together have its size.

        Raises:
            BuildError: a finite value is beyond the range of "float16".
        """
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
        offset = self._data.tell()
        for piece in pieces:
            if dtype == "float16":
                require_float16(name, piece)
            self._data.write(np.ascontiguousarray(piece, dtype=NUMPY_TYPES[dtype]).view(np.uint8).data)
        length = self._data.tell() - offset
        expected = int(np.prod(shape)) * _bits(dtype) // 8
        if length != expected:
            raise AssertionError(f"weight {name} streamed {length} bytes instead of {expected}")
        tensor = TensorProto(name=name, data_type=DATA_TYPES[dtype], dims=list(shape))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._data_path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        return name

    def quantised_weight(
        self,
        name: str,
        quantization: QuantizationConfig,
        dtype: str,
        shape: Sequence[int],
        pieces: Iterable[Array],
        *,
        for_operator: bool = False,
    ) -> tuple[str, str]:
        """Quantise a weight while it streams to the data file; its scales follow when it is whole.

        Args:
            name: the initializer's name; its scales are ``<name>_scales``.
            quantization: bits and group size.
            dtype: of the scales.
            shape: the whole weight's shape, [..., K].
            pieces: its values in C order, in pieces of whole rows.
            for_operator: as `AdaptiveKMoe` takes them, two int4 in an int8 and scales of whole rows [..., 1], not
                as `DequantizeLinear` does.

        Returns:
            Names of the integers and of the scales, [..., K / group size], of whole rows [...].

        Raises:
            BuildError: a weight is not finite, or beyond the range of the scales' type.
        """
        scales: list[Array] = []

        def values() -> Iterator[Array]:
            for piece in pieces:
                integers, piece_scales = quantise(name, piece, quantization, dtype)
                scales.append(piece_scales)
                yield integers

        *rows, length = shape
        if for_operator:
            self.weight(name, "int8", [*rows, length * quantization.bits // 8], values())
        else:
            self.weight(name, quantization.weight_format, shape, values())
        groups = [length // quantization.group_size] if quantization.group_size else [1] if for_operator else []
        return name, self.weight(f"{name}_scales", dtype, [*rows, *groups], scales)

    def function(self, function: onnx.FunctionProto) -> None:
        """Add a model-local function."""
        self._functions.append(function)

    def save(self, metadata: dict[str, str]) -> onnx.ModelProto:
        """Write the ``.onnx`` file and return the model (weights stay in the data file)."""
        self._data.flush()
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, list(self._initializers.values())
        )
        domains = {function.domain for function in self._functions}
        opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
        model = helper.make_model(
            graph,
            ir_version=IR_VERSION,
            opset_imports=opsets,
            functions=self._functions,
            producer_name="adaptive-k-moe",
        )
        helper.set_model_props(model, metadata)
        onnx.save(model, self.path)
        return model


def require_float16(name: str, values: Array) -> None:
    """Refuse a weight that float16 cannot hold.

    Raises:
        BuildError: a finite value is beyond float16's range.
    """
    if (
        values.dtype != np.float16
        and np.abs(values).max(initial=0.0, where=np.isfinite(values)) > np.finfo(np.float16).max
    ):
        raise BuildError(f"{name} has values beyond float16's range: build with --dtype bfloat16.")
