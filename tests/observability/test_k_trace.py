# SPDX-License-Identifier: Apache-2.0
"""Traces of k: the seed's bars, and `adaptive-k trace` on the bundled model."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from adaptive_k_moe.cli import main
from adaptive_k_moe.errors import RequestError
from adaptive_k_moe.observability import debugger
from adaptive_k_moe.observability.debugger import BAR_WIDTH, bar, select_k, trace_k_selection
from adaptive_k_moe.observability.k_trace import KTrace, TokenTrace
from adaptive_k_moe.runtime import LLM, SamplingParams


def test_the_bars_that_were_published(capsys: pytest.CaptureFixture[str]) -> None:
    debugger.trace_k_selection([0.42, 1.23])
    assert capsys.readouterr().out == "Layer 0 | H=0.42 ████░░░░ | K=1\nLayer 1 | H=1.23 ████████ | K=4\n"


def test_tokens_and_k_that_ran(capsys: pytest.CaptureFixture[str]) -> None:
    trace_k_selection([[0.5] * 11, [2.0] * 11], k=[[2] * 11, [6] * 11], full_bar=4.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Token 0", "Layer  0 | H=0.50 █░░░░░░░ | K=2"]
    assert lines[-1] == "Layer 10 | H=2.00 ████░░░░ | K=6"
    with pytest.raises(RequestError, match=r"k is of \[1, 2\] tokens and layers, but the entropies of \[1, 3\]"):
        trace_k_selection([1, 2, 3], k=[1, 2])
    with pytest.raises(RequestError, match="thresholds must rise"):
        trace_k_selection([1, 2, 3], thresholds=[1.0], k_values=[1])


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(0.01, 10))
def test_a_bar_has_one_width(entropy: float, full_bar: float) -> None:
    assert re.fullmatch("█*░*", bar(entropy, full_bar)) and len(bar(entropy, full_bar)) == BAR_WIDTH


def trace(*arguments: object) -> int:
    return main(["trace", *map(str, arguments)])


def test_trace_shows_what_the_engine_ran_saves_it_and_opens_it(
    engine_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    saved = tmp_path / "trace.json"
    options = ["--prompt", "import os", "--max_tokens", 5, "--adaptive_k_policy", "balanced"]
    assert trace("--engine_dir", engine_dir, *options, "--output", saved) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown  # no colours where there are none
    with LLM(engine_dir) as llm:
        output = llm.generate("import os", SamplingParams(max_tokens=5, temperature=0, adaptive_k_policy="balanced"))
        again = KTrace.of(output, llm)
    found = KTrace.read(saved)
    assert found == again
    k = np.concatenate([output.prompt_k, output.outputs[0].k[1:]])
    np.testing.assert_array_equal(found.k, k)
    rows = [line for line in shown.splitlines() if re.search(r" (prompt|answer) ", line)]
    assert [[int(cell[-1]) for cell in row.split()[-k.shape[1] :]] for row in rows] == k.tolist()
    assert f"mean k {output.avg_k:.3f}" in shown
    # The policy of the engine in the tests: 1 below 1.2 nats, else 2.
    entropies = np.array([token.entropy for token in found.tokens])
    np.testing.assert_array_equal(select_k(entropies, [1.2], [1, 2]), k)
    assert trace("--open", saved) == 0
    assert capsys.readouterr().out == shown
    assert trace("--open", saved, "--token", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Token 1 {found.tokens[1].text!r} (prompt)"
    assert [int(line[-1]) for line in lines[1:]] == k[1].tolist()


def test_a_narrow_terminal_and_colours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = {"id": 1, "text": "\x1b[31m<b>[red]\n", "part": "prompt", "k": [1, 2] * 20, "entropy": [0.1, 5.0] * 20}
    path = tmp_path / "trace.json"
    path.write_text(
        json.dumps({"model": "m", "policy": "p", "num_experts": 8, "full_k": 2, "tokens": [token]}), encoding="utf-8"
    )
    monkeypatch.setenv("COLUMNS", "80")
    assert trace("--open", path) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "layers 0 to " in shown and " to 39" in shown
    assert "\x1b" not in shown  # nor what a token's text may hold
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert trace("--open", path) == 0
    coloured = capsys.readouterr().out
    assert "\x1b[32m" in coloured and r"\x1b[31m<b>[red]\n" in coloured


def test_a_saved_trace_is_json_whatever_it_holds(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    token = {"id": 1, "part": "prompt", "k": [1, 2]}
    texts = ["\ufffd", "\u202e\x00\n", "\u6f22\U0001f600", '"\\']
    tokens = [TokenTrace(**token, text=text, entropy=[math.nan, 0.5]) for text in texts]
    KTrace(model="m", policy="p", num_experts=8, full_k=2, tokens=tokens).save(tmp_path / "trace.json")
    content = json.loads((tmp_path / "trace.json").read_bytes(), parse_constant=refuse)
    assert [(one["text"], one["entropy"]) for one in content["tokens"]] == [(text, [None, 0.5]) for text in texts]
    found = KTrace.read(tmp_path / "trace.json")
    assert [one.text for one in found.tokens] == texts
    np.testing.assert_array_equal([one.entropy for one in found.tokens], [one.entropy for one in tokens])


def test_wide_characters_take_two_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a", "漢字", "漢字仮名交じり文の長い例", "e\u0301", "\U0001f600", "\u202eabc"]
    monkeypatch.setenv("COLUMNS", "80")
    assert trace("--open", _saved(tmp_path, texts)) == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if " prompt " in line]
    assert "policy p\\x1b[2J:" in shown
    assert len(rows) == len(texts) and {cell_len(row.partition(" prompt ")[0]) for row in rows} == {18}
    assert "\u202e" not in "".join(rows)


@pytest.mark.parametrize("width", [20, 24, 33, 79])
def test_a_layer_at_least_is_shown_however_narrow_a_terminal(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert trace("--open", _saved(tmp_path, ["a long token's text"])) == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if " prompt " in line]
    assert "".join(row.partition("1.50")[2] for row in rows).split() == ["▁1", "█2", "▅1", "▃2"]
    assert all(len(line) <= width for line in shown.splitlines())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_blocks_has_heights_too(encoding: str, tmp_path: Path) -> None:
    path = _saved(tmp_path, ["a"])

    def shown(*command: str) -> str:
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, check=True, timeout=60)
        return done.stdout.decode(encoding)

    command = ["-m", "adaptive_k_moe", "trace", "--open", str(path)]
    heights, full, empty = ("▁█▅▃", "█", "░") if encoding == "utf-8" else (".@+-", "#", ".")
    assert shown(*command).splitlines()[-3].split()[-4:] == [f"{h}{k}" for h, k in zip(heights, "1212", strict=True)]
    assert shown(*command, "--token", "0").splitlines()[2] == f"Layer 1 | H=2.08 {full * 8} | K=2"
    code = "from adaptive_k_moe.observability import debugger; debugger.trace_k_selection([0.42])"
    assert shown("-c", code).strip() == f"Layer 0 | H=0.42 {full * 4}{empty * 4} | K=1"


def _saved(directory: Path, texts: list[str]) -> Path:
    """A saved trace of tokens with these texts: four layers, entropies from 0 to the most, k 1 and 2 in turns."""
    token = {"id": 1, "part": "prompt", "k": [1, 2, 1, 2], "entropy": [0.0, math.log(8), 1.1, 0.6]}
    content = {"model": "m", "policy": "p\x1b[2J", "num_experts": 8, "full_k": 2}
    path = directory / "trace.json"
    path.write_text(json.dumps({**content, "tokens": [{**token, "text": text} for text in texts]}))
    return path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--engine_dir", "x"], "--engine_dir needs a --prompt"),
        (["--open", "missing.json"], "cannot read the trace missing.json"),
        (["--open", "bad.json"], "bad.json is no trace of k: Invalid JSON: "),
        (["--open", "uneven.json"], "uneven.json is no trace of k: its tokens have different numbers of layers.\n"),
        (["--open", "negative.json"], "negative.json is no trace of k: tokens.0.id: it must be greater than or equal"),
        (["--open", "good.json", "--token", "1"], "--token is 1, but the trace has tokens 0 to 0"),
        (["--open", "good.json", "--output", "no/where.json"], "cannot write the trace no/where.json"),
        (["--engine_dir", "x", "--prompt", "y"], "x"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    head = {"model": "m", "policy": "p", "num_experts": 8, "full_k": 2}
    one = {"id": 1, "text": "a", "part": "prompt", "k": [1], "entropy": [0.1]}
    Path("bad.json").write_text("{")
    Path("negative.json").write_text(json.dumps({**head, "tokens": [{**one, "id": -1}]}))
    Path("good.json").write_text(json.dumps({**head, "tokens": [one]}))
    Path("uneven.json").write_text(json.dumps({**head, "tokens": [one, {**one, "k": [1, 2]}]}))
    assert main(["trace", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("adaptive-k: error: ") and sentence in error and error.count("\n") == 1
    assert not list(tmp_path.glob(".*"))
