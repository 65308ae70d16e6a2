# SPDX-License-Identifier: Apache-2.0
"""`adaptive-k playground` as a process of its own, and what the tests' model writes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx

HOSTILE = "<img src=x onerror='window.struck=1'>&amp;</span>\u0007\u202e\u0000"
"""What the model writes where it would write " the"."""


@contextlib.contextmanager
def playground(url: str, metrics_url: str, *arguments: str) -> Iterator[str]:
    """`adaptive-k playground` for a server; yields the page's address. It must end well."""
    command = [sys.executable, "-m", "adaptive_k_moe", "playground", "--port", "0", "--url", url]
    with subprocess.Popen(
        [*command, "--metrics_url", metrics_url, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            line = process.stdout.readline()
            assert " at http://" in line, process.stderr.read()
            yield line.partition(" at ")[2].partition(" for ")[0]
        finally:
            process.terminate()
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def read_events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of an answer as they come, by name and data."""
    name = ""
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def ask(page: str, **question: Any) -> list[tuple[str, dict[str, Any]]]:
    """All events of the answer to a question."""
    with httpx.stream("POST", f"{page}api/answer", json=question, timeout=60) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(read_events(response))
