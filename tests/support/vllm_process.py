# SPDX-License-Identifier: Apache-2.0
"""A program of the environment with vLLM: starts an engine, runs rounds of requests, prints what each gave.

    python vllm_process.py '{"engine": {...}, "rounds": [[{"prompt": [1, 2], "tokens": 4, "policy": "fast"}]]}'

`engine` is for `vllm.LLM`. A request's answer is its tokens, or the sentence with which it was refused. With policies,
each forward's rows, k and reads are printed too.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the worker's state can be looked at

import vllm


def answers(llm: Any, requests: list[dict[str, Any]]) -> list[Any]:
    engine = llm.llm_engine
    found: dict[str, Any] = {}
    for index, request in enumerate(requests):
        params = vllm.SamplingParams(
            max_tokens=request["tokens"],
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            extra_args={"adaptive_k_policy": request["policy"]} if request.get("policy") else None,
        )
        try:
            engine.add_request(str(index), {"prompt_token_ids": request["prompt"]}, params)
        except ValueError as error:
            found[str(index)] = str(error)
    while engine.has_unfinished_requests():
        for output in engine.step():
            found[output.request_id.split("-")[0]] = list(output.outputs[0].token_ids)
    return [found[str(index)] for index in range(len(requests))]


def main() -> None:
    order = json.loads(sys.argv[1])
    llm = vllm.LLM(skip_tokenizer_init=True, disable_log_stats=True, enable_prefix_caching=False, **order["engine"])
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    runners = sorted({type(layer).__name__ for layer in layers if "Runner" in type(layer).__name__})
    steps: Any = deque()
    if "ADAPTIVE_K_POLICY" in os.environ:
        [server] = {layer.router.server for layer in layers if "Runner" in type(layer).__name__}
        steps = server.steps = deque(maxlen=None)
    rounds = []
    for requests in order["rounds"]:
        steps.clear()
        found = answers(llm, requests)
        seen = [{"rows": step.rows.tolist(), "k": [k.tolist() for k in step.k], "reads": step.reads} for step in steps]
        rounds.append({"answers": found, "steps": seen})
    print(json.dumps({"runners": runners, "rounds": rounds}))


if __name__ == "__main__":
    main()
