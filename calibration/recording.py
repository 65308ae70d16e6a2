# SPDX-License-Identifier: Apache-2.0
"""What the full model did on a text, collected once and streamed to disk; and what candidates scored.

Both live in one work folder and survive being killed: recordings record how many windows are whole, and evaluations are
lines of a file, of which an unfinished last one is ignored. Everything is keyed by the engine's files, the
processor's instruction set and the text's tokens, so another model, other kernels or another text never meet old
figures.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.evaluator import TOP_TOKENS, Evaluator, Progress, Reference, Scores, take
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.files import write_json
from adaptive_k_moe.plugin import instruction_set

FORMAT = 1
"""Changes whenever old files could not be read any more."""


class Recording:
    """Router entropies and predictions of the full model, in memory-mapped files. W windows of n tokens, L layers.

    Attributes:
        entropy: [W, n, L] nats.
        reference: the likeliest tokens at each position and their log-probabilities.
    """

    def __init__(self, entropy: npt.NDArray[np.float32], reference: Reference) -> None:
        self.entropy = entropy
        self.reference = reference


def collect(evaluator: Evaluator, windows: Windows, directory: Path, *, progress: Progress | None = None) -> Recording:
    """The full model's recording: read from `directory`, completed where a run was cut off, or made.

    Args:
        evaluator: the engine.
        windows: W windows of n tokens.
        directory: this text's own; made if missing.
        progress: called with the number of windows that are there.
    """
    model = evaluator.config.pretrained_config
    predicted, kept = windows.num_predicted, min(TOP_TOKENS, model.vocab_size)
    shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
        "entropy": ((len(windows), windows.window, model.num_moe_layers), np.float32),
        "top_ids": ((len(windows), predicted, kept), np.int32),
        "top_log_probs": ((len(windows), predicted, kept), np.float32),
    }
    identity = {"format": FORMAT, "engine": engine_fingerprint(evaluator), "tokens": windows.fingerprint()}
    manifest = directory / "recording.json"
    directory.mkdir(parents=True, exist_ok=True)
    known = read_json(manifest)
    done = int(known.get("windows_done", 0)) if {name: known.get(name) for name in identity} == identity else 0
    files, done = open_arrays({name: directory / f"{name}.npy" for name in shapes}, shapes, manifest, done)
    if progress is not None:
        progress(done)
    if done < len(windows):
        for batch in evaluator.batches(windows, evaluator.tables({}), 0, start=done):
            found = top_tokens(batch.log_probs, kept)
            files["entropy"][batch.windows] = batch.entropy
            files["top_ids"][batch.windows] = found.ids
            files["top_log_probs"][batch.windows] = found.log_probs
            for file in files.values():
                file.flush()
            write_json(manifest, {**identity, "windows_done": batch.windows.stop})
            if progress is not None:
                progress(batch.windows.stop)
    return Recording(files["entropy"], Reference(files["top_ids"], files["top_log_probs"]))


class EvaluationCache:
    """Scores of candidates that were evaluated before, one JSON line each.

    Args:
        path: the file; made if missing.
        identity: what the scores depend on besides the candidate: the engine and the text.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._identity = identity
        self._known: dict[str, Scores] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                if entry["identity"] == identity:
                    self._known[entry["candidate"]] = Scores.from_json(entry["scores"])
            except (ValueError, KeyError, TypeError):
                raise CalibrationError(f"{path} is damaged: delete it to measure again.") from None
        if len(whole) != len(content):
            with path.open("r+b") as stream:
                stream.truncate(len(whole))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, candidate: str) -> Scores | None:
        """The scores of a candidate, by its description."""
        return self._known.get(candidate)

    def put(self, candidate: str, scores: Scores) -> None:
        """Remember a candidate's scores, on disk before this returns."""
        self._known[candidate] = scores
        entry = {"identity": self._identity, "candidate": candidate, "scores": scores.to_json()}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, separators=(",", ":")) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def engine_fingerprint(evaluator: Evaluator) -> str:
    """SHA-256 over the hashes of the engine's files (its weights, not its policies) and the kernels' instruction set.

    Sets differ in the last bits, and with bfloat16 experts in more: AMX rounds their activations.
    """
    files = sorted((name, entry.digest) for name, entry in evaluator.config.files.items())
    return hashlib.sha256(json.dumps([files, instruction_set()]).encode()).hexdigest()


def top_tokens(log_probs: npt.NDArray[np.float32], count: int) -> Reference:
    """The likeliest tokens at each position, the one that `argmax` names first.

    Args:
        log_probs: [w, n, V].
        count: how many to keep.
    """
    ids = np.argpartition(log_probs, -count, axis=-1)[..., -count:]
    best = log_probs.argmax(axis=-1)[..., None]
    # Among equals argpartition may have kept any; the best takes its own place or the first one's.
    place = (ids == best).argmax(axis=-1)[..., None]
    np.put_along_axis(ids, place, ids[..., :1].copy(), axis=-1)
    ids[..., :1] = best
    return Reference(ids.astype(np.int32), take(log_probs, ids))


def open_arrays(
    paths: Mapping[str, Path], shapes: Mapping[str, tuple[tuple[int, ...], type[np.generic]]], manifest: Path, done: int
) -> tuple[dict[str, np.memmap[Any, Any]], int]:
    """Memory-mapped files of W windows each: those that are there, if they are whole, or else new ones.

    Args:
        paths: the files, by name.
        shapes: their shapes and types.
        manifest: the file that says how many windows are done; removed where the files begin anew.
        done: what it says, 0 if it is of other data.

    Returns:
        The files, and how many windows of them are done.
    """
    try:
        files = {name: _open(path, "r+") for name, path in paths.items()}
        usable = all((files[name].shape, files[name].dtype) == (s, np.dtype(d)) for name, (s, d) in shapes.items())
    except (OSError, ValueError):
        usable = False
    if usable and done:
        return files, done
    manifest.unlink(missing_ok=True)
    return {name: _open(paths[name], "w+", dtype=dtype, shape=shape) for name, (shape, dtype) in shapes.items()}, 0


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _open(path: Path, mode: str, **layout: Any) -> np.memmap[Any, Any]:
    file: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode=mode, **layout)
    return file
