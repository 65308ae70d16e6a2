# SPDX-License-Identifier: Apache-2.0
"""A TensorRT engine and its execution contexts as the session needs them, with errors as exceptions."""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptive_k_moe.engine_format.tensorrt import DTYPES, PROFILES, Binding, Shape
from adaptive_k_moe.errors import DependencyError, DeviceError, DeviceMemoryError, EngineError
from adaptive_k_moe.runtime.session.tensorrt.cuda import Cuda
from adaptive_k_moe.tensorrt_plugin import load_plugin


def import_tensorrt() -> Any:
    """The module ``tensorrt``, with our operators' plugin loaded.

    Raises:
        DependencyError: TensorRT is not installed, or the plugin is not there.
    """
    try:
        trt: Any = importlib.import_module("tensorrt")
        trt.Runtime  # noqa: B018 (a folder of this name can be imported too)
    except (ImportError, AttributeError) as error:
        raise DependencyError(
            f"running a TensorRT engine needs an NVIDIA GPU and TensorRT's Python package ({error}): install it with "
            "pip install 'adaptive-k-moe[tensorrt]' there; an engine built with --target openvino runs without a GPU."
        ) from None
    load_plugin(trt)
    return trt


class TrtEngine:
    """A deserialized engine.

    All its contexts share one workspace, so they may only be used one after another on one stream.

    Args:
        trt: the module ``tensorrt``.
        path: the engine's file.
        cuda: where the workspace is allocated.

    Raises:
        EngineError: TensorRT cannot load it.
        DeviceMemoryError: there is no room for its weights or its workspace.
    """

    def __init__(self, trt: Any, path: Path, cuda: Cuda) -> None:
        self._trt = trt
        self._logger = _make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                self._engine = self._runtime.deserialize_cuda_engine(plan)
        except (OSError, ValueError) as error:
            raise EngineError(f"cannot read {path}: {error}.") from None
        if self._engine is None:
            reason = self._logger.reason()
            if "OutOfMemory" in reason:
                raise DeviceMemoryError(f"TensorRT has no room for the weights ({reason}).")
            raise EngineError(
                f"TensorRT {trt.__version__} cannot load {path}: {reason}; an engine is for the TensorRT and the kind "
                "of GPU that it was built with, so build it again here."
            )
        self._contexts: list[Context] = []
        self._workspace_size = int(self._engine.device_memory_size_v2)
        self._workspace = cuda.allocate(self._workspace_size)

    def require(self, table: list[Binding]) -> None:
        """Check that the engine takes and gives what the table says.

        Raises:
            EngineError: naming the first difference.
        """
        engine, found = self._engine, []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            dtype = engine.get_tensor_dtype(name).name
            found.append((name, is_input, dtype, tuple(engine.get_tensor_shape(name))))
        wanted = {binding.name: binding for binding in table}
        for name, is_input, dtype, shape in found:
            binding = wanted.pop(name, None)
            expected = None if binding is None else _as_tensorrt_says(binding)
            if expected != (is_input, dtype, shape):
                raise EngineError(
                    f"the engine's {name!r} is {_described(is_input, dtype, shape)}, and this release binds "
                    f"{_described(*expected) if expected else 'nothing of that name'}: build the engine again."
                )
        if wanted:
            raise EngineError(f"the engine has no {next(iter(wanted))!r}: build the engine again.")
        if engine.num_optimization_profiles != len(PROFILES):
            raise EngineError(
                f"the engine has {engine.num_optimization_profiles} optimization profiles and not {len(PROFILES)}: "
                "build the engine again."
            )
        for binding in table:
            if binding.is_input and any(isinstance(size, str) for size in binding.shape):
                self._require_profiles(binding)

    def _require_profiles(self, binding: Binding) -> None:
        for index, limits in enumerate(binding.profiles):
            shapes = self._engine.get_tensor_profile_shape(binding.name, index)
            given = tuple(tuple(shape) for shape in shapes)
            if given != (limits.min, limits.opt, limits.max):
                raise EngineError(
                    f"the engine's {binding.name!r} takes the shapes {given} in the profile {PROFILES[index]!r}, and "
                    f"this release binds {(limits.min, limits.opt, limits.max)}: build the engine again."
                )

    def create_context(self, profile: int, stream: int) -> Context:
        """A context on an optimization profile.

        Raises:
            DeviceError: TensorRT has no room for it, or refuses the profile.
        """
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise DeviceError(f"TensorRT cannot create an execution context: {self._logger.reason()}.")
        context.set_device_memory(self._workspace, self._workspace_size)
        if not context.set_optimization_profile_async(profile, stream):
            raise DeviceError(f"TensorRT refuses the profile {PROFILES[profile]!r}: {self._logger.reason()}.")
        self._contexts.append(Context(context, self._logger))
        return self._contexts[-1]

    def close(self) -> None:
        """Free the engine and its contexts, before the workspace that they use is freed."""
        for own in self._contexts:
            own.close()
        self._contexts.clear()
        self._engine = self._runtime = None


class Context:
    """One execution context: shapes and addresses, and the call that runs it."""

    def __init__(self, context: Any, logger: Any) -> None:
        self._context = context
        self._logger = logger

    def bind(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Set inputs' shapes and all tensors' addresses.

        Raises:
            DeviceError: TensorRT refuses one.
        """
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise DeviceError(f"TensorRT refuses the shape {list(shape)} of {name!r}: {self._logger.reason()}.")
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise DeviceError(f"TensorRT refuses the address of {name!r}: {self._logger.reason()}.")

    def enqueue(self, stream: int) -> None:
        """Run the engine on a stream.

        Raises:
            DeviceError: TensorRT refuses or fails.
        """
        if not self._context.execute_async_v3(stream):
            raise DeviceError(f"TensorRT cannot run the engine: {self._logger.reason()}.")

    def close(self) -> None:
        """Free it."""
        self._context = None


def _as_tensorrt_says(binding: Binding) -> tuple[bool, str, tuple[int, ...]]:
    names = {ours: theirs for theirs, ours in DTYPES.items()}
    shape = tuple(-1 if isinstance(size, str) else size for size in binding.shape)
    return binding.is_input, names[binding.dtype], shape


def _described(is_input: bool, dtype: str, shape: tuple[int, ...]) -> str:
    return f"an {'input' if is_input else 'output'} {dtype} {list(shape)}"


def _make_logger(trt: Any) -> Any:
    """TensorRT's messages into our log; errors are kept for the exception that follows them."""
    from adaptive_k_moe.runtime.telemetry import logger

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def reason(self) -> str:
            """The first error since the last call: what comes after it is what follows from it."""
            first = self._errors[0] if self._errors else "it does not say why"
            self._errors.clear()
            return first

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self._errors.append(msg.strip().rstrip("."))
                logger.error("TensorRT: %s", msg)
            elif severity == trt.ILogger.WARNING:
                logger.warning("TensorRT: %s", msg)

    return Logger()
