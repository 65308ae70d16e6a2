# SPDX-License-Identifier: Apache-2.0
"""The report page: hostile text stays text, and a browser shows it with no network."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptive_k_moe.calibration import report
from adaptive_k_moe.calibration.calibrate import calibrate
from adaptive_k_moe.calibration.evaluator import Evaluator
from adaptive_k_moe.calibration.laboratory import Budget
from adaptive_k_moe.calibration.windows import make_windows, split

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

HOSTILE = "<script>alert(1)</script> & \"quoted\" 'text' <img src=x onerror=alert(2)> "


def test_a_token_is_escaped_in_text_and_note() -> None:
    span = report._token('"><script>\n', np.array([1, 2]), np.array([0.5, 1.0]), 1, 2)
    assert "<script" not in span
    assert "&quot;&gt;&lt;script&gt;&#8629;<br>" in span
    assert "layer 1: k 2, 1.000 nats" in span


@pytest.fixture(scope="module")
def page(evaluator: Evaluator, some_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    texts = {"<b>named</b>": HOSTILE * 10 + some_text[:1400]}
    fit, heldout = split(make_windows(evaluator.tokenizer, texts, 64))
    result = calibrate(
        evaluator,
        fit,
        heldout,
        Budget(avg_k=1.5),
        work_dir=directory / "work",
        kinds=["entropy"],
        name="<i>mine</i>",
        num_bands=2,
        refine_passes=0,
        curve_points=1,
        timing_rounds=1,
    )
    report.write_report(directory, result, evaluator)
    return directory / "index.html"


def test_names_and_text_are_escaped(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    assert "<script" not in content and "<img src=x" not in content
    assert "<b>named" not in content and "&lt;b&gt;named" in content
    assert "<i>mine" not in content and "&lt;i&gt;mine" in content


def test_the_page_allows_itself_no_network(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in content
    assert "http://" not in content and "https://" not in content


def test_every_token_of_a_window_is_shown(page: Path, evaluator: Evaluator) -> None:
    content = page.read_text(encoding="utf-8")
    paragraphs = content.count('<p class="text">')
    assert paragraphs >= 1
    assert content.count("data-note=") == paragraphs * 64


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_shows_text_and_figures(page: Path, tmp_path: Path) -> None:
    matplotlib_image: Any = pytest.importorskip("matplotlib.image")
    shot = tmp_path / "shot.png"
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1200,3000",
        f"--screenshot={shot}",
        page.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = matplotlib_image.imread(shot)[..., :3]
    assert pixels.shape[:2] == (3000, 1200)
    # Both ends of the tokens' colours and the figures' blue histograms are on it.
    for colour in ((222, 235, 247), (253, 150, 80), (158, 202, 225)):
        near = np.abs(pixels - np.array(colour) / 255).max(axis=-1) < 0.02
        assert near.sum() > 50, colour
