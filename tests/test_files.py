# SPDX-License-Identifier: Apache-2.0
"""Files that are whole at every moment, links among them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from adaptive_k_moe.files import write_json, write_text


def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "latest.json").symlink_to(Path("disk") / "policy.json")
    for content in ({"a": "Grüße"}, {"b": 2}):  # at first what it leads to does not exist
        write_json(tmp_path / "latest.json", content)
        assert (tmp_path / "latest.json").is_symlink()
        assert json.loads((tmp_path / "disk" / "policy.json").read_text(encoding="utf-8")) == content
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["policy.json"]


def test_json_may_hold_the_name_of_any_file(tmp_path: Path) -> None:
    content = {"text": os.fsdecode(b"\xff.txt"), "policy": "\u00fc\U0001f600"}
    write_json(tmp_path / "file.json", content)
    assert json.loads((tmp_path / "file.json").read_bytes()) == content


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="No such file"):
        write_text(tmp_path / "no such folder" / "file", "new")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((OSError, RuntimeError), match="loop"):
        write_text(tmp_path / "loop", "new")


def test_a_stream_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = f"from adaptive_k_moe.files import write_text; write_text({str(pipe)!r}, 'text')"
    with subprocess.Popen([sys.executable, "-c", code]) as writer:
        assert pipe.read_text() == "text"
    assert writer.returncode == 0
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_the_mode_is_that_of_other_new_files(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_reader_sees_one_version_or_the_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    versions = ["", "a" * 100_000, "b" * 50_000]
    write_text(path, versions[0])
    ended = threading.Event()

    def write() -> None:
        for turn in range(150):
            write_text(path, versions[turn % 3])
        ended.set()

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    while not ended.is_set():
        assert path.read_text() in versions
    for writer in writers:
        writer.join()
    assert list(tmp_path.iterdir()) == [path]
