# SPDX-License-Identifier: Apache-2.0
"""The seam against the packages that it is written for: every name it uses is there, and takes what it is given.

The fake GPU is held to the same signatures, so that the tests over it say something of the real one.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import Cudart, Gpu
from fake_tensorrt import Context, Engine, make_tensorrt

from adaptive_k_moe.engine_format.tensorrt import DTYPES
from adaptive_k_moe.errors import DeviceError, EngineError
from adaptive_k_moe.runtime.session.tensorrt import cuda as cuda_module
from adaptive_k_moe.runtime.session.tensorrt import engine as engine_module
from adaptive_k_moe.runtime.session.tensorrt.cuda import Cuda, import_cudart
from adaptive_k_moe.runtime.session.tensorrt.engine import TrtEngine


def attributes(module: Any, *objects: str) -> set[str]:
    """The attributes of these names, such as ``self._trt``, that a module's source uses."""
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    return {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) in objects
    }


# CUDA. ------------------------------------------------------------------------------------------------


def real_cudart() -> Any:
    return pytest.importorskip("cuda.bindings.runtime")


def cuda_functions() -> set[str]:
    """The functions by name: some are called by it, some held as what frees a handle."""
    assert cuda_module.__file__ is not None
    tree = ast.parse(Path(cuda_module.__file__).read_text())
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    named = {text for text in strings if text.startswith("cuda") and text.isidentifier()} - {"cuda"}
    return named | {name for name in attributes(cuda_module, "self._cudart", "cudart") if name.startswith("cudaGet")}


def test_every_cuda_name_exists_and_the_fake_has_it_too() -> None:
    cudart = real_cudart()
    functions = cuda_functions()
    assert {"cudaMalloc", "cudaFree", "cudaMemcpy2DAsync", "cudaGraphInstantiate", "cudaGetErrorString"} <= functions
    for name in functions | attributes(cuda_module, "self._cudart", "cudart"):
        assert hasattr(cudart, name), name
        assert hasattr(Cudart, name), name
    for enumeration in ("cudaMemcpyKind", "cudaStreamCaptureMode", "cudaError_t"):
        members = attributes(cuda_module, f"self._cudart.{enumeration}")
        assert members
        for name in members:
            assert int(getattr(getattr(cudart, enumeration), name)) == int(
                getattr(getattr(Cudart, enumeration), name)
            ), name
    for flag in ("cudaHostAllocDefault", "cudaStreamNonBlocking", "cudaEventDisableTiming"):
        assert int(getattr(cudart, flag)) == getattr(Cudart, flag)


@pytest.mark.parametrize("name", sorted(cuda_functions()))
def test_cuda_functions_have_the_parameters_that_the_fake_has(name: str) -> None:
    """The first line of a function's documentation is its signature."""
    cudart = real_cudart()
    signature = (getattr(cudart, name).__doc__ or "").splitlines()[0].partition("(")[2].rpartition(")")[0]
    real = [part.partition(":")[0].split()[-1] for part in signature.split(",") if part.strip()]
    assert list(inspect.signature(getattr(Cudart, name)).parameters)[1:] == real


def test_handles_are_integers_and_back() -> None:
    cudart = real_cudart()
    for handle in (cudart.cudaStream_t, cudart.cudaEvent_t, cudart.cudaGraphExec_t):
        assert int(handle(12345)) == 12345


