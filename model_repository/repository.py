# SPDX-License-Identifier: Apache-2.0
"""Writes a Triton model repository for one engine."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from adaptive_k_moe.errors import ServerError
from adaptive_k_moe.model_config import Device, KvCacheDtype
from adaptive_k_moe.model_repository.contract import ENSEMBLE, KV_CACHE_PARAMETER, MODELS, render_config


def write_model_repository(
    directory: Path,
    engine_dir: Path,
    *,
    num_threads: int | None = None,
    device: Device | None = None,
    kv_cache_max_tokens: int | None = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    parameters: Mapping[str, str] | None = None,
    decoupled: bool = True,
) -> None:
    """Write the models of an engine to `directory`, which any Triton server can then be pointed at.

    Args:
        directory: where; made if missing. Models of the same names there are replaced.
        engine_dir: the engine; its absolute path is written.
        num_threads: CPU threads of the engine; None leaves it to the runtime.
        device: of an engine of the target "torch"; None leaves it to the runtime.
        kv_cache_max_tokens: tokens that the KV cache holds over all sequences; None leaves it to the runtime.
        kv_cache_dtype: of keys and values.
        parameters: more parameters of the model that holds the engine.
        decoupled: as in `render_config`.

    Raises:
        ServerError: the directory cannot be written.
    """
    engine = {"engine_dir": str(engine_dir.resolve()), **(parameters or {})}
    if num_threads is not None:
        engine["num_threads"] = str(num_threads)
    if device is not None:
        engine["device"] = device
    if kv_cache_max_tokens is not None:
        engine[KV_CACHE_PARAMETER] = str(kv_cache_max_tokens)
    if kv_cache_dtype != "auto":
        engine["kv_cache_dtype"] = kv_cache_dtype
    try:
        for model in MODELS:
            version = directory / model / "1"
            version.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(__file__).parent / model / "1" / "model.py", version / "model.py")
            config = version.parent / "config.pbtxt"
            config.write_text(
                render_config(model, engine if model == ENSEMBLE else None, decoupled=decoupled), encoding="utf-8"
            )
    except OSError as error:
        raise ServerError(f"cannot write the model repository {directory}: {error.strerror}.") from None
