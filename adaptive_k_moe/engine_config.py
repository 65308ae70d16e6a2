# SPDX-License-Identifier: Apache-2.0
"""The engine directory: what its ``config.json`` says, and the checks made when one is opened.

An engine directory is laid out as TensorRT-LLM's: ``config.json`` with ``pretrained_config`` (the
model) and ``build_config`` (the sizes it was built for), and the engine's files beside it. Ours adds
``adaptive_k`` (the policies, which may be edited in place) and ``files`` (sizes and BLAKE3 hashes).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from adaptive_k_moe.errors import EngineError, PolicyError
from adaptive_k_moe.files import write_json
from adaptive_k_moe.model_config import PretrainedConfig
from adaptive_k_moe.policy import MAX_K, PolicySet, PolicyTables, compile_policies
from adaptive_k_moe.validation import FileModel, describe_first_error

ENGINE_VERSION = "2"
"""Version of the engine directory's format, as it is written; the earlier "1", with SHA-256 hashes, is read too."""

_READABLE_VERSIONS = ("1", ENGINE_VERSION)

CONFIG_NAME = "config.json"

Target = Literal["openvino", "tensorrt", "torch", "onnx"]


class BuildConfig(FileModel):
    """The sizes an engine is built for; the words are TensorRT-LLM's.

    Attributes:
        target: what runs the engine; a checkpoint that torch measures without one has "torch", too.
        max_batch_size: most sequences in one step.
        max_input_len: most tokens of a prompt; None is as many as `max_seq_len` leaves room for.
        max_seq_len: most tokens of a sequence, prompt and answer together.
        max_num_tokens: most tokens in one step, over all sequences.
        max_k: most experts that a token may run: the largest k of the policies that the engine was built with, `full`
            among them. None is an engine of an earlier release, whose operators take min(num_experts, 32).
    """

    target: Target
    max_batch_size: int = Field(ge=1)
    max_input_len: int | None = Field(default=None, ge=1)
    max_seq_len: int = Field(ge=1)
    max_num_tokens: int = Field(ge=1)
    max_k: int | None = Field(default=None, ge=1)

    @property
    def longest_prompt(self) -> int:
        """Most tokens that a request's prompt may have, with room for one of the answer."""
        longest = self.max_seq_len - 1
        return longest if self.max_input_len is None else min(longest, self.max_input_len)

    def capacity(self, model: PretrainedConfig) -> int:
        """Most experts that a token may run: the operator's attribute `max_k`."""
        return self.max_k or min(model.num_experts, MAX_K)


class FileEntry(FileModel):
    """One file of the engine: its size in bytes and its hash, in hexadecimal.

    BLAKE3 is computed by all cores at about the speed of the page cache; engines of format "1" have SHA-256.
    """

    size: int = Field(ge=0)
    blake3: str | None = None
    sha256: str | None = None

    @model_validator(mode="after")
    def _check_hash(self) -> Self:
        if (self.blake3 is None) == (self.sha256 is None):
            raise ValueError("give one of blake3 and sha256")
        return self

    @property
    def algorithm(self) -> Literal["blake3", "sha256"]:
        """The hash that the entry has."""
        return "blake3" if self.sha256 is None else "sha256"

    @property
    def digest(self) -> str:
        """That hash."""
        return str(getattr(self, self.algorithm))


class EngineConfig(FileModel):
    """``config.json`` of an engine directory."""

    version: str
    pretrained_config: PretrainedConfig
    build_config: BuildConfig
    adaptive_k: PolicySet
    files: dict[str, FileEntry]

    def policies_for_model(self) -> PolicySet:
        """The policies checked against the model and the engine's capacity, and with `full` among them.

        Raises:
            PolicyError: they do not fit.
        """
        model = self.pretrained_config
        fitted, capacity = model.fit_policies(self.adaptive_k), self.build_config.capacity(model)
        for name, k in model.largest_k(fitted).items():
            if k > capacity:
                raise PolicyError(
                    f"policy {name!r} asks for k = {k}, but this engine was built to run at most {capacity} experts "
                    "for a token: build it again with a policy file that has this policy."
                )
        return fitted

    def policy_tables(self) -> PolicyTables:
        """The policies as the engine's inputs."""
        model = self.pretrained_config
        return compile_policies(
            self.policies_for_model(),
            num_experts=model.num_experts,
            num_experts_per_tok=model.num_experts_per_tok,
            num_moe_layers=model.num_moe_layers,
        )

    def to_json(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        content = self.model_dump(mode="json", exclude_none=True)
        content["adaptive_k"] = self.adaptive_k.to_json()
        return content


def read_engine_config(engine_dir: str | Path, *, verify_files: bool = True) -> EngineConfig:
    """Open an engine directory and check version, sizes and, unless told not to, every file's hash.

    Args:
        engine_dir: the directory that ``adaptive-k build`` wrote.
        verify_files: compare each file with its recorded hash, which reads all of it once; without it only presence
            and size are checked.

    Raises:
        EngineError: one sentence that says what is missing, truncated, altered or too new.
    """
    directory = Path(engine_dir)
    content = _read_config(directory)
    version = content.get("version") if isinstance(content, dict) else None
    if version not in _READABLE_VERSIONS:
        raise EngineError(
            f"{directory} was built in format {version!r}, and this release reads "
            f"{' and '.join(map(repr, _READABLE_VERSIONS))}: "
            "build the engine again from its checkpoint."
        )
    try:
        config = EngineConfig.model_validate(content)
    except ValidationError as error:
        raise EngineError(f"{directory / CONFIG_NAME}: {describe_first_error(error)}.") from None
    for name, entry in config.files.items():
        _check_file(directory / name, entry, verify_hash=verify_files)
    return config


def read_policy_tables(engine_dir: str | Path) -> PolicyTables:
    """The policies that an engine directory holds now, as the engine's inputs.

    Raises:
        EngineError: the directory cannot be read.
        PolicyError: its policies do not fit its model.
    """
    return read_engine_config(engine_dir, verify_files=False).policy_tables()


def write_engine_config(engine_dir: str | Path, config: EngineConfig) -> None:
    """Write ``config.json`` so that a reader sees the old one or the new one, never half of it."""
    write_json(Path(engine_dir) / CONFIG_NAME, config.to_json())


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file."""
    return FileEntry(size=path.stat().st_size, blake3=_digest(path, "blake3"))


def _read_config(directory: Path) -> Any:
    if not directory.is_dir():
        raise EngineError(f"there is no engine directory {directory}: `adaptive-k build` makes one.")
    try:
        return json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(f"{directory} has no {CONFIG_NAME}, so it is no engine directory.") from None
    except OSError as error:
        raise EngineError(f"cannot read {directory / CONFIG_NAME}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{directory / CONFIG_NAME} is not JSON: {error}.") from None


def _check_file(path: Path, entry: FileEntry, *, verify_hash: bool) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        raise EngineError(f"{path} is missing: build the engine again.") from None
    if size != entry.size:
        raise EngineError(f"{path} has {size} bytes instead of {entry.size}: build or copy the engine again.")
    if verify_hash and _digest(path, entry.algorithm) != entry.digest:
        raise EngineError(f"{path} was altered (its hash differs): build or copy the engine again.")


def _digest(path: Path, algorithm: Literal["blake3", "sha256"]) -> str:
    if algorithm == "sha256":
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    from blake3 import blake3

    # The file is mapped, so nothing is copied, and what was read is in the page cache for the runtime.
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