def test_every_call_reaches_the_driver() -> None:
    """Without one, each comes back with its absence: no call has a wrong number or type of arguments."""
    cudart = real_cudart()
    if int(cudart.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("a GPU is here: tests/gpu runs the session on it")
    cuda, pinned = Cuda(cudart), np.zeros(64, np.uint8)
    calls = {
        "cudaMalloc": lambda: cuda.allocate(100),
        "cudaHostAlloc": lambda: cuda.allocate_pinned(100),
        "cudaStreamCreateWithFlags": cuda.make_stream,
        "cudaEventCreateWithFlags": cuda.make_event,
        "cudaEventRecord": lambda: cuda.record(3, 4),
        "cudaStreamWaitEvent": lambda: cuda.wait(3, 4),
        "cudaStreamSynchronize": lambda: cuda.synchronize(4),
        "cudaMemsetAsync": lambda: cuda.clear(1 << 40, 100, 4),
        "cudaMemset2DAsync": lambda: cuda.clear_rows(1 << 40, width=4, height=2, pitch=8, stream=4),
        "cudaMemcpyAsync": lambda: cuda.upload(1 << 40, pinned, 4),
        "cudaMemcpyAsync ": lambda: cuda.download(pinned, 1 << 40, 4),
        "cudaMemcpy2DAsync": lambda: cuda.copy_rows(1 << 40, 1 << 41, width=4, height=2, pitch=8, stream=4),
        "cudaStreamBeginCapture": lambda: cuda.begin_capture(4),
        "cudaStreamEndCapture": lambda: cuda.end_capture(4),
        "cudaGraphInstantiate": lambda: cuda._call("cudaGraphInstantiate", 5, 0),
        "cudaGraphDestroy": lambda: cuda._call("cudaGraphDestroy", 5),
        "cudaGraphLaunch": lambda: cuda.launch(5, 4),
        "cudaGraphExecDestroy": lambda: cuda._call("cudaGraphExecDestroy", 5),
        "cudaFree": lambda: cuda._call("cudaFree", 1 << 40),
        "cudaFreeHost": lambda: cuda._call("cudaFreeHost", 1 << 40),
        "cudaStreamDestroy": lambda: cuda._call("cudaStreamDestroy", 4),
        "cudaEventDestroy": lambda: cuda._call("cudaEventDestroy", 3),
    }
    assert {name.strip() for name in calls} | {
        "cudaGetErrorString",
        "cudaGetLastError",
        "cudaGetDeviceCount",
    } == cuda_functions()
    for name, call in calls.items():
        with pytest.raises(DeviceError, match=f"the GPU failed in {name.strip()}: .*driver"):
            call()
    cuda.close()
    with pytest.raises(DeviceError, match=r"no NVIDIA GPU can be used here \(.*driver"):
        import_cudart()


# TensorRT. --------------------------------------------------------------------------------------------


def test_every_tensorrt_name_exists_and_the_fake_has_it_too() -> None:
    """TensorRT for RTX stands for TensorRT: their Python interfaces are one where the session uses them."""
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    fake = make_tensorrt(Gpu())
    for real, ours, objects in (
        (trt, fake, ("trt", "self._trt")),
        (trt.ICudaEngine, Engine, ("engine", "self._engine")),
        (trt.IExecutionContext, Context, ("context", "self._context")),
        (trt.Runtime, fake.Runtime, ("self._runtime",)),
        (trt.TensorIOMode, fake.TensorIOMode, ("self._trt.TensorIOMode",)),
        (trt.ILogger, fake.ILogger, ("trt.ILogger",)),
        (
            trt.ExecutionContextAllocationStrategy,
            fake.ExecutionContextAllocationStrategy,
            ("self._trt.ExecutionContextAllocationStrategy",),
        ),
    ):
        used = {name for name in attributes(engine_module, *objects) if not name.startswith("_")} - {"TrtEngine"}
        assert used, objects
        for name in used:
            assert hasattr(real, name), (objects, name)
            assert hasattr(ours, name), (objects, name)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("IExecutionContext", "set_device_memory"),
        ("IExecutionContext", "set_optimization_profile_async"),
        ("IExecutionContext", "set_input_shape"),
        ("IExecutionContext", "set_tensor_address"),
        ("IExecutionContext", "execute_async_v3"),
        ("ICudaEngine", "get_tensor_name"),
        ("ICudaEngine", "get_tensor_mode"),
        ("ICudaEngine", "get_tensor_dtype"),
        ("ICudaEngine", "get_tensor_shape"),
        ("ICudaEngine", "get_tensor_profile_shape"),
        ("ICudaEngine", "create_execution_context"),
        ("Runtime", "deserialize_cuda_engine"),
        ("ILogger", "log"),
    ],
)
def test_tensorrt_methods_have_the_parameters_that_the_fake_has(kind: str, method: str) -> None:
    """pybind11 writes each signature into the documentation: ``method(self: …, name: str, …) -> bool``."""
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    ours = {"IExecutionContext": Context, "ICudaEngine": Engine}.get(kind) or getattr(make_tensorrt(Gpu()), kind)
    if kind == "ILogger":  # which we derive from
        assert list(inspect.signature(engine_module._make_logger(trt).log).parameters) == ["severity", "msg"]
        return
    documentation = getattr(getattr(trt, kind), method).__doc__ or ""
    signatures = [line for line in documentation.splitlines() if f"{method}(self: " in line]
    assert signatures
    real = [[part.partition(":")[0].strip() for part in _split(line)][1:] for line in signatures]
    assert list(inspect.signature(getattr(ours, method)).parameters)[1:] in real


def _split(signature: str) -> list[str]:
    """The parameters of a signature, whose types may have commas in brackets."""
    parts, depth = [""], 0
    for character in signature.partition("(")[2].rpartition(") ->")[0]:
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def test_types_and_modes_have_the_names_that_the_session_compares() -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    for name in DTYPES:
        assert getattr(trt.DataType, name).name == name
    logger = engine_module._make_logger(trt)
    logger.log(trt.ILogger.ERROR, "the reason.")
    logger.log(trt.ILogger.ERROR, "what follows from it")
    assert [logger.reason(), logger.reason()] == ["the reason", "it does not say why"]


def test_a_real_runtime_takes_the_file_and_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    path = tmp_path / "rank0.engine"
    path.write_bytes(b"not an engine" * 1000)
    with pytest.raises(
        EngineError, match=rf"TensorRT {trt.__version__} cannot load {path}: .*magicTag.*; an engine is"
    ):
        TrtEngine(trt, path, Cuda(Cudart(Gpu())))
