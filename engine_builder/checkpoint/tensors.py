# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors, read one at a time and never all at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from adaptive_k_moe.errors import CheckpointError

# A mapped file's touched pages count as memory until it is closed: it is opened again after so much.
_REOPEN_BYTES = 1 << 30

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

# How a file begins that git left in the place of a large one.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

Array = npt.NDArray[Any]


class CheckpointTensors:
    """Named tensors of a directory with ``model.safetensors`` or an index of shards.

    Every read is recorded, so that `unused` can tell what a model file forgot.

    Raises:
        CheckpointError: no weights, a shard missing or damaged, or a dtype that is not a float of 16,
            32 or 64 bits (quantised checkpoints).
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        self._directory = checkpoint_dir
        self._shard_of = _locate(checkpoint_dir)
        self._open: tuple[str, Any] | None = None
        self._read_bytes = 0
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def shards(self) -> list[Path]:
        """The files with the tensors."""
        return [self._directory / shard for shard in sorted(set(self._shard_of.values()))]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def read(self, name: str, shape: tuple[int, ...]) -> Array:
        """One whole tensor, in the dtype of the file.

        Args:
            name: its name in the checkpoint.
            shape: what the config says it must be.

        Raises:
            CheckpointError: it is absent, or its shape or dtype is another.
        """
        self._check(name, shape)
        array = np.asarray(self._handle(name).get_tensor(name))
        self._count(array)
        return array

    def rows(self, name: str, shape: tuple[int, ...]) -> Iterator[Array]:
        """The tensor's slices along its first dimension, one in memory at a time."""
        self._check(name, shape)
        for index in range(shape[0]):
            array = np.asarray(self._handle(name).get_slice(name)[index])
            self._count(array)
            yield array

    def unused(self) -> list[str]:
        """Names of tensors that nothing has read, sorted."""
        return sorted(set(self._shard_of) - self._used)

    def require_all_used(self, user: str, ignored: Iterable[str]) -> None:
        """Refuse a checkpoint with tensors that nothing has read.

        Args:
            user: who read it, for the error.
            ignored: patterns of names that need not be read.

        Raises:
            CheckpointError: there are others.
        """
        pattern = re.compile("|".join(ignored))
        unused = [name for name in self.unused() if not pattern.fullmatch(name)]
        if unused:
            count = f"{len(unused)} tensor{'s' if len(unused) > 1 else ''}"
            raise CheckpointError(
                f"{self._directory} holds {count} that {user} has no place for, {unused[0]!r} first: "
                "the checkpoint does not match its config.json."
            )

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._shard_of:
            raise CheckpointError(f"{self._directory} has no tensor {name!r}.")
        found = self._handle(name).get_slice(name)
        if found.get_dtype() not in _DTYPES:
            raise CheckpointError(
                f"{self._directory}: tensor {name!r} is {found.get_dtype()}; only bfloat16, float16, float32 and "
                "float64 can be built, so take the model's unquantised checkpoint."
            )
        if tuple(found.get_shape()) != shape:
            raise CheckpointError(
                f"{self._directory}: tensor {name!r} has shape {tuple(found.get_shape())}, "
                f"but config.json makes it {shape}."
            )
        self._used.add(name)

    def _count(self, array: Array) -> None:
        self._read_bytes += array.nbytes
        if self._read_bytes >= _REOPEN_BYTES:
            self._open, self._read_bytes = None, 0

    def _handle(self, name: str) -> Any:
        shard = self._shard_of[name]
        if self._open is None or self._open[0] != shard:
            self._open = None  # one shard is open at a time
            self._open = (shard, _open_shard(self._directory / shard))
        return self._open[1]


def _locate(directory: Path) -> dict[str, str]:
    """Tensor name to shard's file name."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            located = {str(name): str(shard) for name, shard in weight_map.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise CheckpointError(f"{index} is damaged: it has no readable weight_map.") from None
        for shard in sorted(set(located.values())):
            if Path(shard).name != shard:
                raise CheckpointError(f"{index} names a shard outside the checkpoint: {shard!r}.")
            present = set(_open_shard(directory / shard).keys())
            missing = sorted(name for name, where in located.items() if where == shard and name not in present)
            if missing:
                raise CheckpointError(f"{directory / shard} lacks the tensor {missing[0]!r} that the index promises.")
        return located
    single = directory / "model.safetensors"
    if single.exists() or single.is_symlink():  # a link in a download cache may lead to nothing
        return dict.fromkeys(_open_shard(single).keys(), single.name)
    hint = ""
    if list(directory.glob("*.safetensors")):
        hint = f" (only files of other names: it takes {index.name} to find them)"
    elif list(directory.glob("*.bin")):
        hint = " (only .bin files: save it again with safetensors)"
    raise CheckpointError(f"{directory} has neither model.safetensors nor an index of shards{hint}.")


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError:
        raise CheckpointError(f"the checkpoint's shard {path} is missing.") from None
    except (SafetensorError, OSError) as error:
        if _begins_with(path, _LFS_POINTER):
            raise CheckpointError(f"{path} is only git's pointer to the file: run `git lfs pull` there.") from None
        raise CheckpointError(f"{path} is damaged or truncated: {error}.") from None


def _begins_with(path: Path, beginning: bytes) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(beginning)) == beginning
    except OSError:
        return False
