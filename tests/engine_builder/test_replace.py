# SPDX-License-Identifier: Apache-2.0
"""Replacing an engine: the old one is there until the new one is in its place, and nothing else is replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adaptive_k_moe.cli import main
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


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(5, "Input/output error"), BuildError), (SystemExit(143), SystemExit)],
    ids=["fails", "is told to end"],
)
def test_the_old_engine_survives_when_the_new_one_cannot_take_its_place(
    error: BaseException, raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, output = make_mixtral(tmp_path / "checkpoint"), tmp_path / "engines" / "a"
    build(checkpoint, output, target="onnx", max_seq_len=32)
    rename = Path.rename

    def refuse_the_new(path: Path, target: Path) -> Path:
        if target == output and not path.name.endswith("-old"):
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(raised, match=r"cannot write the engine|143"):
        build(checkpoint, output, target="onnx", max_seq_len=64, force=True)
    assert read_engine_config(output).build_config.max_seq_len == 32
    assert [path.name for path in output.parent.iterdir()] == ["a"]


def test_an_old_engine_that_cannot_be_removed_is_named_and_the_new_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = make_mixtral(tmp_path / "checkpoint"), tmp_path / "engines" / "a"
    build(checkpoint, output, target="onnx", max_seq_len=32)
    remove = shutil.rmtree

    def refuse_the_old(path: Path, **options: Any) -> None:
        if path.name.endswith("-old"):
            raise PermissionError(13, "Permission denied")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse_the_old)
    arguments = ["build", "--checkpoint_dir", str(checkpoint), "--output_dir", str(output), "--target", "onnx"]
    assert main([*arguments, "--max_seq_len", "64", "--force"]) == 0
    (old,) = (path for path in output.parent.iterdir() if path != output)
    assert (
        f"adaptive-k: warning: {output} is the new one, whole, but what it replaced could not be removed "
        f"(Permission denied): delete {old}.\n"
    ) in capsys.readouterr().err
    assert read_engine_config(output).build_config.max_seq_len == 64
    assert read_engine_config(old).build_config.max_seq_len == 32


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    checkpoint, other = make_mixtral(tmp_path / "checkpoint"), make_mixtral(tmp_path / "other")
    # TensorRT-LLM's engines have a config.json with some of our words.
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps({"version": "1.2.0", "pretrained_config": {}, "build_config": {}}))
    before = files_of(tmp_path)
    for output in (checkpoint, other, foreign):
        for force in (False, True):
            with pytest.raises(BuildError, match=f"{output.name} exists and is no engine directory"):
                build(checkpoint, output, target="onnx", force=force)
    assert files_of(tmp_path) == before


def test_an_engine_that_holds_its_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    make_mixtral(tmp_path / "elsewhere")
    build(tmp_path / "elsewhere", tmp_path / "engine", target="onnx")
    (tmp_path / "elsewhere").rename(tmp_path / "engine" / "checkpoint")
    with pytest.raises(BuildError, match=r"the checkpoint .* lies in .*: move it first"):
        build(tmp_path / "engine" / "checkpoint", tmp_path / "engine", target="onnx", force=True)
    assert (tmp_path / "engine" / "checkpoint" / "model.safetensors").is_file()
    # The other way round nothing is lost: an engine may lie in its checkpoint.
    (tmp_path / "engine" / "checkpoint").rename(tmp_path / "elsewhere")
    for force in (False, True):
        build(tmp_path / "elsewhere", tmp_path / "elsewhere" / "engine", target="onnx", force=force)
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()


@pytest.mark.parametrize("force", [False, True])
def test_what_came_there_while_it_was_built_stays(force: bool, tmp_path: Path) -> None:
    checkpoint, output = make_mixtral(tmp_path / "checkpoint"), tmp_path / "engine"

    def write(part: str, done: int, total: int) -> None:
        output.mkdir(exist_ok=True)
        (output / "thesis.txt").write_text("mine")

    with pytest.raises(BuildError, match="exists and is no engine directory"):
        build(checkpoint, output, target="onnx", force=force, progress=write)
    assert files_of(output) == {"thesis.txt": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "engine"]


def test_a_link_to_an_engine_stays_a_link(tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint")
    (tmp_path / "latest").symlink_to(tmp_path / "disk" / "engine")
    for length, force in ((32, False), (64, True)):  # at first what it leads to does not exist
        build(checkpoint, tmp_path / "latest", target="onnx", max_seq_len=length, force=force)
        assert (tmp_path / "latest").is_symlink()
        assert read_engine_config(tmp_path / "disk" / "engine").build_config.max_seq_len == length
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "disk", "latest"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["engine"]


def test_the_folder_in_which_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint")
    (tmp_path / "engine").mkdir()
    monkeypatch.chdir(tmp_path / "engine")
    build(checkpoint, ".", target="onnx")
    read_engine_config(tmp_path / "engine")


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BuildError, match="loop"):
        build(checkpoint, tmp_path / "loop", target="onnx")
