# SPDX-License-Identifier: Apache-2.0
"""What the openvino target writes: weights where the kernels read them fastest, as bytes that OpenVINO leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import openvino as ov
import pytest
from safetensors.numpy import load_file

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.plugin import openvino_extension_path

from checkpoints import make_mixtral

OPTIONS: list[dict[str, Any]] = [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"weight_only_precision": "int8"}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options.values())))
def test_constants_begin_at_cache_lines(options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint", hidden_size=96, intermediate_size=48)
    build(checkpoint, tmp_path / "engine", **options)
    graph = ElementTree.parse(tmp_path / "engine" / "rank0.xml")
    places = [data.attrib for data in graph.iterfind(".//layer[@type='Const']/data")]
    assert len({place["offset"] for place in places}) < len(places)  # equal ones are stored once
    assert all(int(place["offset"]) % 64 == 0 for place in places)
    last = max(int(place["offset"]) + int(place["size"]) for place in places)
    assert (tmp_path / "engine" / "rank0.bin").stat().st_size == last


def test_experts_are_bytes_of_the_checkpoints_numbers(tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint", hidden_size=48, intermediate_size=20)
    build(checkpoint, tmp_path / "engine", dtype="float32")
    core = ov.Core()
    core.add_extension(str(openvino_extension_path()))
    found = [
        node.input_value(7).get_node()
        for node in core.read_model(tmp_path / "engine" / "rank0.xml").get_ordered_ops()
        if node.get_type_name() == "AdaptiveKMoe"
    ]
    tensors: dict[str, Any] = {}
    for path in checkpoint.glob("*.safetensors"):
        tensors |= load_file(path)
    assert len(found) == 2
    for layer, constant in enumerate(found):
        assert constant.get_element_type() == ov.Type.u8
        down = [
            tensors[f"model.layers.{layer}.block_sparse_moe.experts.{e}.w2.weight"] for e in range(len(constant.data))
        ]
        np.testing.assert_array_equal(constant.data.view(np.float32), np.stack(down))
