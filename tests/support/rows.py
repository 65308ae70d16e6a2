# SPDX-License-Identifier: Apache-2.0
"""Results as they come: a JSON object a line, in the file before the next one is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
FILE = "results.jsonl"


class Rows:
    """The results of a run, in `results.jsonl` of a folder; several processes may add to it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE

    def add(self, stage: str, case: str, outcome: str, **more: Any) -> None:
        """One more result.

        Args:
            outcome: `passed`, `failed` or `not run`.
            more: `error`, a sentence, where it did not pass; otherwise what was measured.
        """
        line = json.dumps({"stage": stage, "case": case, "outcome": outcome, **more}) + "\n"
        with self.path.open("ab", buffering=0) as file:  # one write, which others' do not cut in two
            file.write(line.encode())

    def read(self) -> list[dict[str, Any]]:
        """All results so far; a line that a killed process left unfinished is passed over."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found
