# SPDX-License-Identifier: Apache-2.0
"""On a GPU: `torch.ops.adaptive_k` and adapted models of `transformers`, as tests/torch_binding has them on a CPU."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gpu_device import LIBRARY

torch = pytest.importorskip("torch", reason="torch is not installed")
for package in ("transformers", "adaptive_k_moe.engine_builder.models"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[torch]'")
if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU", allow_module_level=True)
os.environ.setdefault("ADAPTIVE_K_CUDA_LIBRARY", str(LIBRARY))

from cuda_mamba import CASES  # noqa: E402
from torch_cases import (  # noqa: E402
    FORMATS,
    ROUTERS,
    attributes_of,
    check_mamba,
    check_moe,
    check_ranges,
    make,
    tensors_of,
)

from adaptive_k_moe.engine_builder import build  # noqa: E402
from adaptive_k_moe.engine_config import read_engine_config  # noqa: E402
from adaptive_k_moe.policy import read_policy_file  # noqa: E402
from adaptive_k_moe.runtime import LLM, SamplingParams  # noqa: E402
from adaptive_k_moe.runtime.session import StepInput  # noqa: E402
from adaptive_k_moe.runtime.session.torch import TorchSession  # noqa: E402
from adaptive_k_moe.torch import adapt  # noqa: E402

from checkpoints import BUNDLED_MODELS, REPOSITORY  # noqa: E402
from reference import reference_model  # noqa: E402

MOE = torch.ops.adaptive_k.moe


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_torch_moe_and_route(tokens: int, form: str, router: str) -> None:
    check_moe(*make(router, form, tokens), "cuda")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [3, 300])
def test_torch_ranges_of_the_experts(tokens: int, form: str) -> None:
    check_ranges(*make("sigmoid", form, tokens), "cuda")


@pytest.mark.parametrize("case", CASES[:8], ids=str)
@pytest.mark.parametrize("element", ["float32", "float16", "bfloat16"])
def test_torch_mamba2(case: Any, element: str) -> None:
    check_mamba(case, element, "cuda")


@pytest.mark.parametrize("form", ["float16", "int4"])
def test_torch_checks_of_an_operator(form: str) -> None:
    layer, inputs, _ = make("softmax", form, 6)
    torch.library.opcheck(MOE.default, (), {**tensors_of(inputs, "cuda"), **attributes_of(layer)})


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("tokens", [4, 200])
def test_torch_graph_replays_new_inputs(tokens: int, form: str) -> None:
    """Captured on a stream of its own, and nothing waits for the device; workspaces come from the graph's own pool."""
    layer, inputs, _ = make("softmax", form, tokens)
    fixed, attributes = tensors_of(inputs, "cuda"), attributes_of(layer)
    other = {name: fixed[name].flip(0).contiguous() for name in ("hidden_states", "router_logits", "policy_index")}
    expected = [MOE(**{**fixed, **step}, **attributes) for step in ({}, other)]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        MOE(**fixed, **attributes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):  # in which whatever waits for the device is an error
        found = MOE(**fixed, **attributes)
    for step, wanted in zip(({}, other), expected, strict=True):
        for name, tensor in step.items():
            fixed[name].copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        for left, right in zip(found, wanted, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("checkpoint", BUNDLED_MODELS, ids=lambda path: path.name)
def test_torch_generate_gives_the_cpus_tokens(checkpoint: Any) -> None:
    policies = read_policy_file(REPOSITORY / "examples" / "policies" / f"{checkpoint.name}.json")
    model = reference_model(checkpoint)
    prompt = torch.arange(20, 40)[None]
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answers: dict[tuple[str, str], Any] = {}
    for device in ("cpu", "cuda"):
        model.to(device)
        with adapt(model, policies, history=None) as adapted:
            for name in ("full", "balanced", "fast"):
                adapted.policy_index = name
                adapted.steps.clear()
                tokens = model.generate(prompt.to(device), **options)
                k = torch.cat([step.k for step in adapted.steps], dim=1)
                answers[device, name] = tokens.tolist(), k.tolist()
    for name in ("full", "balanced", "fast"):
        assert answers["cuda", name] == answers["cpu", name], name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_torch_ranks_give_the_tokens_of_one_process(tmp_path: Any) -> None:
    """Expert parallel over NCCL, each process with a GPU of its own."""
    from expert_parallel_rank import answers, torchrun

    checkpoint = REPOSITORY / "examples" / "models" / "olmoe-small"
    policy = REPOSITORY / "examples" / "policies" / "olmoe-small.json"
    prompt, names = torch.arange(20, 60).view(2, 20), ["full", "balanced", "decode_16"]
    model = reference_model(checkpoint).to("cuda")
    with adapt(model, policy, history=None) as adapted:
        expected = answers(model, adapted, names, prompt.to("cuda"), 16)
    ranks = min(torch.cuda.device_count(), 8)
    task = {"checkpoint": str(checkpoint), "prompt": prompt.tolist(), "policies": str(policy), "names": names}
    (told,) = torchrun(tmp_path, ranks, [task | {"new_tokens": 16, "load": "part"}], "cuda")
    for rank in told:
        for name in names:
            assert rank[name]["tokens"].tolist() == expected[name]["tokens"].tolist(), name


PROMPTS = [list(range(20, 20 + length)) for length in (20, 3, 130, 41, 7)]
NAMES = ("full", "balanced", "fast")


def engine_of(checkpoint: Any, directory: Any, dtype: Any) -> Any:
    policies = read_policy_file(REPOSITORY / "examples" / "policies" / f"{checkpoint.name}.json")
    build(checkpoint, directory, target="torch", dtype=dtype, policy=policies, max_num_tokens=64, max_seq_len=256)
    return directory


def answers_of(llm: LLM) -> list[tuple[list[int], list[list[int]]]]:
    """All at a time, the policies in turn: tokens and k."""
    sampling = [
        SamplingParams(max_tokens=24 + 3 * index, end_id=-1, adaptive_k_policy=NAMES[index % len(NAMES)])
        for index in range(len(PROMPTS))
    ]
    outputs = llm.generate(PROMPTS, sampling)
    return [(output.outputs[0].token_ids, output.outputs[0].k.tolist()) for output in outputs]


@pytest.mark.parametrize("checkpoint", BUNDLED_MODELS, ids=lambda path: path.name)
def test_torch_engine_gives_the_cpus_tokens(checkpoint: Any, tmp_path: Any) -> None:
    """Chunked prefill beside decode; twice, so that decode is replayed from CUDA graphs of every shape."""
    engine = engine_of(checkpoint, tmp_path / "engine", "float32")
    with LLM(engine, device="cpu", skip_tokenizer_init=True) as llm:
        expected = answers_of(llm)
    with LLM(engine, device="cuda", skip_tokenizer_init=True) as llm:
        assert [answers_of(llm), answers_of(llm)] == [expected] * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("checkpoint", BUNDLED_MODELS, ids=lambda path: path.name)
def test_torch_engine_replays_what_it_computes(checkpoint: Any, dtype: str, tmp_path: Any) -> None:
    """In 16 bits: steps of decode in a graph and without one, to the bit, before and after the policies change."""
    engine = engine_of(checkpoint, tmp_path / "engine", dtype)
    config = read_engine_config(engine)
    tables = config.policy_tables()
    other = replace(tables, k_values=np.ones_like(tables.k_values))
    sessions = [TorchSession(engine, config, device="cuda") for _ in range(2)]
    sessions[1]._decode._pool = None  # type: ignore[union-attr]  # runs what the other one replays
    slots = np.arange(3, dtype=np.int32) if sessions[0].num_state_slots else None
    blocks = [list(range(16 * row, 16 * row + 16)) for row in range(3)]

    def step(past: int, new: int) -> StepInput:
        count = 3 * new
        return StepInput(
            input_ids=np.arange(30, 30 + count),
            position_ids=np.tile(np.arange(past, past + new), 3),
            policy_index=np.zeros(count, np.int32),
            past_lens=np.full(3, past, np.int32),
            subsequence_begins=np.arange(0, count + 1, new, dtype=np.int32),
            block_tables=blocks,
            state_slots=slots,
            logits_indices=np.arange(new - 1, count, new),
        )

    for followed in (tables, other):
        for session in sessions:
            session.set_policies(followed)
        for past, new in ((0, 20), (20, 1), (21, 1), (22, 1), (23, 1)):
            graphs, plain = (session.step(step(past, new)) for session in sessions)
            np.testing.assert_array_equal(graphs.logits, plain.logits)
            np.testing.assert_array_equal(graphs.k, plain.k)
            assert (graphs.k == 1).all() == (followed is other)
    assert sessions[0]._decode._graphs  # type: ignore[union-attr]
