# SPDX-License-Identifier: Apache-2.0
"""A ``tensorrt`` for tests: what the session calls of it, over the fake GPU.

An engine is a lowered ONNX graph with the profiles that it was "built" with, and ONNX Runtime runs it.
"""

from __future__ import annotations

import json
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from fake_gpu import ALIGNMENT, Gpu

PROFILES_KEY = "profiles"

_TYPES = {
    onnx.TensorProto.FLOAT: ("FLOAT", np.float32),
    onnx.TensorProto.FLOAT16: ("HALF", np.float16),
    onnx.TensorProto.INT32: ("INT32", np.int32),
    onnx.TensorProto.INT64: ("INT64", np.int64),
}

DataType = SimpleNamespace(**{name: SimpleNamespace(name=name) for name, _ in _TYPES.values()})
IOMode = IntEnum("IOMode", {"INPUT": 1, "OUTPUT": 2})
Strategy = IntEnum("Strategy", {"STATIC": 0, "USER_MANAGED": 2})
Severity = IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})


class Engine:
    """`tensorrt.ICudaEngine`, of an ONNX file."""

    device_memory_size_v2 = 12_345

    def __init__(self, gpu: Gpu, logger: Any, plan: bytes) -> None:
        self.gpu, self.logger = gpu, logger
        self.stream: int | None = None
        proto = onnx.load_model_from_string(plan)
        self.profiles: dict[str, list[list[list[int]]]] = json.loads(
            next(prop.value for prop in proto.metadata_props if prop.key == PROFILES_KEY)
        )
        self.values: dict[str, tuple[IOMode, str, Any, tuple[int | str, ...]]] = {}
        for mode, values in ((IOMode.INPUT, proto.graph.input), (IOMode.OUTPUT, proto.graph.output)):
            for value in values:
                tensor = value.type.tensor_type
                shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
                self.values[value.name] = (mode, *_TYPES[tensor.elem_type], shape)
        scatters = {n.output[0]: n.input[0] for n in proto.graph.node if n.op_type == "TensorScatter"}
        mamba = {
            output: name
            for n in proto.graph.node
            if n.op_type == "Mamba2"
            for output, name in zip(n.output[1:], n.input[-2:], strict=True)
        }
        self.in_place = scatters | mamba
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(plan, options, providers=["CPUExecutionProvider"])

    @property
    def num_optimization_profiles(self) -> int:
        return len(next(iter(self.profiles.values())))

    @property
    def num_io_tensors(self) -> int:
        return len(self.values)

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> IOMode:
        return self.values[name][0]

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(DataType, self.values[name][1])

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1 if isinstance(size, str) else size for size in self.values[name][3]]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return self.profiles[name][profile_index]

    def create_execution_context(self, strategy: Strategy) -> Context | None:
        assert strategy is Strategy.USER_MANAGED
        if self.gpu.failures.pop("create_execution_context", None):
            self.logger.log(Severity.ERROR, "no room for a context")
            return None
        return Context(self)


