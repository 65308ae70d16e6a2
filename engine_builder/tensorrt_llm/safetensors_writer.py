# SPDX-License-Identifier: Apache-2.0
"""Writes a safetensors file piece by piece, so that no tensor has to be in memory whole."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_TYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "float32": ("F32", np.dtype(np.float32)),
    "float16": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}


class TensorSpec(NamedTuple):
    """A tensor of the file: its name, "float32", "float16" or "bfloat16", and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class SafetensorsWriter:
    """The file's header is known beforehand; values follow in its order. Use as a context manager.

    Args:
        path: the file to write.
        specs: its tensors, in the order in which they will be written.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for spec in specs:
            tag, type_ = _TYPES[spec.dtype]
            begin, end = end, end + math.prod(spec.shape) * type_.itemsize
            header[spec.name] = {"dtype": tag, "shape": list(spec.shape), "data_offsets": [begin, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._end = 8 + len(encoded) + end
        self._stream = path.open("wb")
        self._stream.write(len(encoded).to_bytes(8, "little") + encoded)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        written = self._stream.tell()
        self._stream.close()
        if kind is None and written != self._end:
            raise AssertionError(f"{self._stream.name} has {written} bytes instead of {self._end}")

    def write(self, piece: Array, dtype: str) -> None:
        """Append values of the tensor whose turn it is, converted to its dtype."""
        _, type_ = _TYPES[dtype]
        self._stream.write(np.ascontiguousarray(piece, dtype=type_).view(np.uint8).data)
