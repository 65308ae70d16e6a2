# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's ``config.json``, read with errors that name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from adaptive_k_moe.errors import CheckpointError
from adaptive_k_moe.model_config import RopeConfig
from adaptive_k_moe.validation import first_error

_T = TypeVar("_T")

# Keys of rope_parameters that say nothing about the frequencies.
_IGNORED_ROPE_KEYS = {"type", "rope_theta", "rope_type", "partial_rotary_factor"}


class HfConfig:
    """Typed access to a model's ``config.json``.

    Args:
        content: the parsed file.
        source: the path, for errors.
        generation: content of ``generation_config.json``, or empty.
    """

    def __init__(self, content: dict[str, Any], source: Path, generation: dict[str, Any] | None = None) -> None:
        self._content = content
        self._source = source
        self._generation = generation or {}

    @classmethod
    def read(cls, checkpoint_dir: Path) -> HfConfig:
        """Read ``config.json`` (and ``generation_config.json`` if there is one).

        Raises:
            CheckpointError: the directory or file is missing, or the file is not a JSON object.
        """
        path = checkpoint_dir / "config.json"
        if not checkpoint_dir.is_dir():
            raise CheckpointError(f"there is no checkpoint directory {checkpoint_dir}.")
        content = _read_json(path)
        if content is None:
            raise CheckpointError(f"{checkpoint_dir} has no config.json, so it is no Hugging Face checkpoint.")
        return cls(content, path, _read_json(checkpoint_dir / "generation_config.json"))

    @property
    def architecture(self) -> str:
        """First entry of ``architectures``."""
        names = self._content.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise self.error("architectures", names, "a list with the model's class name")
        return names[0]

    def get(self, name: str, kind: type[_T], default: _T | None = None) -> _T:
        """A field of the given type; without a default it is required.

        Raises:
            CheckpointError: the field is absent (and has no default) or of another type.
        """
        value = self._content.get(name)
        if value is None:
            if default is None:
                raise self.error(name, value, f"{kind.__name__} (it is missing)")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(name, value, kind.__name__)
        return value

    def positive(self, name: str, default: int | None = None) -> int:
        """A field that counts something: an integer of at least 1."""
        value = self.get(name, int, default)
        if value < 1:
            raise self.error(name, value, "at least 1")
        return value

    def optional(self, name: str, kind: type[_T]) -> _T | None:
        """A field of the given type, or None where it is absent or null."""
        return None if self._content.get(name) is None else self.get(name, kind)

    def require(self, name: str, expected: Any, *, default: Any = None) -> None:
        """Refuse a checkpoint whose field is not `expected` (absent counts as `default`)."""
        value = self._content.get(name, default)
        if value != expected:
            raise self.error(name, value, f"{expected!r}: nothing else is supported for {self.architecture}")

    def token_id(self, name: str) -> int | None:
        """A special token's id; of several, the first."""
        ids = self.token_ids(name)
        return ids[0] if ids else None

    def token_ids(self, name: str) -> list[int]:
        """A special token's ids, from ``generation_config.json`` first, as generation uses them."""
        for content in (self._generation, self._content):
            value = content.get(name)
            if value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(i, int) for i in ids):
                raise self.error(name, value, "a token id or a list of them")
            return [int(i) for i in ids]
        return []

    def rope(self, *, default_theta: float, max_position_embeddings: int) -> RopeConfig:
        """The rotary embedding, from either spelling (``rope_parameters``; ``rope_theta``, ``rope_scaling``).

        Raises:
            CheckpointError: a rope type or field that the builder does not know.
        """
        theta = self.get("rope_theta", float, default_theta)
        found = self._content.get("rope_parameters") or self._content.get("rope_scaling") or {}
        if not isinstance(found, dict):
            raise self.error("rope_parameters", found, "an object")
        rope_type: Any = found.get("rope_type", found.get("type", "default"))
        factor = self._content.get("partial_rotary_factor", found.get("partial_rotary_factor", 1.0))
        if factor != 1.0:
            raise self.error("partial_rotary_factor", factor, "1.0: nothing else is supported")
        fields = {key: value for key, value in found.items() if key not in _IGNORED_ROPE_KEYS and value is not None}
        if rope_type in ("llama3", "yarn"):
            fields.setdefault("original_max_position_embeddings", max_position_embeddings)
            original = self._content.get("original_max_position_embeddings")
            if original is not None:
                fields["original_max_position_embeddings"] = original
        required = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}
        for name in required.get(str(rope_type), []):
            if name not in fields:
                raise self.error(f"rope_parameters.{name}", None, f"a number, since rope_type is {rope_type!r}")
        if rope_type == "yarn" and "factor" not in fields:
            fields["factor"] = max_position_embeddings / fields["original_max_position_embeddings"]
        if rope_type == "llama3" and fields["low_freq_factor"] == fields["high_freq_factor"]:
            raise self.error(
                "rope_parameters.high_freq_factor", fields["high_freq_factor"], "more than low_freq_factor"
            )
        try:
            return RopeConfig(rope_type=rope_type, rope_theta=found.get("rope_theta") or theta, **fields)
        except (ValidationError, TypeError) as error:
            if isinstance(error, ValidationError):
                where, message = first_error(error)
                expected = message.removeprefix("it must be ")
                raise self.error(f"rope_parameters.{where}", error.errors()[0]["input"], expected) from None
            raise self.error("rope_parameters", found, "names of fields") from None

    def error(self, name: str, value: Any, expected: str) -> CheckpointError:
        """The error for a field that the builder cannot take."""
        return CheckpointError(f"{self._source}: {name} is {value!r}, expected {expected}.")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return content
