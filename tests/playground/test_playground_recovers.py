# SPDX-License-Identifier: Apache-2.0
"""A server that is killed in the middle of an answer: one sentence, and all is well again once it is back."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import PROGRAM, Browser
from playground_process import ask, playground, read_events

from adaptive_k_moe.model_repository import TritonServer

from waiting import eventually

PROMPT = "And it came to pass"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser | None]:
    """A browser where there is one: the rest is tested without."""
    with Browser(tmp_path / "profile") if PROGRAM else contextlib.nullcontext() as browser:
        yield browser


def test_a_server_that_dies_in_the_middle_and_comes_back(
    browser: Browser | None, hostile_engine_dir: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = dict(http_port=0, metrics_port=0, log_file=tmp_path / "log", num_threads=1)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(TritonServer(hostile_engine_dir, grpc_port=0, **options))
        page = stack.enter_context(playground(server.grpc_url, server.metrics_url))
        sentence = f"the server at {server.grpc_url} cannot be reached, or broke off"
        if browser:
            browser.open(page)
            browser.until("!document.querySelector('#run').disabled")
            browser.fill("#max-tokens", "1000")
            browser.click("#run")
            browser.until("document.querySelectorAll('.piece').length > 3")
        question = {"prompt": PROMPT, "max_tokens": 1000}
        with httpx.stream("POST", f"{page}api/answer", json=question, timeout=60) as response:
            events = read_events(response)
            assert next(events)[0] == "piece"
            os.killpg(server.pid, signal.SIGKILL)
            *_, (name, data) = events
        assert name == "failure"
        assert data["message"].startswith(sentence) and "\n" not in data["message"]
        if browser:
            browser.until("!document.querySelector('.failure').hidden")
            assert browser.text(".failure").startswith(sentence)
            assert browser.evaluate("document.querySelectorAll('.piece').length") > 3  # what had come stays
            browser.until("document.querySelector('#server').dataset.state === 'down'")
            assert browser.text("#server").strip().startswith(sentence)
        server.stop()
        assert httpx.get(f"{page}api/engine", timeout=60).status_code == 503

        port = int(server.grpc_url.rpartition(":")[2])
        stack.enter_context(TritonServer(hostile_engine_dir, grpc_port=port, **options))
        assert eventually(lambda: httpx.get(f"{page}api/engine", timeout=60).status_code == 200)
        assert ask(page, prompt=PROMPT, max_tokens=4)[-1][0] == "end"
        if browser:
            browser.until("document.querySelector('#server').dataset.state === 'up'")
            browser.fill("#max-tokens", "24")
            browser.click("#run")
            browser.until("document.querySelectorAll('.piece').length === 24")
            assert browser.evaluate("document.querySelector('.failure').hidden")
