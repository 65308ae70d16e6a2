# SPDX-License-Identifier: Apache-2.0
"""On a GPU: `torch.ops.adaptive_k` and adapted models of `transformers`, as tests/torch_binding has them on a CPU."""

from __future__ import annotations

import os
from typing import Any

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

from adaptive_k_moe.policy import read_policy_file  # noqa: E402
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
