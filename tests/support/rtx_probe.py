# SPDX-License-Identifier: Apache-2.0
"""Run as a program: one encounter of the plugin's library with TensorRT for RTX, told as lines of JSON.

It is a process of its own because this TensorRT ends the process when a plugin is added to a network.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_rtx_bindings as trt
from onnx_layer import layer_model

NUM_EXPERTS, INTERMEDIATE, HIDDEN = 4, 32, 16


def tell(what: str, value: Any) -> None:
    print(json.dumps([what, value]), flush=True)


class Logger(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: Any, message: str) -> None:
        tell(str(severity).rsplit(".", 1)[-1], message)


def plugin_field(name: str, value: Any, kept: list[Any]) -> Any:
    """A field over an array that is put into `kept`, since the field itself does not hold it."""
    if isinstance(value, str):
        kept.append(np.frombuffer(value.encode(), np.int8))
        return trt.PluginField(name, kept[-1], trt.PluginFieldType.CHAR)
    if isinstance(value, float):
        kept.append(np.array([value], np.float32))
        return trt.PluginField(name, kept[-1], trt.PluginFieldType.FLOAT32)
    kept.append(np.array([value], np.int32))
    return trt.PluginField(name, kept[-1], trt.PluginFieldType.INT32)


def load(registry: Any, path: str) -> None:
    registry.load_library(path)
    tell("creators", [[c.name, c.plugin_version, c.plugin_namespace] for c in registry.all_creators])


def create(registry: Any, name: str, namespace: str, attributes: dict[str, Any]) -> None:
    creator = registry.get_creator(name, "1", namespace)
    tell("field names", [f.name for f in creator.field_names])
    kept: list[Any] = []
    fields = trt.PluginFieldCollection([plugin_field(name, value, kept) for name, value in attributes.items()])
    for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
        plugin = creator.create_plugin("layers.0.moe", fields, phase)
        if plugin is None:
            tell("plugin", None)
            continue
        core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
        build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
        tell("plugin", [core.plugin_name, core.plugin_version, core.plugin_namespace])
        tell("build", [build.num_outputs, build.timing_cache_id, build.metadata_string])


def parse(logger: Any, builder: Any, graph: bytes) -> None:
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    tell("parsed", parser.parse(graph))
    tell("errors", [str(parser.get_error(i)) for i in range(parser.num_errors)])
    tell("layers", [str(network.get_layer(i).type).rsplit(".", 1)[-1] for i in range(network.num_layers)])


def main() -> None:
    task = json.loads(sys.argv[1])
    logger = Logger()
    builder = trt.Builder(logger)
    registry = trt.get_plugin_registry()
    for _ in range(task.get("loads", 1)):
        load(registry, task["library"])
    if "create" in task:
        create(registry, task.get("plugin", "AdaptiveKMoe"), task["namespace"], task["create"])
    if "graph" in task:
        parse(logger, builder, Path(task["graph"]).read_bytes())
    if "node" in task:
        up = np.zeros((NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN), np.float16)
        down = np.zeros((NUM_EXPERTS, HIDDEN, INTERMEDIATE), np.float16)
        graph = layer_model(
            task["node"], {"up": up, "down": down}, policies=("P", 2), function=task.get("function", False)
        )
        parse(logger, builder, graph)


if __name__ == "__main__":
    main()
