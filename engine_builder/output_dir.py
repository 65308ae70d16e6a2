# SPDX-License-Identifier: Apache-2.0
"""Where an engine or a checkpoint goes: what may be there before, and how a new one takes its place."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
    place, occupied = _look_at(output)
    if not occupied:
        return place
    if not _is_engine(place):
        raise BuildError(f"{output} exists and is no engine directory: give another --output_dir.")
    if not force:
        raise BuildError(f"{output} holds an engine already: give another --output_dir, or --force to replace it.")
    if checkpoint.resolve().is_relative_to(place):
        raise BuildError(f"the checkpoint {checkpoint} lies in {output}, which --force would replace: move it first.")
    return place


def check_empty(output: Path) -> Path:
    """Where a directory will lie that replaces none, with symbolic links followed.

    Raises:
        BuildError: something is there that is not an empty directory.
    """
    place, occupied = _look_at(output)
    if occupied:
        raise BuildError(f"{output} exists and is not an empty directory: give another --output_dir.")
    return place


@contextmanager
def written_beside(output: Path, content: str) -> Iterator[Path]:
    """A directory beside `output` to write into, and to `replace` it by; it is gone if it was not renamed.

    Args:
        output: the directory to make in the end.
        content: what is written, for the error.

    Raises:
        BuildError: it cannot be made, or what is written into it meets an `OSError`.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise BuildError(f"cannot write beside {output}: {error.strerror}.") from None
    try:
        yield temporary
    except OSError as error:
        raise BuildError(f"cannot write the {content} to {output}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace(output: Path, new: Path) -> None:
    """Put `new` where `output` is; what was there is lost only once the new one is in its place.

    Warns:
        UserWarning: what was there could not be removed; the sentence says where it is left.
    """
    new.chmod(0o755)
    if not output.exists():
        new.rename(output)
        return
    old = new.with_name(f"{new.name}-old")
    output.rename(old)
    try:
        new.rename(output)
    except BaseException:  # a signal that ends the command among them
        if not output.exists():
            old.rename(output)
        raise
    try:
        shutil.rmtree(old)
    except OSError as error:
        warnings.warn(
            f"{output} is the new one, whole, but what it replaced could not be removed ({error.strerror or error}): "
            f"delete {old}.",
            stacklevel=3,
        )


def _look_at(output: Path) -> tuple[Path, bool]:
    """Where it lies, and whether something does that is not an empty directory."""
    try:
        place = output.resolve()
        return place, place.exists() and (not place.is_dir() or any(place.iterdir()))
    except (OSError, RuntimeError) as error:  # a loop of links
        raise BuildError(f"cannot look at {output}: {getattr(error, 'strerror', None) or error}.") from None


def _is_engine(directory: Path) -> bool:
    try:
        content = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= _MARKS
