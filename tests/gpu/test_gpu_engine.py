# SPDX-License-Identifier: Apache-2.0
"""On a GPU: from the checkpoint through TensorRT's own builder to `LLM`, against `transformers`.

Needs TensorRT's Python package, cuda-python, and the plugin: build/cuda/libadaptive_k_tensorrt.so of `make cuda`, or
what ADAPTIVE_K_TENSORRT_LIBRARY names.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

for package in ("torch", "transformers", "adaptive_k_moe.engine_builder"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install .[tensorrt,test]")

from engine_checks import assert_answers_equal_transformers, assert_policies_are_followed  # noqa: E402
from gpu_engines import POLICIES  # noqa: E402

from adaptive_k_moe.engine_builder import build  # noqa: E402
from adaptive_k_moe.policy import PolicySet  # noqa: E402
from adaptive_k_moe.runtime import LLM, SamplingParams  # noqa: E402

from checkpoints import MIXTRAL_SMALL, Shape, make_checkpoint  # noqa: E402
from nemotron_models import Nemotron, make_nemotron  # noqa: E402

LIBRARY = Path(os.environ.get("ADAPTIVE_K_TENSORRT_LIBRARY", ROOT / "build" / "cuda" / "libadaptive_k_tensorrt.so"))
SIZES: dict[str, Any] = {"max_batch_size": 3, "max_seq_len": 160, "max_num_tokens": 24}
# TensorRT's attention has kernels for some head sizes only, and each of its addresses is a multiple of 256.
HEADS = {"head_dim": 16}
STATES = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2}
SHAPES = [
    Shape("heads of 16", HEADS),
    Shape("shared expert, dense layer", {**HEADS, "mlp_only_layers": [0]}, "qwen2_moe"),
    Shape("norms of heads", HEADS, "qwen3_moe"),
    Shape("clipped", {"hidden_size": 64, "num_key_value_heads": 4, "clip_qkv": 0.7}, "olmoe"),
    Nemotron("nemotron", "ME*-ME", {**HEADS, **STATES}),
]


def missing() -> str | None:
    """Why there is nothing to run, if so, beside what all tests here need."""
    found = importlib.util.find_spec("tensorrt")
    if found is None or found.origin is None:  # a folder of this name can be found, too
        return "TensorRT's Python package is not installed"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "cuda-python is not installed"
    return None if LIBRARY.exists() else f"{LIBRARY} is not built"


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_K_TENSORRT_LIBRARY", str(LIBRARY))


def make(shape: Shape | Nemotron, directory: Path) -> Path:
    return (make_nemotron if isinstance(shape, Nemotron) else make_checkpoint)(directory, shape)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-2), ("bfloat16", 6e-2)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_greedy_tokens_of_a_ragged_batch(
    shape: Shape | Nemotron, dtype: Any, tolerance: float, tmp_path: Path
) -> None:
    checkpoint = make(shape, tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "engine", target="tensorrt", dtype=dtype, **SIZES)
    assert_answers_equal_transformers(tmp_path / "engine", checkpoint, tolerance=tolerance)


def test_policies_of_requests_in_one_batch(tmp_path: Path) -> None:
    checkpoint = make(SHAPES[0], tmp_path / "checkpoint")
    policy = PolicySet.model_validate(POLICIES)
    build(checkpoint, tmp_path / "engine", target="tensorrt", dtype="float16", policy=policy, **SIZES)
    assert_policies_are_followed(tmp_path / "engine")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_experts_of_few_bits(precision: Any, tmp_path: Path) -> None:
    """The answers go on from the prompt as the float16 engine's do, for the most part."""
    answers = []
    for name, options in (("wide", {}), ("narrow", {"weight_only_precision": precision})):
        build(MIXTRAL_SMALL, tmp_path / name, target="tensorrt", dtype="float16", **SIZES, **options)
        with LLM(tmp_path / name) as llm:
            answers.append(llm.generate("And it came to pass", SamplingParams(max_tokens=1, logprobs=10)))
    best = [set(answer.outputs[0].logprobs[0]) for answer in answers]
    assert len(best[0] & best[1]) >= 5


def test_the_bundled_model_answers_in_company_as_alone(tmp_path: Path) -> None:
    """Long enough that decode is a replayed graph, over slots that others have used."""
    build(MIXTRAL_SMALL, tmp_path / "engine", target="tensorrt", dtype="float16", **SIZES)
    prompts = ["And it came to pass", "The king said", "import os", "In those days", "He went"]
    sampling = SamplingParams(max_tokens=24, end_id=-1)
    with LLM(tmp_path / "engine") as llm:
        alone = [llm.generate(prompt, sampling).outputs[0] for prompt in prompts]
        together = [output.outputs[0] for output in llm.generate(prompts * 3, sampling)]
        session: Any = llm._engine._session
        assert any(decode.graph is not None for decode in session._decode._own.values())
    # Products of other batch sizes may round otherwise, and a near tie turn with them.
    same = sum(one.token_ids[:8] == other.token_ids[:8] for one, other in zip(alone * 3, together, strict=True))
    assert same >= 12
