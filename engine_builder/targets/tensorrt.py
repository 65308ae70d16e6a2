# SPDX-License-Identifier: Apache-2.0
"""The TensorRT target: an engine where TensorRT and a GPU are, and a dry run that needs neither."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx

from adaptive_k_moe.engine_builder.targets.tensorrt_compiler import Progress, compile_graph
from adaptive_k_moe.engine_builder.targets.tensorrt_lowering import for_compiler, for_plugin, lower_graph, tensor_bytes
from adaptive_k_moe.engine_config import BuildConfig
from adaptive_k_moe.engine_format.tensorrt import (
    ENGINE_NAME,
    ITEM_SIZES,
    PROFILES,
    Binding,
    make_bindings,
    slots_that_cannot_be_bound,
)
from adaptive_k_moe.errors import BuildError
from adaptive_k_moe.model_config import PretrainedConfig
from adaptive_k_moe.tensorrt_plugin import load_plugin

CAPABILITIES = ("SM89", "SM120")
"""What a dry run compiles for: Ada and Blackwell."""

# TensorRT for RTX holds the weights in memory, the experts' twice: a dry run of more is the lowering alone.
_MOST_COMPILED = 4 << 30


def require_tensorrt() -> Any:
    """The module ``tensorrt``, with the plugin loaded.

    Raises:
        BuildError: one of the two is not here.
    """
    try:
        trt: Any = importlib.import_module("tensorrt")
        trt.Builder  # noqa: B018 (a folder of this name can be imported too)
    except (ImportError, AttributeError):
        raise BuildError(
            "--target tensorrt needs TensorRT's Python package and an NVIDIA GPU: `pip install tensorrt` there, or add "
            "--dry_run to check the graph here; --target openvino works on this machine."
        ) from None
    load_plugin(trt)
    return trt


def lower_for_tensorrt(
    directory: Path,
    model: PretrainedConfig,
    build: BuildConfig,
    *,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Replace ``model.onnx`` by ``rank0.engine``.

    Raises:
        BuildError: TensorRT is not here, or refuses the graph, or a session could not bind the slots.
    """
    trt = require_tensorrt()
    table = make_bindings(model, build)
    if problem := sizes_without_kernels(model) or slots_that_cannot_be_bound(table):
        raise BuildError(f"{problem}.")
    source = directory / "model.onnx"
    onnx.save(for_plugin(lower_graph(source, model, build)), source)
    compiled = compile_graph(trt, source, table, timing_cache=timing_cache, progress=progress)
    with (directory / ENGINE_NAME).open("wb") as engine:
        engine.write(compiled.plan)
    source.unlink()
    source.with_name(source.name + ".data").unlink()


def sizes_without_kernels(model: PretrainedConfig) -> str | None:
    """What the CUDA kernels do not take of a model's sizes (their own check: plugin/cuda), before TensorRT is asked."""
    moe = model.moe
    sizes = {
        "the experts' hidden size": moe.latent_size or model.hidden_size,
        "the experts' intermediate size": moe.intermediate_size,
    }
    if model.mamba is not None:
        sizes |= {
            "the width of the Mamba heads": model.mamba.head_dim,
            "the size of the Mamba states": model.mamba.state_size,
        }
    for name, size in sizes.items():
        if size % 8:
            return f"{name} is {size}, and the CUDA kernels take multiples of 8"
    if moe.num_experts > 512:
        return f"the CUDA kernels take at most 512 experts, and the model has {moe.num_experts}"
    if model.mamba is not None and model.mamba.state_size > 256:
        return f"the CUDA kernels take Mamba states of at most 256, and the model's have {model.mamba.state_size}"
    return None


