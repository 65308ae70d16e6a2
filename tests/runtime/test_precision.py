# SPDX-License-Identifier: Apache-2.0
"""What engines for CPUs compute in, and what their caches hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptive_k_moe.cli import main
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import EngineConfig, read_engine_config
from adaptive_k_moe.errors import EngineError, ServerError
from adaptive_k_moe.model_config import Dtype, KvCacheDtype, QuantAlgo
from adaptive_k_moe.model_repository.repository import write_model_repository
from adaptive_k_moe.model_repository.server import TritonServer
from adaptive_k_moe.runtime import LLM, KvCacheConfig, SamplingParams
from adaptive_k_moe.runtime.session import create_session
from adaptive_k_moe.runtime.session.openvino import OpenVinoSession, precision_options

from checkpoints import make_mixtral
from reference import has_bfloat16

# Two blocks of the cache and more in each sequence, beside one another.
PROMPTS = [np.random.default_rng(seed).integers(3, 101, length).tolist() for seed, length in enumerate((70, 3, 41))]
GREEDY = SamplingParams(max_tokens=8, end_id=-1, return_context_logits=True)
SHAPE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "num_key_value_heads": 2}


class Processor:
    """What OpenVINO says of one."""

    def __init__(self, *capabilities: str) -> None:
        self.capabilities = ["FP32", "INT8", *capabilities]

    def get_property(self, device: str, name: str) -> list[str]:
        assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
        return self.capabilities


class Engines:
    """Engines of one checkpoint, each built once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._checkpoint = make_mixtral(directory / "checkpoint", **SHAPE)

    def get(self, dtype: Dtype, quant_algo: QuantAlgo | None = None) -> Path:
        engine = self._directory / f"{dtype}-{quant_algo}"
        if not engine.exists():
            build(self._checkpoint, engine, dtype=dtype, quant_algo=quant_algo, max_num_tokens=24, max_seq_len=96)
        return engine

    def logits(self, engine: Path, kv_cache_dtype: KvCacheDtype = "auto") -> list[np.ndarray]:
        with LLM(engine, skip_tokenizer_init=True, kv_cache_config=KvCacheConfig(dtype=kv_cache_dtype)) as llm:
            return [output.context_logits for output in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("precision"))


def config_of(engine: Path) -> EngineConfig:
    return read_engine_config(engine, verify_files=False)


def precisions(session: OpenVinoSession) -> dict[str, str]:
    """What each operator of a loaded engine runs in, by its name."""
    graph = session._request.get_compiled_model().get_runtime_model()
    return {
        node.get_friendly_name(): str(node.get_rt_info()["runtimePrecision"].astype(str)) for node in graph.get_ops()
    }


def distance(found: list[np.ndarray], exact: list[np.ndarray]) -> float:
    """The usual token's largest difference beside its largest logit; a few choose other experts near a tie."""
    rows = [np.abs(a - b).max(-1) / np.abs(b).max(-1) for a, b in zip(found, exact, strict=True)]
    return float(np.median(np.concatenate(rows)))


@pytest.mark.parametrize(
    ("dtype", "quant_algo", "instructions", "computed", "group"),
    [
        ("float32", None, "amx", "f32", "0"),
        ("bfloat16", None, "amx", "bf16", "0"),
        ("bfloat16", None, "avx512 bf16", "bf16", "0"),
        ("bfloat16", None, "avx512", "f32", "0"),
        ("bfloat16", "W8A16", "amx", "f32", "0"),
        ("bfloat16", "W8A8", "amx", "bf16", "32"),
        ("bfloat16", "W8A8", "avx512 bf16", "f32", "32"),
        ("bfloat16", "W4A8", "avx512", "f32", "32"),
        ("float32", "W8A8", "amx", "f32", "32"),
    ],
)
def test_an_engine_computes_in_what_it_was_built_for(
    engines: Engines, dtype: Dtype, quant_algo: QuantAlgo | None, instructions: str, computed: str, group: str
) -> None:
    model = config_of(engines.get(dtype, quant_algo)).pretrained_config
    processor = Processor() if instructions == "avx512" else Processor("BF16")
    options = precision_options(model, "auto", processor, instructions.split()[0])
    assert options == {
        "INFERENCE_PRECISION_HINT": computed,
        "KV_CACHE_PRECISION": computed,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
    }


