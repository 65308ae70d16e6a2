# SPDX-License-Identifier: Apache-2.0
"""A lowered graph through TensorRT's parser and builder.

TensorRT and TensorRT for RTX have one Python interface, so the same lines build an engine for the GPU at hand and,
ahead of time and without a GPU, one that proves the graph. Run as a program, it does the latter and prints JSON:
TensorRT ends its process on some faults.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptive_k_moe.engine_config import BuildConfig
from adaptive_k_moe.engine_format.tensorrt import DTYPES, PROFILES, Binding, make_bindings
from adaptive_k_moe.errors import BuildError
from adaptive_k_moe.model_config import PretrainedConfig

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Tensor:
    """An input or output as TensorRT has it; -1 is a size known only at run time."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Compiled:
    """What became of a graph.

    Attributes:
        tensors: the network's inputs and outputs, in order.
        layers: layers of the network, by their kind.
        profiles: the shapes that each profile was given, by input: smallest, usual, largest.
        plan: the engine.
    """

    tensors: list[Tensor]
    layers: dict[str, int]
    profiles: list[dict[str, list[list[int]]]]
    plan: Any


def compile_graph(
    trt: Any,
    graph: Path,
    table: list[Binding],
    *,
    capability: str | None = None,
    fused_attention: bool = False,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> Compiled:
    """Parse a lowered graph, compare it with the table, and build an engine.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx_bindings``.
        graph: the ONNX file; its weights are read from beside it.
        table: the bindings, which the parsed network must have exactly.
        capability: what TensorRT for RTX builds for, such as "SM89"; None is the GPU at hand.
        fused_attention: refuse an attention that TensorRT has no fused kernel for; otherwise it is taken apart.
        timing_cache: a file with earlier timings; it is read if it is there, and written.
        progress: called with the name of each of the builder's phases.

    Raises:
        BuildError: TensorRT refuses the graph, or it has other inputs and outputs than the table.
    """
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise BuildError(f"TensorRT's parser refuses the graph: {parser.get_error(0)}")
    tensors = _tensors(network)
    require_bindings(tensors, table)
    layers: dict[str, int] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = str(layer.type).rsplit(".", 1)[-1]
        layers[kind] = layers.get(kind, 0) + 1
        if kind == "ATTENTION_INPUT" and not fused_attention:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings give every layer as the base class
            layer.attention.decomposable = True

    config = builder.create_builder_config()
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profiles = [_add_profile(builder, config, table, index) for index in range(len(PROFILES))]
    if timing_cache is not None:
        known = timing_cache.read_bytes() if timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    if progress is not None:
        config.progress_monitor = _monitor(trt, progress)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError("TensorRT built no engine; its log above says why.")
    if timing_cache is not None:
        timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return Compiled(tensors, layers, profiles, plan)


def require_bindings(tensors: list[Tensor], table: list[Binding]) -> None:
    """Raise BuildError unless the network's inputs and outputs are the table's, in name, order, type and shape."""
    expected = [
        Tensor(b.name, b.is_input, b.dtype, tuple(-1 if isinstance(size, str) else size for size in b.shape))
        for b in table
    ]
    for found, wanted in zip(tensors, expected, strict=False):
        if found != wanted:
            raise BuildError(f"the network has {found} where the table of bindings has {wanted}.")
    if len(tensors) != len(expected):
        raise BuildError(f"the network has {len(tensors)} inputs and outputs, the table of bindings {len(expected)}.")


def _tensors(network: Any) -> list[Tensor]:
    inputs = [(network.get_input(index), True) for index in range(network.num_inputs)]
    outputs = [(network.get_output(index), False) for index in range(network.num_outputs)]
    return [
        Tensor(t.name, is_input, DTYPES.get(t.dtype.name, t.dtype.name), tuple(t.shape))
        for t, is_input in inputs + outputs
    ]


def _add_profile(builder: Any, config: Any, table: list[Binding], index: int) -> dict[str, list[list[int]]]:
    profile, given = builder.create_optimization_profile(), {}
    for binding in table:
        if binding.is_input and any(isinstance(size, str) for size in binding.shape):
            limits = binding.profiles[index]
            profile.set_shape(binding.name, limits.min, limits.opt, limits.max)
            given[binding.name] = [list(shape) for shape in profile.get_shape(binding.name)]
    if config.add_optimization_profile(profile) != index:
        raise BuildError(f"TensorRT refuses the optimization profile {PROFILES[index]!r}.")
    return given


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            del parent_phase, num_steps
            progress(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            del phase_name, step
            return True

        def phase_finish(self, phase_name: str) -> None:
            del phase_name

    return Monitor()


def main() -> int:
    """Compile ``argv[1]`` ahead of time for each capability of ``argv[4:]``; the model and sizes are JSON before."""
    trt: Any = importlib.import_module("tensorrt_rtx_bindings")
    graph, capabilities = Path(sys.argv[1]), sys.argv[4:]
    model = PretrainedConfig.model_validate_json(sys.argv[2])
    table = make_bindings(model, BuildConfig.model_validate_json(sys.argv[3]))
    for capability in capabilities:
        result: dict[str, Any] = {"capability": capability, "version": trt.__version__}
        for fused in (True, False):
            start = time.monotonic()
            try:
                compiled = compile_graph(trt, graph, table, capability=capability, fused_attention=fused)
            except BuildError as error:
                result["error"] = str(error)
                continue
            result.pop("error", None)
            result |= {
                "fused_attention": fused,
                "tensors": [asdict(tensor) for tensor in compiled.tensors],
                "layers": compiled.layers,
                "profiles": compiled.profiles,
                "bytes": compiled.plan.nbytes,
                "seconds": time.monotonic() - start,
            }
            break
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
