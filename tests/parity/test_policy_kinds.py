# SPDX-License-Identifier: Apache-2.0
"""Requests of every policy kind in one engine, against `transformers` with the NumPy oracle in its routers' place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from adaptive_k_moe.engine_builder import build, targets
from adaptive_k_moe.engine_builder import build as build_module
from adaptive_k_moe.engine_config import write_engine_config
from adaptive_k_moe.errors import PolicyError
from adaptive_k_moe.policy import PolicySet, PolicyTables
from adaptive_k_moe.runtime import LLM, SamplingParams

import oracle
from checkpoints import Shape, make_checkpoint

POLICIES: dict[str, Any] = {
    "one": {"kind": "fixed", "k": 1},
    "sure": {"kind": "entropy", "thresholds": [0.9, 1.3], "k": [1, 2, 3],
             "layers": {"1": {"thresholds": [1], "k": [1, 3]}}},
    "mass": {"kind": "top_p", "p": 0.62, "layers": {"0": {"p": 0.8, "k_min": 2}}},
    "relative": {"kind": "ratio", "layers": {"1": {"ratio": 0.45, "k_max": 2}}},
    "weighed": {"kind": "contribution", "p": 0.71, "layers": {"1": {"p": 0.55}}},
    "bounded": {"kind": "top_p", "layers": {"0": {"p": 1, "k_min": 2, "k_max": 2}, "1": {"p": 0.4, "k_max": 2}}},
}  # fmt: skip


def policies(config: Any, *, norms: bool = True) -> PolicySet:
    rng = np.random.default_rng(0)
    experts = config.num_local_experts if hasattr(config, "num_local_experts") else config.num_experts
    found = rng.uniform(0.2, 3, (config.num_hidden_layers, experts)).round(3).tolist()
    return PolicySet.model_validate({"policies": POLICIES, "expert_norms": found if norms else None})


class Routed:
    """A `transformers` model that routes by the oracle under a row of an engine's tables."""

    def __init__(self, checkpoint: Path, tables: PolicyTables, **routing: Any) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.row, self.k = 0, []
        for layer, block in enumerate(self.model.model.layers):
            gate = block.mlp.gate
            gate.forward = lambda hidden, gate=gate, layer=layer: self.route(hidden, gate, tables, layer, routing)

    def route(self, hidden: Any, gate: Any, tables: PolicyTables, layer: int, routing: dict[str, Any]) -> Any:
        logits = (hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.T).detach()
        tokens = [
            oracle.route_token(
                row,
                int(tables.policy_kind[self.row]),
                tables.thresholds[layer, self.row],
                tables.k_values[layer, self.row],
                expert_norms=tables.expert_norms[layer],
                **routing,
            )
            for row in logits.numpy()
        ]
        width = max(token.k for token in tokens)
        # A dropped expert has no weight; which one stands there does not matter, but none may stand there twice.
        experts = np.stack(
            [np.r_[t.experts, np.setdiff1d(np.arange(logits.shape[1]), t.experts)][:width] for t in tokens]
        )
        weights = np.stack([np.pad(t.weights, (0, width - t.k)) for t in tokens])
        self.k.append([token.k for token in tokens])
        return logits, torch.tensor(weights, dtype=torch.float32), torch.tensor(experts)

    def run(self, row: int, ids: list[int]) -> tuple[Any, Any]:
        """Logits [T, V] and k [T, L]."""
        self.row, self.k = row, []
        with torch.no_grad():
            logits = self.model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        return logits, np.array(self.k).T


@pytest.mark.parametrize(
    ("shape", "routing"),
    [(Shape("plain"), {}), (Shape("plain", {}, "olmoe"), {"norm_topk_prob": False})],
    ids=["mixtral", "olmoe"],
)
def test_every_kind_at_once_equals_transformers(shape: Shape, routing: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", shape)
    rules = policies(transformers.AutoConfig.from_pretrained(checkpoint))
    config = build(checkpoint, tmp_path / "engine", policy=rules, max_num_tokens=48, max_batch_size=7)
    tables = config.policy_tables()
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 101, 40).tolist() for _ in tables.names]
    sampling = [
        SamplingParams(max_tokens=1, end_id=-1, return_context_logits=True, adaptive_k_policy=name)
        for name in tables.names
    ]
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        outputs = llm.generate(prompts, sampling)
    reference = Routed(checkpoint, tables, **routing)
    for row, (name, prompt, output) in enumerate(zip(tables.names, prompts, outputs, strict=True)):
        logits, k = reference.run(row, prompt)
        np.testing.assert_array_equal(output.prompt_k, k, err_msg=name)
        assert np.abs(output.context_logits - logits).max() <= 1e-4 * np.abs(logits).max(), name
        if name not in ("full", "one"):
            assert len(np.unique(k)) > 1, f"{name} decides nothing here"


def lower_as_before(directory: Path, *arguments: Any, **options: Any) -> None:
    """The graph of a release whose operator had no norms, lowered."""
    path = directory / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    norms = {node.output[0] for node in proto.graph.node if "expert_norms" in node.input}
    kept = [node for node in proto.graph.node if node.output[0] not in norms]
    for node in kept:
        if node.op_type == "AdaptiveKMoe":
            assert node.input.pop() in norms
            attributes = [attribute for attribute in node.attribute if attribute.name != "has_expert_norms"]
            del node.attribute[:]
            node.attribute.extend(attributes)
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    inputs = [value for value in proto.graph.input if value.name != "expert_norms"]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    onnx.save(proto, path)
    targets.lower(directory, *arguments, **options)


def test_an_engine_built_before_there_were_norms_runs_all_other_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape("plain"))
    rules = policies(transformers.AutoConfig.from_pretrained(checkpoint), norms=False).model_dump()
    weighed = rules["policies"].pop("weighed")
    build(checkpoint, tmp_path / "new", policy=PolicySet.model_validate(rules))
    monkeypatch.setattr(sys.modules[build_module.__module__], "lower", lower_as_before)
    config = build(checkpoint, tmp_path / "old", policy=PolicySet.model_validate(rules))
    named = [name for name in ("old", "new") if '"expert_norms"' in (tmp_path / name / "rank0.xml").read_text()]
    assert named == ["new"]
    prompt = np.random.default_rng(1).integers(3, 101, 40).tolist()
    sampling = [
        SamplingParams(max_tokens=4, end_id=-1, return_context_logits=True, adaptive_k_policy=name)
        for name in config.policy_tables().names
    ]
    made: dict[str, Any] = {}
    for name in ("old", "new"):
        with LLM(tmp_path / name, skip_tokenizer_init=True) as llm:
            made[name] = llm.generate([prompt] * len(sampling), sampling)
    for old, new in zip(made["old"], made["new"], strict=True):
        np.testing.assert_array_equal(old.context_logits, new.context_logits)
    with_norms = policies(transformers.AutoConfig.from_pretrained(checkpoint))
    changed = config.model_copy(update={"adaptive_k": with_norms.with_policy("weighed", weighed)})
    write_engine_config(tmp_path / "old", changed)
    with pytest.raises(PolicyError, match="without the policy kind 'contribution': build it again"):
        LLM(tmp_path / "old", skip_tokenizer_init=True)
