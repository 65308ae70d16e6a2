# SPDX-License-Identifier: Apache-2.0
"""An engine with int4 weights behind a real Triton server."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from adaptive_k_moe.client import Client
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.model_repository import TritonServer
from adaptive_k_moe.policy import PolicySet
from adaptive_k_moe.runtime import LLM, SamplingParams

PROMPTS = ["And it came to pass", "The king said"]


def test_a_served_engine_answers_as_in_process(checkpoint_dir: Path, tmp_path: Path) -> None:
    policies = PolicySet.model_validate({"policies": {"some": {"kind": "entropy", "thresholds": [1.2], "k": [1, 2]}}})
    engine = tmp_path / "engine"
    build(checkpoint_dir, engine, policy=policies, weight_only_precision="int4", max_seq_len=128)
    options = {"max_tokens": 16, "end_id": -1, "adaptive_k_policy": "some"}
    with LLM(engine, num_threads=2) as llm:
        expected = [llm.generate(prompt, SamplingParams(**options)).outputs[0] for prompt in PROMPTS]
    with (
        TritonServer(
            engine, http_port=0, grpc_port=0, metrics_port=0, log_file=tmp_path / "triton.log", num_threads=2
        ) as server,
        Client(server.grpc_url, timeout=60) as client,
    ):
        answers = [client.generate(prompt, **options) for prompt in PROMPTS]
    for answer, output in zip(answers, expected, strict=True):
        assert answer.text == output.text
        np.testing.assert_array_equal(answer.k, output.k)
        assert set(np.unique(output.k)) == {1, 2}
