# SPDX-License-Identifier: Apache-2.0
"""Sessions: one loaded engine each, by target, behind one interface (``base.py``)."""

from __future__ import annotations

from pathlib import Path

from adaptive_k_moe.engine_config import EngineConfig
from adaptive_k_moe.errors import EngineError
from adaptive_k_moe.model_config import Device, KvCacheDtype
from adaptive_k_moe.runtime.session.base import Session, StepInput, StepOutput

__all__ = ["Session", "StepInput", "StepOutput", "create_session"]


def create_session(
    engine_dir: str | Path,
    config: EngineConfig,
    *,
    num_threads: int | None = None,
    kv_cache_max_tokens: int | None = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    device: Device | None = None,
) -> Session:
    """Load an engine with the session of its target.

    Args:
        engine_dir: the engine directory.
        config: what `read_engine_config` returned for it.
        num_threads: CPU threads of a session that computes on them; None is all that the process may use.
        kv_cache_max_tokens: tokens that the KV cache holds over all sequences; None is the session's choice.
        kv_cache_dtype: of keys and values; "auto" is what the engine's attention computes in.
        device: of the target "torch"; None is a GPU where torch finds one.

    Raises:
        EngineError: the target has no session (an "onnx" engine is for ONNX Runtime), or loading failed.
    """
    target = config.build_config.target
    if target == "torch":
        from adaptive_k_moe.runtime.session.torch import TorchSession

        return TorchSession(
            engine_dir,
            config,
            num_threads=num_threads,
            kv_cache_max_tokens=kv_cache_max_tokens,
            kv_cache_dtype=kv_cache_dtype,
            device=device,
        )
    if device is not None:
        raise EngineError(
            f"device {device} is for engines of the target torch: {engine_dir} was built for {target}, which has one "
            "kind of device."
        )
    if target == "openvino":
        from adaptive_k_moe.runtime.session.openvino import OpenVinoSession

        return OpenVinoSession(
            engine_dir,
            config,
            num_threads=num_threads,
            kv_cache_max_tokens=kv_cache_max_tokens,
            kv_cache_dtype=kv_cache_dtype,
        )
    if target == "tensorrt":
        from adaptive_k_moe.runtime.session.tensorrt import TensorRtSession

        if kv_cache_dtype != "auto":
            raise EngineError(
                f"kv_cache_dtype {kv_cache_dtype} is for the openvino target: a TensorRT engine's cache has the dtype "
                "that it was built with, which is auto."
            )
        return TensorRtSession(engine_dir, config, kv_cache_max_tokens=kv_cache_max_tokens)
    raise EngineError(
        f"{engine_dir} was built for the target {target!r}, which has no runtime here: build with --target openvino."
    )
