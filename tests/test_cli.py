# SPDX-License-Identifier: Apache-2.0
"""The command as a process: how it ends when it is told to, and what it prints where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive_k_moe import cli

# Waits where a build has written half of an engine, until it is told to end.
_STOPPED_BUILD = """
import sys, time
from adaptive_k_moe import cli
from adaptive_k_moe.engine_builder.graph import GraphBuilder

def save(self, metadata):
    print("half", flush=True)
    time.sleep(60)

GraphBuilder.save = save
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)],
    ids=lambda value: str(value),
)
def test_a_build_that_is_told_to_end_leaves_nothing(
    number: signal.Signals, status: int, checkpoint_dir: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", _STOPPED_BUILD, "build", "--checkpoint_dir", str(checkpoint_dir)]
    with subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "engine"), "--target", "onnx"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "half\n"
        assert list(tmp_path.glob(".engine-*"))
        process.send_signal(number)
        assert process.wait(60) == status
        assert process.stderr.read() == ""
    assert list(tmp_path.iterdir()) == []


def test_a_command_outlives_a_terminal_that_it_was_told_to_ignore(checkpoint_dir: Path, tmp_path: Path) -> None:
    # As nohup starts it.
    command = [sys.executable, "-c", _STOPPED_BUILD.replace("60", "0.5"), "build", "--target", "onnx"]
    with subprocess.Popen(
        [*command, "--checkpoint_dir", str(checkpoint_dir), "--output_dir", str(tmp_path / "engine")],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGHUP)
        process.wait(60)
        assert "built" in process.stdout.read()


def test_characters_that_the_terminals_encoding_has_not_are_no_traceback(engine_dir: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "adaptive_k_moe",
        "generate",
        "--engine_dir",
        str(engine_dir),
        "--max_tokens",
        "40",
    ]
    command += ["--prompt", "λόγος “quoted” — ", "--temperature", "5", "--seed", "3"]
    printed = {}
    for encoding in ("utf-8", "ascii"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        result = subprocess.run(command, capture_output=True, check=False, env=environment)
        assert result.returncode == 0
        printed[encoding] = result.stdout.decode(encoding)
    assert not printed["utf-8"].isascii()
    assert printed["ascii"] == printed["utf-8"].encode("ascii", "replace").decode()


def test_a_prompt_that_is_no_text_in_the_terminals_encoding_is_one_sentence(engine_dir: Path) -> None:
    command = [sys.executable, "-m", "adaptive_k_moe", "generate", "--engine_dir", str(engine_dir), "--prompt", "-"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run(command, input=b"a\xff b", capture_output=True, check=False, env=environment)
    assert result.returncode == 1
    assert result.stderr.startswith(b"adaptive-k: error: the tokenizer cannot encode this text")
    assert result.stderr.count(b"\n") == 1


def test_a_report_that_cannot_be_written_is_one_sentence(
    engine_dir: Path, checkpoint_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = ["perplexity", "--engine_dir", str(engine_dir), "--text", str(checkpoint_dir / "heldout.txt")]
    arguments += ["--rounds", "1", "--max_tokens", "40", "--output"]
    for output, reason in ((tmp_path / "file" / "report.json", "File exists"), (tmp_path, "Is a directory")):
        assert cli.main([*arguments, str(output)]) == 1
        printed = capsys.readouterr().err
        assert printed.startswith("adaptive-k: error: ")
        assert f"cannot be used: {reason}." in printed
        assert printed.count("\n") == 1
    assert cli.main([*arguments, str(tmp_path / "new" / "report.json")]) == 0
    assert (tmp_path / "new" / "report.json").is_file()
    assert cli.main([*arguments, str(tmp_path / "none.json"), "--window", "0"]) == 1
    assert "window" in capsys.readouterr().err


def test_flags_may_have_hyphens(engine_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--prompt=--and-so-on", "--seed", "3", "--temperature", "2"]
    printed = []
    for engine, tokens in (("--engine_dir", "--max_tokens"), ("--engine-dir", "--max-tokens")):
        assert cli.main([*arguments, engine, str(engine_dir), f"{tokens}=5"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_an_unknown_flag_shows_the_flags_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", "--engine_dir", "engine", "--port", "8000"])
    printed = capsys.readouterr().err
    assert "--http_port PORT" in printed
    assert printed.endswith("adaptive-k serve: error: unrecognized arguments: --port 8000\n")