@dataclass(frozen=True)
class DryRun:
    """What a dry run found.

    Attributes:
        table: the engine's bindings.
        weight_bytes: of the lowered graph's weights.
        nodes: of the lowered graph.
        compiled: what TensorRT for RTX says for each capability; empty where it did not run.
        skipped: why it did not run, if so.
    """

    model: PretrainedConfig
    build: BuildConfig
    table: list[Binding]
    weight_bytes: int
    nodes: int
    compiled: list[dict[str, Any]]
    skipped: str | None

    @property
    def cache_bytes(self) -> int:
        """Bytes of one sequence's keys and values, and of its states."""
        caches = [binding for binding in self.table if binding.in_place_of is not None]
        return sum(cache.slot_bytes for cache in caches)

    @property
    def step_bytes(self) -> int:
        """Bytes of all other inputs and outputs in the largest step."""
        others = [binding for binding in self.table if binding not in _caches(self.table)]
        return max(
            sum(ITEM_SIZES[b.dtype] * prod(b.profiles[index].max) for b in others) for index in range(len(PROFILES))
        )

    @property
    def failed(self) -> bool:
        """Whether a compilation was tried and failed."""
        return any("error" in result for result in self.compiled)

    def lines(self) -> list[str]:
        """The report as text."""
        batch = self.build.max_batch_size
        return [
            f"{self.model.architecture} for TensorRT in {self.model.dtype}, experts' weights in "
            f"{self.model.weight_format}: {self.nodes} nodes",
            *(f"  {line}" for line in _bindings_text(self.table)),
            f"weights {_megabytes(self.weight_bytes)}; cache {_megabytes(self.cache_bytes)} a sequence, "
            f"{_megabytes(batch * self.cache_bytes)} for {batch}; other inputs and outputs at most "
            f"{_megabytes(self.step_bytes)}; the engine's workspace is known on the GPU only",
            "checked: types and shapes of every node, and inputs and outputs against the table of bindings",
            *(self._compiled_line(result) for result in self.compiled),
            *([f"not compiled: {self.skipped}"] if self.skipped else []),
            *([f"the plugin could not run it: {problem}"] if (problem := sizes_without_kernels(self.model)) else []),
            *([f"no session could run it: {problem}"] if (problem := slots_that_cannot_be_bound(self.table)) else []),
            "not checked: the plugin in the engine, numbers on a GPU, speed",
        ]

    @staticmethod
    def _compiled_line(result: dict[str, Any]) -> str:
        if "error" in result:
            return f"refused by TensorRT for RTX for {result['capability']}: {result['error']}"
        attention = "" if result["fused_attention"] else "; attention has no fused kernel for these heads and is slow"
        return (
            f"compiled by TensorRT for RTX {result['version']} for {result['capability']}, the operators by "
            f"function body: {_megabytes(result['bytes'])} in {result['seconds']:.1f} s{attention}"
        )


def dry_run(
    directory: Path, model: PretrainedConfig, build: BuildConfig, capabilities: tuple[str, ...] | None = None
) -> DryRun:
    """Lower ``model.onnx`` in `directory` and, where TensorRT for RTX is installed, compile it ahead of time.

    Raises:
        BuildError: the model cannot be lowered.
    """
    source = directory / "model.onnx"
    lowered = lower_graph(source, model, build)
    onnx.save(for_compiler(lowered), source)
    weights = sum(tensor_bytes(initializer) for initializer in lowered.graph.initializer)
    compiled: list[dict[str, Any]] = []
    skipped = None
    if not has_compiler():
        skipped = "TensorRT for RTX is not installed (`pip install tensorrt-rtx`)"
    elif weights > _MOST_COMPILED:
        skipped = f"{weights / 1e9:.0f} GB of weights are too many to compile without a GPU"
    else:
        compiled = [compile_ahead(source, model, build, capability) for capability in capabilities or CAPABILITIES]
    return DryRun(model, build, make_bindings(model, build), weights, len(lowered.graph.node), compiled, skipped)


def has_compiler() -> bool:
    """Whether TensorRT for RTX is installed."""
    return importlib.util.find_spec("tensorrt_rtx_bindings") is not None


def compile_ahead(graph: Path, model: PretrainedConfig, build: BuildConfig, capability: str) -> dict[str, Any]:
    """What the compiler says for one capability, from a process of its own."""
    module = "adaptive_k_moe.engine_builder.targets.tensorrt_compiler"
    arguments = [str(graph), model.model_dump_json(), build.model_dump_json(), capability]
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    log = [line for line in (done.stderr + done.stdout).splitlines() if "[E]" in line]
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    result: dict[str, Any] = {"capability": capability, "error": "TensorRT ended its process."}
    if answers:
        result = json.loads(answers[-1])
    if "error" in result and log:
        result["error"] = log[-1].partition("[E]")[2].strip()
    return result


def _caches(table: list[Binding]) -> list[Binding]:
    """The caches, before and after a step."""
    given = {binding.in_place_of for binding in table}
    return [binding for binding in table if binding.in_place_of is not None or binding.name in given]


def _bindings_text(table: list[Binding]) -> list[str]:
    """The table of bindings, with the caches (or states) of one layer for all."""
    caches = _caches(table)
    layers: dict[str, list[str]] = {}
    for binding in caches:
        kind, layer = binding.name.split(".")[:2]
        layers.setdefault(kind, []).append(layer)
    rows = [["", "name", "type", "shape", *PROFILES]]
    for binding in table:
        kind, *layer_of = binding.name.split(".")
        if binding in caches and layer_of[0] != layers[kind][0]:
            continue
        limits = [f"{_text(at.min)} {_text(at.opt)} {_text(at.max)}" for at in binding.profiles]
        way = "in" if binding.is_input else "out"
        rows.append([way, binding.name, binding.dtype, _text(binding.shape), *limits])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    counts = {kind: len(set(of)) for kind, of in layers.items() if not kind.startswith("present")}
    names = {"past_key_values": "a cache", "ssm_state": "states"}
    return [*lines, *(f"and such {names[kind]} for each of {n} layers" for kind, n in counts.items() if kind in names)]


def _text(shape: tuple[int | str, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
