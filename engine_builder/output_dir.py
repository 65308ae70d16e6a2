# SPDX-License-Identifier: Apache-2.0
"""Where an engine goes: what may be there before, and how a new one takes its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from adaptive_k_moe.engine_config import CONFIG_NAME
from adaptive_k_moe.errors import BuildError

# What an engine's config.json has in every version, and neither a checkpoint's nor another stack's engine's.
_MARKS = {"build_config", "adaptive_k"}


def check_output(output: Path, checkpoint: Path, *, force: bool) -> Path:
    """Where the engine will lie, with symbolic links followed, so that a link to an engine stays one.

    Args:
        output: the directory asked for.
        checkpoint: the source, which a replaced directory must not hold.
        force: whether an engine that is already there may be replaced.

    Raises:
        BuildError: something else is there, or an engine that is to stay.
    """
    try:
        place = output.resolve()
        occupied = place.exists() and (not place.is_dir() or any(place.iterdir()))
    except (OSError, RuntimeError) as error:  # a loop of links
        raise BuildError(f"cannot look at {output}: {getattr(error, 'strerror', None) or error}.") from None
    if not occupied:
        return place
    if not _is_engine(place):
        raise BuildError(f"{output} exists and is no engine directory: give another --output_dir.")
    if not force:
        raise BuildError(f"{output} holds an engine already: give another --output_dir, or --force to replace it.")
    if checkpoint.resolve().is_relative_to(place):
        raise BuildError(f"the checkpoint {checkpoint} lies in {output}, which --force would replace: move it first.")
    return place


def replace(output: Path, new: Path) -> None:
    """Put `new` where `output` is; what was there is lost only once the new one is in its place."""
    if not output.exists():
        new.rename(output)
        return
    old = new.with_name(f"{new.name}-old")
    output.rename(old)
    try:
        new.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old)


def _is_engine(directory: Path) -> bool:
    try:
        content = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= _MARKS
