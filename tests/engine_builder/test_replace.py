# SPDX-License-Identifier: Apache-2.0
"""Replacing an engine: the old one is there until the new one is in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import read_engine_config
from adaptive_k_moe.errors import BuildError

from checkpoints import make_mixtral


def test_force_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "engines" / "a", target="onnx", max_seq_len=32)
    build(checkpoint, tmp_path / "engines" / "a", target="onnx", max_seq_len=64, force=True)
    assert read_engine_config(tmp_path / "engines" / "a").build_config.max_seq_len == 64
    assert [path.name for path in (tmp_path / "engines").iterdir()] == ["a"]


def test_the_old_engine_survives_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, output = make_mixtral(tmp_path / "checkpoint"), tmp_path / "engines" / "a"
    build(checkpoint, output, target="onnx", max_seq_len=32)
    rename = Path.rename

    def refuse_the_new(path: Path, target: Path) -> Path:
        if target == output and not path.name.endswith("-old"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(BuildError, match="cannot write the engine"):
        build(checkpoint, output, target="onnx", max_seq_len=64, force=True)
    assert read_engine_config(output).build_config.max_seq_len == 32
    assert [path.name for path in output.parent.iterdir()] == ["a"]