class Context:
    """`tensorrt.IExecutionContext`."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._gpu = engine, engine.gpu
        self._profile: int | None = None
        self._workspace: tuple[int, int] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._version = 0
        self._warm: int | None = None

    def set_device_memory(self, memory: int, size: int) -> None:
        if size < self._engine.device_memory_size_v2:
            raise self._gpu.misuse("the workspace is too small")
        self._workspace = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None
        mode, _, _, declared = self._engine.values[name]
        low, _, high = self._engine.profiles[name][self._profile]
        fits = mode is IOMode.INPUT and len(shape) == len(declared)
        if not fits or any(not a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            self._engine.logger.log(Severity.ERROR, f"{name}: {list(shape)} is not within {low} to {high}.")
            return False
        if self._shapes.get(name) != tuple(shape):
            self._shapes[name] = tuple(shape)
            self._version += 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine.values:
            self._engine.logger.log(Severity.ERROR, f"there is no {name}.")
            return False
        if memory % ALIGNMENT:
            raise self._gpu.misuse(f"{name} is bound at {memory:#x}")
        if self._addresses.get(name) != memory:
            self._addresses[name] = memory
            self._version += 1
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        gpu, engine = self._gpu, self._engine
        if gpu.failures.pop("execute_async_v3", None):
            engine.logger.log(Severity.ERROR, "the kernel cannot be launched.")
            return False
        capturing = gpu.capturing is not None and gpu.capturing[0] == stream_handle
        if capturing and gpu.tensorrt_refuses_capture:
            engine.logger.log(Severity.ERROR, "operation not permitted when stream is capturing")
            return False
        if capturing and self._warm != self._version:
            raise gpu.misuse("captured without a run since the last change")
        if engine.stream not in (None, stream_handle):
            raise gpu.misuse("contexts that share a workspace run on two streams")
        engine.stream = stream_handle
        shapes, addresses, version = self._checked_shapes(), dict(self._addresses), self._version

        def run() -> None:
            if capturing and self._version != version:
                raise gpu.misuse("a captured context was changed")
            self._run(shapes, addresses)

        gpu.push(stream_handle, run)
        if not capturing:
            self._warm = version
        return True

    def _checked_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all inputs and outputs, if everything is bound and all sizes agree."""
        assert self._workspace is not None
        self._gpu.memory.view(*self._workspace)
        sizes: dict[str, int] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (mode, _, _, declared) in self._engine.values.items():
            if mode is IOMode.INPUT:
                shape = self._shapes.get(name, declared)
                for size, found in zip(declared, shape, strict=True):
                    if sizes.setdefault(str(size), found) != found or isinstance(found, str):
                        raise self._gpu.misuse(f"{name} is {shape}, but {size} is {sizes[str(size)]}")
            else:
                shape = tuple(sizes[str(size)] if isinstance(size, str) else size for size in declared)
            if name not in self._addresses:
                raise self._gpu.misuse(f"{name} has no address")
            shapes[name] = shape
        if sizes["num_tokens"] != sizes["batch"] * sizes["sequence"]:
            raise self._gpu.misuse(f"the sizes do not fit each other: {sizes}")
        for present, past in self._engine.in_place.items():
            if self._addresses[present] != self._addresses[past]:
                raise self._gpu.misuse(f"{present} is not bound to the memory of {past}")
        return shapes

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine, memory = self._engine, self._gpu.memory

        def array(name: str) -> np.ndarray:
            dtype, shape = np.dtype(engine.values[name][2]), shapes[name]
            return memory.view(addresses[name], int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)

        feed = {name: array(name) for name, (mode, *_) in engine.values.items() if mode is IOMode.INPUT}
        length = next((shape[2] for name, shape in shapes.items() if name.startswith("past_key_values.")), None)
        if length is not None and (feed["write_indices"] + feed["input_ids"].shape[1]).max() > length:
            raise self._gpu.misuse("keys and values are written beyond the cache")
        outputs = [name for name, (mode, *_) in engine.values.items() if mode is IOMode.OUTPUT]
        for name, value in zip(outputs, engine.session.run(outputs, feed), strict=True):
            array(name)[...] = value


def make_tensorrt(gpu: Gpu) -> Any:
    """The module ``tensorrt``."""

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING

        def __init__(self) -> None:
            pass

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> Engine | None:
            plan = bytes(serialized_engine)
            try:
                return Engine(gpu, self.logger, plan)
            except Exception:
                self.logger.log(Severity.ERROR, "Serialized engine version does not match.")
                return None

    registry = SimpleNamespace(get_creator=lambda *_: object())
    return SimpleNamespace(
        __spec__=ModuleSpec("tensorrt", None),  # torch asks for it
        __version__="0.0 (fake)",
        ILogger=ILogger,
        Runtime=Runtime,
        TensorIOMode=IOMode,
        ExecutionContextAllocationStrategy=Strategy,
        get_plugin_registry=lambda: registry,
    )


def write_plan(path: Path, proto: onnx.ModelProto, profiles: dict[str, list[list[list[int]]]]) -> None:
    """Write what `Engine` reads: a lowered graph with its weights in it, and the profiles' shapes by input."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.metadata_props.add(key=PROFILES_KEY, value=json.dumps(profiles))
    path.write_bytes(copy.SerializeToString())
