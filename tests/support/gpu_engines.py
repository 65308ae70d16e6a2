# SPDX-License-Identifier: Apache-2.0
"""Engine directories of the target "tensorrt" for the fake GPU: what `build` does, up to TensorRT's own builder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fake_gpu import Gpu
from fake_tensorrt import write_plan

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_builder.targets.tensorrt_lowering import lower_graph
from adaptive_k_moe.engine_config import BuildConfig, EngineConfig, file_entry, write_engine_config
from adaptive_k_moe.engine_format.tensorrt import Binding, make_bindings
from adaptive_k_moe.model_config import Dtype
from adaptive_k_moe.policy import PolicySet

POLICIES: dict[str, Any] = {
    "policies": {
        "one": {"kind": "fixed", "k": 1},
        "two": {"kind": "fixed", "k": 2},
        "mixed": {"kind": "entropy", "thresholds": [1.0, 1.4], "k": [1, 2, 3]},
        "mass": {"kind": "top_p", "p": 0.6, "k_min": 1},
        "relative": {"kind": "ratio", "ratio": 0.5},
    }
}


def profiles_of(table: list[Binding]) -> dict[str, list[list[list[int]]]]:
    """The shapes that a builder is given for a table's inputs."""
    return {
        binding.name: [[list(at.min), list(at.opt), list(at.max)] for at in binding.profiles]
        for binding in table
        if binding.is_input
    }


def make_engine(
    checkpoint: Path, directory: Path, *, dtype: Dtype = "float32", policies: Any = None, **sizes: int
) -> EngineConfig:
    """Write an engine whose ``rank0.engine`` is the lowered graph."""
    graph_dir = directory.with_name(directory.name + ".onnx")
    policy = PolicySet.model_validate(POLICIES if policies is None else policies)
    config = build(checkpoint, graph_dir, target="onnx", dtype=dtype, policy=policy, **sizes)
    build_config = BuildConfig.model_validate(config.build_config.model_dump() | {"target": "tensorrt"})
    lowered = lower_graph(graph_dir / "model.onnx", config.pretrained_config, build_config)
    onnx.save(lowered, graph_dir / "model.onnx")
    directory.mkdir()
    whole = onnx.load(graph_dir / "model.onnx")
    table = make_bindings(config.pretrained_config, build_config)
    write_plan(directory / "rank0.engine", whole, profiles_of(table))
    names = [name for name in config.files if not name.startswith("model.onnx")]
    for name in names:
        shutil.copy(graph_dir / name, directory / name)
    shutil.rmtree(graph_dir)
    files = {name: file_entry(directory / name) for name in [*names, "rank0.engine"]}
    config = config.model_copy(update={"build_config": build_config, "files": files})
    write_engine_config(directory, config)
    return config


def poison(gpu: Gpu, session: Any, block: int) -> None:
    """Make all that a block's sequence left in a session's caches NaN, as one whose numbers overflowed would."""
    for cache in session._caches:
        memory = gpu.memory.view(cache.address(session._slots.place(block)), cache.slot_bytes)
        values = memory.view(np.float32).reshape(cache.slot_shape)
        if cache.name.startswith("past_key_values."):
            values = values[:, : session._slots.extent(block)]
        values[...] = np.nan
