# SPDX-License-Identifier: Apache-2.0
"""The playground's own server, without a browser, before a real Triton server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from playground_process import HOSTILE, ask, playground, read_events
from prometheus_client.parser import text_string_to_metric_families

from adaptive_k_moe import cli
from adaptive_k_moe.client import Client
from adaptive_k_moe.errors import ClientError
from adaptive_k_moe.model_repository import TritonServer
from adaptive_k_moe.observability.commands.playground import default_metrics_url
from adaptive_k_moe.observability.playground.answers import _piece
from adaptive_k_moe.observability.playground.app import STATIC
from adaptive_k_moe.observability.playground.server_metrics import chart_numbers, read_metrics

from waiting import eventually

PROMPT = "And it came to pass"


def _metric(server: TritonServer, name: str, **labels: str) -> float:
    text = urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=60).read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def get(url: str, **options: Any) -> httpx.Response:
    """What the page answers once the server behind it keeps the page's own limits, of 2 and 5 seconds."""
    answers: list[httpx.Response] = []

    def answered() -> bool:
        answers.append(httpx.get(url, timeout=60, **options))
        return answers[-1].status_code != 503

    eventually(answered)
    return answers[-1]


@pytest.mark.parametrize("path", ["", "api/engine", "api/metrics", "static/main.js", "static/style.css", "nothing"])
def test_every_answer_forbids_the_browser_what_the_page_does_not_need(page: str, path: str) -> None:
    answer = get(page + path)
    assert answer.status_code == (404 if path == "nothing" else 200)
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in answer.headers
    assert "server" not in answer.headers


def test_the_page_has_nothing_from_elsewhere(page: str) -> None:
    assert "adaptive-k" in get(page).text
    for path in STATIC.iterdir():
        text = path.read_text()
        links = text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in links and "https://" not in links, path.name
        # Text of the model must never be read as HTML.
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text


def test_it_says_what_is_served(page: str, server: TritonServer) -> None:
    engine = get(f"{page}api/engine").json()
    assert engine == {
        "url": server.grpc_url,
        "policies": ["full", "balanced", "top1"],
        "default_policy": "balanced",
        "num_moe_layers": 6,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }


@pytest.mark.parametrize("policy", ["balanced", "full", "top1", None])
def test_pieces_are_what_the_client_gets(page: str, server: TritonServer, policy: str | None) -> None:
    *pieces, end = ask(page, prompt=PROMPT, policy=policy, max_tokens=24)
    with Client(server.grpc_url, timeout=60) as client:
        answer = client.generate(PROMPT, adaptive_k_policy=policy, max_tokens=24, end_id=None)
    assert {name for name, _ in pieces} == {"piece"}
    assert "".join(piece["text"] for _, piece in pieces) == answer.text
    assert HOSTILE in answer.text
    assert sum(piece["tokens"] for _, piece in pieces) == answer.num_output_tokens
    np.testing.assert_array_equal([row for _, piece in pieces for row in piece["k"]], answer.k)
    np.testing.assert_allclose([row for _, piece in pieces for row in piece["entropy"]], answer.entropy, atol=1e-4)
    last = pieces[-1][1]
    assert last["avg_k"] == pytest.approx(answer.avg_k, abs=1e-3)
    assert last["compute_saved_ratio"] == pytest.approx(answer.compute_saved_ratio, abs=1e-3)
    assert last["prompt_tokens"] == answer.num_input_tokens
    times = [data["seconds"] for _, data in [*pieces, end]]
    assert times == sorted(times) and times[0] > 0
    assert end[0] == "end"


def test_a_chat_message_goes_through_the_models_template(page: str, server: TritonServer) -> None:
    *pieces, _ = ask(page, prompt=PROMPT, chat=True, max_tokens=8)
    with Client(server.grpc_url, timeout=60) as client:
        answer = client.generate([{"role": "user", "content": PROMPT}], max_tokens=8)
        assert answer.text != client.generate(PROMPT, max_tokens=8).text
    assert "".join(piece["text"] for _, piece in pieces) == answer.text
    assert pieces[-1][1]["prompt_tokens"] == answer.num_input_tokens


