# SPDX-License-Identifier: Apache-2.0
"""A little of the bundled model's held-out text, divided for calibration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptive_k_moe.calibration.evaluator import Evaluator
from adaptive_k_moe.calibration.windows import Windows, make_windows, read_text, split


@pytest.fixture(scope="session")
def evaluator(engine_dir: Path) -> Iterator[Evaluator]:
    with Evaluator(engine_dir) as opened:
        yield opened


@pytest.fixture(scope="session")
def some_text(checkpoint_dir: Path) -> str:
    text = read_text(checkpoint_dir / "heldout.txt")
    return text[:6000] + text[-6000:]


@pytest.fixture(scope="session")
def parts(evaluator: Evaluator, some_text: str) -> tuple[Windows, Windows]:
    return split(make_windows(evaluator.tokenizer, {"some": some_text}, 128))
