# SPDX-License-Identifier: Apache-2.0
"""Published models, by their own configs and tensor names, at full size; their weights are zeros that nobody moves."""

from __future__ import annotations

import importlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from safetensors import safe_open

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_builder.graph import GraphBuilder
from adaptive_k_moe.engine_config import FileEntry

from checkpoints import CONFIGS, make_sparse_checkpoint

# Bytes that the index on the hub says the tensors take ("total_size"): the layout's check from outside.
TOTAL_SIZE = {
    "mixtral-8x7b": 93405585408,
    "olmoe-1b-7b": 13838323712,
    "qwen1.5-moe-a2.7b": 28631568384,
    "qwen3-30b-a3b": 61064245248,
}


class Shard:
    """An open shard whose header is read for real, and whose zeros are memory that is never touched."""

    reads: Counter[str] = Counter()

    def __init__(self, path: Path, framework: str) -> None:
        self._real = safe_open(path, framework=framework)

    def keys(self) -> list[str]:
        return list(self._real.keys())

    def get_slice(self, name: str) -> Any:
        return self._real.get_slice(name)

    def get_tensor(self, name: str) -> np.ndarray:
        self.reads[name] += 1
        return np.zeros(self._real.get_slice(name).get_shape(), ml_dtypes.bfloat16)


class Hole(io.FileIO):
    """A file in which whatever is written leaves a hole of its size."""

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.seek(size, io.SEEK_CUR)
        return size

    def close(self) -> None:
        if not self.closed:
            self.truncate(self.tell())
        super().close()


class SparseGraph(GraphBuilder):
    def __init__(self, path: Path, name: str) -> None:
        super().__init__(path, name)
        self._data.close()
        self._data = Hole(path.with_name(path.name + ".data"), "wb")


@pytest.fixture
def no_bytes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Everything of `build` but the bytes: nothing is read, written or hashed. Counts each tensor's reads."""
    monkeypatch.setattr("adaptive_k_moe.engine_builder.checkpoint.tensors.safe_open", Shard)
    # By name, since the package exports the function `build` over the module.
    module = importlib.import_module("adaptive_k_moe.engine_builder.build")
    monkeypatch.setattr(module, "GraphBuilder", SparseGraph)
    monkeypatch.setattr(module, "file_entry", lambda path: FileEntry(size=path.stat().st_size, blake3="0" * 64))
    Shard.reads = Counter()
    return Shard.reads


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.json") if path.stem in TOTAL_SIZE))
def test_every_tensor_of_the_index_is_used_once(name: str, tmp_path: Path, no_bytes: Counter[str]) -> None:
    tensors = make_sparse_checkpoint(tmp_path / "checkpoint", CONFIGS / f"{name}.json")
    index = json.loads((tmp_path / "checkpoint" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == TOTAL_SIZE[name]
    config = build(tmp_path / "checkpoint", tmp_path / "engine", target="onnx")
    assert no_bytes == Counter(list(tensors))
    assert config.pretrained_config.dtype == "bfloat16"

    model = onnx.load(tmp_path / "engine" / "model.onnx", load_external_data=False)
    widened = rope = 0
    for tensor in model.graph.initializer:
        if tensor.name.startswith("rope."):
            rope += 4 * int(np.prod(tensor.dims))
        elif tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.data_type == onnx.TensorProto.FLOAT:
            widened += 2 * int(np.prod(tensor.dims))
    data = (tmp_path / "engine" / "model.onnx.data").stat()
    padding = data.st_size - TOTAL_SIZE[name] - widened - rope
    assert 0 <= padding < 4096 * len(model.graph.initializer)
    assert data.st_blocks * 512 < 1 << 20
    # Shapes agree through every node: the inference fails on the first that does not.
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in inferred.graph.value_info
    }
    last = config.pretrained_config.num_hidden_layers - 1
    assert shapes[f"model.layers.{last}.sum"][-1] == config.pretrained_config.hidden_size


SMALLER = {
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "num_experts": 8,
    "num_local_experts": 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


@pytest.mark.parametrize("name", sorted(TOTAL_SIZE))
def test_the_openvino_target_takes_the_attention_of(name: str, tmp_path: Path) -> None:
    """Two layers with the model's own heads, and few narrow experts: attention is matched and a step runs."""
    from adaptive_k_moe.runtime import LLM, SamplingParams

    path = CONFIGS / f"{name}.json"
    changes = {field: value for field, value in SMALLER.items() if field in json.loads(path.read_text())}
    make_sparse_checkpoint(tmp_path / "checkpoint", path, changes=changes)
    build(tmp_path / "checkpoint", tmp_path / "engine", max_seq_len=64, max_batch_size=2)
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        output = llm.generate([3, 4, 5], SamplingParams(max_tokens=2, end_id=-1))
    assert output.outputs[0].token_ids == [0, 0]  # all logits are 0