def test_sampling_follows_the_seed(page: str) -> None:
    def text(seed: int) -> str:
        return "".join(
            data.get("text", "") for _, data in ask(page, prompt=PROMPT, max_tokens=24, temperature=2.0, seed=seed)
        )

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ({}, "prompt: Field required."),
        ({"prompt": ""}, "prompt: String should have at least 1 character."),
        ({"prompt": "p", "max_tokens": 0}, "max_tokens: it must be greater than or equal to 1."),
        ({"prompt": "p", "temperature": -1}, "temperature: it must be greater than or equal to 0."),
        ({"prompt": "p", "seed": None}, "seed: it must be a valid integer."),
        ({"prompt": "p", "seed": 2**53}, "seed: it must be less than 9007199254740992."),
        ({"prompt": "p", "chat": "maybe"}, "chat: it must be a valid boolean, unable to interpret input."),
        ({"prompt": "p", "beam": 2}, "beam: Extra inputs are not permitted."),
    ],
)
def test_a_question_that_is_none_is_one_sentence(page: str, question: dict[str, Any], sentence: str) -> None:
    answer = httpx.post(f"{page}api/answer", json=question, timeout=60)
    assert (answer.status_code, answer.json()) == (400, {"error": sentence})


def test_other_sites_cannotask(page: str) -> None:
    """A form or a script of another site can send text, and only to a name that is its own or ours."""
    body = json.dumps({"prompt": PROMPT})
    text = {"content-type": "text/plain"}
    assert httpx.post(f"{page}api/answer", content=body, headers=text, timeout=60).status_code == 415
    assert get(page, headers={"host": "attacker.example"}).status_code == 400
    assert get(f"{page}api/engine", headers={"host": "attacker.example:80"}).status_code == 400
    assert get(page.replace("127.0.0.1", "localhost")).status_code == 200


def test_a_question_without_end_is_refused(page: str) -> None:
    body = b" " * ((1 << 22) + 1)
    answer = httpx.post(f"{page}api/answer", content=body, headers={"content-type": "application/json"}, timeout=60)
    assert (answer.status_code, answer.json()) == (413, {"error": "the question has more than 4 MiB."})


def test_the_servers_refusal_is_passed_on(page: str) -> None:
    ((name, data),) = ask(page, prompt=PROMPT, policy="none")
    assert name == "failure"
    assert "'none' is not one of this engine's policies: full, balanced, top1." in data["message"]


def test_a_browser_that_leaves_ends_the_request_on_the_server(page: str, server: TritonServer) -> None:
    before = _metric(server, "adaptive_k_requests_total", outcome="cancelled")
    with httpx.stream("POST", f"{page}api/answer", json={"prompt": PROMPT, "max_tokens": 900}, timeout=60) as response:
        next(read_events(response))
    assert eventually(lambda: _metric(server, "adaptive_k_requests_total", outcome="cancelled") == before + 1)
    assert eventually(lambda: _metric(server, "adaptive_k_queue_depth", state="running") == 0)


def test_a_server_that_hangs_is_one_sentence_and_its_answer_can_be_given_up(page: str, server: TritonServer) -> None:
    with httpx.stream("POST", f"{page}api/answer", json={"prompt": PROMPT, "max_tokens": 900}, timeout=60) as response:
        assert next(read_events(response))[0] == "piece"
        os.killpg(server.pid, signal.SIGSTOP)
        try:
            engine, metrics = (httpx.get(f"{page}api/{path}", timeout=60) for path in ("engine", "metrics"))
            response.close()
        finally:
            os.killpg(server.pid, signal.SIGCONT)
    assert (engine.status_code, metrics.status_code) == (503, 503)
    assert engine.json() == {"error": f"the server at {server.grpc_url} did not finish its answer within 5 s."}
    assert metrics.json() == {"error": f"there are no metrics at {server.metrics_url}: timed out."}
    assert eventually(lambda: get(f"{page}api/engine").status_code == 200)
    assert eventually(lambda: _metric(server, "adaptive_k_queue_depth") == 0)


def test_numbers_of_the_charts_are_the_ports(page: str, server: TritonServer) -> None:
    ask(page, prompt=PROMPT, policy="top1", max_tokens=4)

    def agree() -> (
        bool
    ):  # the port follows the server within a second, so the two may be read on either side of a change
        numbers = get(f"{page}api/metrics").json()
        expected = {
            "generation_tokens": _metric(server, "adaptive_k_generation_tokens_total"),
            "requests": _metric(server, "adaptive_k_requests_total"),
            "kv_blocks": _metric(server, "adaptive_k_kv_blocks"),
            "running": 0,
            "waiting": 0,
            "kv_used": 0,
        }
        return numbers["avg_k"].get("top1") == 1.0 and expected.items() <= numbers.items() and expected["kv_blocks"] > 0

    assert eventually(agree)


