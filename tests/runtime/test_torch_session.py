# SPDX-License-Identifier: Apache-2.0
"""The session on torch: what its own parts do. That it computes what `transformers` does is in tests/parity."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from adaptive_k_moe.cli import main
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import read_engine_config
from adaptive_k_moe.errors import BuildError, DeviceError, EngineError
from adaptive_k_moe.policy import PolicySet
from adaptive_k_moe.runtime import LLM, KvCacheConfig, SamplingParams
from adaptive_k_moe.runtime.outputs import RequestOutput
from adaptive_k_moe.runtime.session.torch import TorchSession
from adaptive_k_moe.runtime.session.torch.decode import padded
from adaptive_k_moe.runtime.session.torch.graph import Graph

from checkpoints import Shape, make_checkpoint
from nemotron_models import Nemotron, make_nemotron
from reference import NUM_TOKENS, assert_is_the_references, reference_model

POLICIES = PolicySet.model_validate(
    {
        "policies": {
            "mixed": {"kind": "entropy", "thresholds": [1.2], "k": [1, 2]},
            "shared": {"kind": "shared", "price": 0.1, "k_min": 1},
            "phases": {"kind": "phases", "prefill": {"kind": "fixed", "k": 2}, "decode": {"kind": "fixed", "k": 1}},
        }
    }
)
SIZES: dict[str, Any] = {"max_batch_size": 12, "max_seq_len": 512, "max_num_tokens": 40, "policy": POLICIES}


def small_model(family: str, directory: Path) -> Path:
    longer = {"max_position_embeddings": 512}
    if family == "nemotron":
        return make_nemotron(directory, Nemotron("small", "ME*-ME", longer))
    return make_checkpoint(directory, Shape("small", longer))


def run(session: TorchSession, lengths: tuple[int, ...], policies: tuple[str, ...]) -> list[RequestOutput]:
    config = session._config
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 60, length).tolist() for length in lengths]
    # Of different lengths, so that sequences leave the batch one after another.
    asked = [
        SamplingParams(max_tokens=20 + 2 * index, end_id=-1, adaptive_k_policy=policies[index % len(policies)])
        for index in range(len(prompts))
    ]
    with LLM.from_session(session, config, config.policy_tables()) as llm:
        return llm.generate(prompts, asked)


@pytest.mark.parametrize("family", ["mixtral", "nemotron"])
@pytest.mark.parametrize("policies", [("full", "mixed", "phases"), ("shared",), ("shared", "mixed")], ids=str)
def test_padded_decode_is_decode(family: str, policies: tuple[str, ...], tmp_path: Path) -> None:
    """Idle rows change no token, k or entropy, have no expert read, and touch no cache and no state of others."""
    build(small_model(family, tmp_path / "checkpoint"), tmp_path / "engine", target="torch", **SIZES)
    config = read_engine_config(tmp_path / "engine")
    packed, whole = (TorchSession(tmp_path / "engine", config, pad_decode=pad) for pad in (False, True))
    lengths = (300, 5, 1, 30, 12, 8, 3, 9, 2)
    expected = run(packed, lengths, policies)
    runner = whole._decode
    assert runner is not None
    found = run(whole, lengths, policies)
    for one, other in zip(found, expected, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        np.testing.assert_array_equal(one.outputs[0].k, other.outputs[0].k)
        np.testing.assert_allclose(one.outputs[0].entropy, other.outputs[0].entropy, atol=1e-4)
        assert one.reads_per_token == pytest.approx(other.reads_per_token)
    # Nine sequences in twelve rows and so on down; blocks of 300 tokens, and of those that stay behind.
    rows, blocks = (sorted({shape[part] for shape in runner._inputs}) for part in (0, 1))
    assert rows == [1, 2, 4, 8, 12] and blocks == [16, 32]
    assert runner._graphs  # some steps were replays


def test_sizes_of_padded_steps() -> None:
    assert [padded(size, 100) for size in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33)] == [1, 2, 4, 4, 8, 8, 16, 16, 24, 40]
    assert [padded(size, 12) for size in (5, 8, 9, 12)] == [8, 8, 12, 12]


@pytest.mark.parametrize(
    "shape",
    [
        Shape("window", {"sliding_window": 9}),
        Shape("window", {"sliding_window": 9, "use_sliding_window": True}, "qwen3_moe"),
    ],
    ids=str,
)
def test_a_sliding_window_is_that_of_transformers(shape: Shape, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", shape)
    build(checkpoint, tmp_path / "engine", target="torch", max_num_tokens=24)
    prompts = [np.random.default_rng(0).integers(3, 60, length).tolist() for length in (1, 40, 11)]
    sampling = SamplingParams(max_tokens=NUM_TOKENS, end_id=-1, return_context_logits=True)
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        outputs = llm.generate(prompts, sampling)
    model = reference_model(checkpoint)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_is_the_references(model, prompt, output)


def test_what_another_sequence_left_in_a_block_reaches_nobody(torch_engine_dir: Path) -> None:
    """Not even where it is no number, which a weight of zero would not keep out."""
    config = read_engine_config(torch_engine_dir)
    answers = []
    for left in (0.0, float("nan")):
        session = TorchSession(torch_engine_dir, config)
        with torch.inference_mode():
            for layer in session._cache.layers.values():
                for cache in layer:
                    cache[: session.num_blocks * session.block_size] = left
        answers.append(run(session, (5, 21, 70), ("full",)))
    for clean, poisoned in zip(*answers, strict=True):
        assert poisoned.error is None
        assert poisoned.outputs[0].token_ids == clean.outputs[0].token_ids


def test_experts_are_counted(torch_engine_dir: Path) -> None:
    with LLM(torch_engine_dir) as llm:
        prompts = ["And it came to pass", "In the beginning God created the heaven", "x"]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=6, end_id=-1, adaptive_k_policy="balanced"))
        load = llm.expert_load()
    assert load is not None
    ran = sum(output.prompt_k.sum(axis=0) + output.outputs[0].k[1:].sum(axis=0) for output in outputs)
    np.testing.assert_array_equal(load.sum(axis=1), ran)


def test_weights_are_mapped_and_not_copied(torch_engine_dir: Path) -> None:
    session = TorchSession(torch_engine_dir, read_engine_config(torch_engine_dir))
    graph = session._graph
    assert graph is not None
    mapped = graph._data.untyped_storage().data_ptr()
    bytes_of = {True: 0, False: 0}
    for weight in graph._weights.values():
        if isinstance(weight, torch.Tensor):
            bytes_of[weight.untyped_storage().data_ptr() == mapped] += weight.numel() * weight.element_size()
    assert bytes_of[True] > 0.99 * sum(bytes_of.values())


def test_a_node_of_another_release_is_a_sentence(tmp_path: Path, torch_engine_dir: Path) -> None:
    for path in torch_engine_dir.glob("rank0.onnx*"):
        shutil.copy(path, tmp_path)
    proto = onnx.load(tmp_path / "rank0.onnx", load_external_data=False)
    proto.graph.node[0].op_type = "Mystery"
    onnx.save(proto, tmp_path / "rank0.onnx")
    with pytest.raises(EngineError, match="is a Mystery, which this release does not run on torch"):
        Graph(tmp_path / "rank0.onnx", torch.device("cpu"), {})


def test_what_a_cpu_does_not_compute_is_a_sentence(tmp_path: Path, checkpoint_dir: Path) -> None:
    build(checkpoint_dir, tmp_path / "half", target="torch", dtype="float16")
    with pytest.raises(EngineError, match="computes in float16, which CPUs do not: open it on a GPU"):
        LLM(tmp_path / "half", device="cpu")
    with pytest.raises(BuildError, match="quant_algo W8A8 is for --target openvino"):
        build(checkpoint_dir, tmp_path / "integers", target="torch", quant_algo="W8A8")


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_a_cache_of_another_dtype_is_refused(torch_engine_dir: Path, dtype: Any) -> None:
    with pytest.raises(EngineError, match=f"has no KV cache in {dtype}: kv_cache_dtype is auto or float32"):
        LLM(torch_engine_dir, kv_cache_config=KvCacheConfig(dtype=dtype))


def test_the_device_is_chosen_and_told(
    torch_engine_dir: Path, engine_dir: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with LLM(torch_engine_dir, device="cpu"):
        assert "no GPU" not in caplog.text
    with LLM(torch_engine_dir):
        assert "torch finds no GPU, so the engine runs on the CPU." in caplog.text
    with pytest.raises(DeviceError, match="torch finds no GPU for --device cuda"):
        LLM(torch_engine_dir, device="cuda")
    with pytest.raises(EngineError, match="device cpu is for engines of the target torch"):
        LLM(engine_dir, device="cpu")
    for command, more in (("generate", ["--prompt", "x"]), ("perplexity", ["--text", str(Path(__file__))])):
        assert main([command, "--engine_dir", str(torch_engine_dir), "--device", "cuda", *more]) == 1
        assert "torch finds no GPU for --device cuda" in capfd.readouterr().err


def test_a_cache_that_does_not_fit_is_a_sentence(torch_engine_dir: Path) -> None:
    with pytest.raises(DeviceError, match="does not fit on cpu"):
        LLM(torch_engine_dir, kv_cache_config=KvCacheConfig(max_tokens=1 << 50))