def test_bfloat16_engines_multiply_in_bfloat16_but_route_in_float32(engines: Engines) -> None:
    if not has_bfloat16():
        pytest.skip("this processor has no bfloat16")
    engine = engines.get("bfloat16")
    session = OpenVinoSession(engine, config_of(engine))
    found = precisions(session)
    session.close()
    routers = {name: precision for name, precision in found.items() if name.endswith("router_logits")}
    assert len(routers) == 2
    assert set(routers.values()) == {"f32"}
    products = {name: precision for name, precision in found.items() if name.endswith(("_proj.out", "logits"))}
    assert {precision for name, precision in products.items() if name not in routers} == {"bf16"}


def test_logits_of_each_precision_are_near_the_exact_ones(engines: Engines) -> None:
    exact = engines.logits(engines.get("float32"))
    half = distance(engines.logits(engines.get("bfloat16")), exact)
    assert (1e-4 if has_bfloat16() else 1e-6) < half < 0.1
    whole = engines.logits(engines.get("float32", "W8A16"))
    assert 1e-4 < distance(whole, exact) < 0.1
    for dtype in ("float32", "bfloat16"):
        # Rounded activations show, and are not far off.
        assert 1e-4 < distance(engines.logits(engines.get(dtype, "W8A8")), whole) < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_int8_cache_is_near_the_engines_own(engines: Engines, dtype: Dtype) -> None:
    engine = engines.get(dtype)
    own, small = engines.logits(engine), engines.logits(engine, "int8")
    assert 1e-5 < distance(small, own) < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_caches_are_of_the_dtype_asked_for(engines: Engines, dtype: Dtype) -> None:
    engine = engines.get(dtype)
    config = config_of(engine)
    own = "bfloat16" if dtype == "bfloat16" and has_bfloat16() else "float32"
    sizes: dict[str, int] = {}
    words: list[KvCacheDtype] = ["auto", own, "int8"]  # type: ignore[list-item]
    for word in words:
        session = OpenVinoSession(engine, config, kv_cache_max_tokens=320, kv_cache_dtype=word)
        assert session.block_size == 32
        assert session.num_blocks == 10
        sizes[word] = sum(tensor.byte_size for tensor in session._cache.values())
        session.close()
    values = 320 * 2 * 2 * 2 * 16  # tokens, layers, keys and values, heads, their size
    assert sizes["auto"] == sizes[own] == values * (2 if own == "bfloat16" else 4)
    assert values < sizes["int8"] < values * 1.6  # small heads: their scales weigh


def test_a_cache_that_attention_cannot_read_is_refused(engines: Engines, capsys: pytest.CaptureFixture[str]) -> None:
    engine = engines.get("float32")
    arguments = ["generate", "--engine_dir", str(engine), "--prompt", "a", "--max_tokens", "1"]
    with pytest.raises(EngineError, match=r"computes in float32 .* no KV cache in bfloat16: .* auto, float32 or int8"):
        LLM(engine, skip_tokenizer_init=True, kv_cache_config=KvCacheConfig(dtype="bfloat16"))
    with pytest.raises(EngineError, match="dtype is 'fp8': it must be one of auto, float32, bfloat16, int8"):
        KvCacheConfig(dtype="fp8")  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        main([*arguments, "--kv_cache_dtype", "fp8"])
    assert "invalid choice: 'fp8'" in capsys.readouterr().err


def test_a_server_passes_the_caches_dtype_on(engines: Engines, tmp_path: Path) -> None:
    write_model_repository(tmp_path, engines.get("float32"), kv_cache_dtype="int8")
    text = (tmp_path / "ensemble" / "config.pbtxt").read_text()
    assert re.search(r'key: "kv_cache_dtype"\s+value\s*:?\s*\{\s*string_value: "int8"', text), text
    with pytest.raises(ServerError, match="kv_cache_dtype is 'fp8': it must be one of auto"):
        TritonServer(engines.get("float32"), kv_cache_dtype="fp8")  # type: ignore[arg-type]


def test_a_gpus_cache_is_its_engines_own(tmp_path: Path, engines: Engines) -> None:
    config = config_of(engines.get("float32"))
    build_config = config.build_config.model_copy(update={"target": "tensorrt"})
    with pytest.raises(EngineError, match="kv_cache_dtype int8 is for the openvino target"):
        create_session(tmp_path, config.model_copy(update={"build_config": build_config}), kv_cache_dtype="int8")