def test_numbers_are_summed_over_models_and_zero_where_there_are_none() -> None:
    text = 'adaptive_k_queue_depth{model="a",state="running"} 2\nadaptive_k_queue_depth{model="b",state="running"} 3\n'
    numbers = chart_numbers("# TYPE adaptive_k_queue_depth gauge\n" + text)
    assert (numbers["running"], numbers["waiting"], numbers["avg_k"]) == (5, 0, {})


def test_an_address_without_metrics_is_one_sentence(page: str, server: TritonServer) -> None:
    own = page.removeprefix("http://").rstrip("/")
    for address in (own, server.http_url, server.grpc_url, "ipv4:127.0.0.1:1,127.0.0.1:2"):
        with pytest.raises(ClientError, match=f"there are no metrics at {address}: [^\n]+[.]$"):
            asyncio.run(read_metrics(address))
    with pytest.raises(ValueError, match="float"):
        chart_numbers("<html> {\n")


def test_new_policies_show_at_once(page: str, hostile_engine_dir: Path) -> None:
    config = hostile_engine_dir / "config.json"
    before = config.read_text()
    changed = json.loads(before)
    changed["adaptive_k"]["policies"]["mine"] = {"kind": "fixed", "k": 1}
    try:
        config.write_text(json.dumps(changed))
        assert get(f"{page}api/engine").json()["policies"] == ["full", "balanced", "top1", "mine"]
    finally:
        config.write_text(before)
    assert get(f"{page}api/engine").json()["policies"] == ["full", "balanced", "top1"]


def test_an_entropy_that_is_no_number_is_null() -> None:
    from adaptive_k_moe.client import Chunk

    k = np.array([[1, 2]], np.int32)
    chunk = Chunk("a", 1, 1.5, 0.25, k, np.array([[np.nan, 0.5]], np.float32), 3, None, variant="fewer")
    assert _piece(chunk)["entropy"] == [[None, 0.5]]
    assert _piece(chunk)["variant"] == "fewer"
    assert (_piece(chunk)["reads_per_token"], _piece(chunk)["followed"]) == (None, None)
    chunk = replace(chunk, avg_reads=3.5, reads_per_token=1.25, followed={"full": 3, "fast": 4})
    told = _piece(chunk)
    assert (told["avg_reads"], told["reads_per_token"], told["followed"]) == (3.5, 1.25, {"full": 3, "fast": 4})


def test_no_server_is_one_sentence_each(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{unused.getsockname()[1]}"
        with playground(nowhere, nowhere) as page:
            for path in ("engine", "metrics"):
                answer = httpx.get(f"{page}api/{path}", timeout=60)
                assert answer.status_code == 503
                assert nowhere in answer.json()["error"] and "\n" not in answer.json()["error"]
            ((name, data),) = ask(page, prompt=PROMPT)
            assert name == "failure" and "cannot be reached" in data["message"]


def test_a_port_in_use_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["playground", "--port", port]) == 1
        assert cli.main(["playground", "--port", "70000"]) == 1
        assert cli.main(["playground", "--url", "nowhere"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert f"the port {port} of 127.0.0.1 cannot be used (Address already in use)" in lines[0]
    assert "70000" in lines[1] and "'nowhere' is not an address" in lines[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_right_after_the_address_ends_it(number: signal.Signals) -> None:
    code = (
        "import signal\n"
        "from adaptive_k_moe.observability.playground.app import Playground, create_app\n"
        "from adaptive_k_moe.observability.playground.web_server import serve\n"
        "app = create_app(Playground('127.0.0.1:9', '127.0.0.1:9'))\n"
        f"serve(app, '127.0.0.1', 0, lambda _: signal.raise_signal({number.value}))\n"
        "print('ended')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "ended\n", done.stderr


@pytest.mark.parametrize(
    ("url", "metrics_url"),
    [
        ("localhost:8001", "localhost:8002"),
        ("[::1]:9", "[::1]:8002"),
        ("ipv4:10.0.0.1:8001,10.0.0.2:8011", "10.0.0.1:8002"),
    ],
)
def test_the_metrics_are_those_of_the_first_host(url: str, metrics_url: str) -> None:
    assert default_metrics_url(url) == metrics_url


def test_the_help_needs_no_web_stack() -> None:
    code = "import sys; from adaptive_k_moe import cli; sys.argv[1:] = ['playground', '--help']\ntry: cli.main()\n"
    code += "finally: print('starlette' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False"
