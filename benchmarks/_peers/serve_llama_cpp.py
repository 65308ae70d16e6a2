# SPDX-License-Identifier: Apache-2.0
"""llama.cpp by its own two benchmarks, which load the model each time they are run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from worker import serve


class LlamaCpp:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.programs = Path(settings["programs"])
        self.model = settings["model"]
        self.threads = str(settings["threads"])
        self.run("llama-bench", "-p", "16", "-n", "0", "-r", "1", "-o", "jsonl")  # one that cannot run fails here

    def run(self, program: str, *arguments: str) -> list[dict[str, Any]]:
        command = [self.programs / program, "-m", self.model, "-t", self.threads, *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    def prefill(self, tokens: int) -> float:
        return float(self.run("llama-bench", "-p", str(tokens), "-n", "0", "-r", "1", "-o", "jsonl")[0]["avg_ts"])

    def decode(self, batch: int, prompt: int, tokens: int) -> float:
        context = str(batch * (prompt + tokens) + 64)
        sizes = ["-npp", str(prompt), "-ntg", str(tokens), "-npl", str(batch), "-c", context]
        rows = self.run("llama-batched-bench", *sizes, "-tb", self.threads, "--output-format", "jsonl")
        return float(rows[0]["speed_tg"])


serve(lambda settings: (LlamaCpp(settings), {"llama.cpp": f"in llama-cpp-python {settings['version']}"}))
