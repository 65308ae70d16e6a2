# SPDX-License-Identifier: Apache-2.0
"""LiteLLM's provider `triton/` against a real server: its requests, spoken here, and the package itself where it is.

The package weighs hundreds of megabytes, so it has an environment of its own, which `make litellm` sets up.
"""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from adaptive_k_moe.client import Client
from adaptive_k_moe.model_repository import TritonServer

MODELS = ["ensemble", "tensorrt_llm_bls"]
PROMPT = "import os"

# Asks for whole answers and streams, and for one that is refused; prints what came, a line of JSON each.
PROGRAM = """
import json, sys
import litellm
litellm.suppress_debug_info = True
ask = dict(model="triton/any", messages=[{"role": "user", "content": sys.argv[2]}], api_base=sys.argv[1])
for options in ({"max_tokens": 5}, {"max_tokens": 5, "exclude_input_in_output": True, "adaptive_k_policy": "top1"}):
    print(json.dumps(litellm.completion(**ask, **options).choices[0].message.content))
    pieces = [chunk.choices[0].delta.content for chunk in litellm.completion(**ask, **options, stream=True)]
    print(json.dumps([piece for piece in pieces if piece]))
try:
    litellm.completion(**ask, max_tokens=5, beam_width=3)
except litellm.exceptions.BadRequestError as error:
    print(json.dumps(str(error)))
"""


def _post(url: str, body: dict[str, Any]) -> tuple[int, str]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("model", MODELS)
def test_what_litellm_sends_is_answered_as_it_reads(server: TritonServer, client: Client, model: str) -> None:
    url = f"http://{server.http_url}/v2/models/{model}/generate"
    for more in ({}, {"adaptive_k_policy": "top1"}):
        expected = client.generate(PROMPT, max_tokens=5, **more).text
        body = {"text_input": PROMPT, "parameters": {"max_tokens": 5, **more}, "stream": False}
        status, content = _post(url, body)
        assert (status, json.loads(content)["text_output"]) == (200, PROMPT + expected)
        status, content = _post(f"{url}_stream", {**body, "stream": True})
        events = [line for line in content.splitlines() if line]
        assert status == 200 and all(event.startswith("data: ") for event in events)
        assert "".join(json.loads(event[6:]).get("text_output", "") for event in events) == expected
    # What it asks for where a caller does not say is more than this engine's max_seq_len.
    status, content = _post(url, {"text_input": PROMPT, "parameters": {"max_tokens": 2000}, "stream": False})
    assert (status, json.loads(content)["text_output"].startswith(PROMPT)) == (200, True)
    status, content = _post(url, {"text_input": PROMPT, "parameters": {"max_tokens": 5, "beam_width": 3}})
    assert (status, "beam_width is 3: beam search is not supported" in content) == (400, True)


def test_litellm_itself(server: TritonServer, client: Client, repository: Path) -> None:
    python = repository / "build" / "litellm" / "bin" / "python"
    if not python.is_file():
        pytest.skip("LiteLLM is not here: run `make litellm`")
    url = f"http://{server.http_url}/v2/models/ensemble/generate"
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # or it asks the network for its price list
    ran = subprocess.run(
        [python, "-c", PROGRAM, url, PROMPT], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ran.returncode == 0, ran.stderr
    whole, pieces, other, other_pieces, refusal = (json.loads(line) for line in ran.stdout.splitlines()[:5])
    expected = client.generate(PROMPT, max_tokens=5).text
    assert (whole, "".join(pieces)) == (PROMPT + expected, expected)
    assert len(pieces) > 1
    top1 = client.generate(PROMPT, max_tokens=5, adaptive_k_policy="top1").text
    assert (other, "".join(other_pieces)) == (top1, top1)
    assert "beam_width is 3: beam search is not supported" in refusal
