# SPDX-License-Identifier: Apache-2.0
"""The engine that a checkpoint is measured with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from adaptive_k_moe.files import write_json
from adaptive_k_moe.model_config import Dtype


def engine_of(
    checkpoint_dir: Path,
    engine_dir: Path,
    *,
    dtype: Dtype | None = None,
    max_seq_len: int = 512,
    max_batch_size: int = 16,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Build an engine from a checkpoint, or use the one that an earlier run built from it.

    Args:
        checkpoint_dir: Hugging Face checkpoint.
        engine_dir: where the engine is or will be.
        dtype: of the weights; None is the checkpoint's.
        max_seq_len: most tokens of a sequence; enough for windows and for timing, not for serving.
        max_batch_size: most sequences of a step.
        progress: as for `build`.
    """
    from adaptive_k_moe.engine_builder import build

    stamp = engine_dir.with_name(engine_dir.name + ".json")
    identity = {
        "checkpoint": checkpoint_fingerprint(checkpoint_dir),
        "dtype": dtype,
        "max_seq_len": max_seq_len,
        "max_batch_size": max_batch_size,
    }
    try:
        same = json.loads(stamp.read_text(encoding="utf-8")) == identity and engine_dir.is_dir()
    except (OSError, ValueError):
        same = False
    if not same:
        engine_dir.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        build(
            checkpoint_dir,
            engine_dir,
            dtype=dtype,
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            force=True,
            progress=progress,
        )
        write_json(stamp, identity)
    return engine_dir


def checkpoint_fingerprint(checkpoint_dir: Path) -> str:
    """Names, sizes and times of the checkpoint's files: hashing 90 GB to save a build would save nothing."""
    files = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in checkpoint_dir.glob("*")
        if path.suffix in (".json", ".safetensors")
    )
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
