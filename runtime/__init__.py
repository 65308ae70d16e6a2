# SPDX-License-Identifier: Apache-2.0
"""The runtime: an engine directory becomes an `LLM` that answers many prompts at a time.

`LLM` gives the `Engine` a thread; the `Engine` lets the `Scheduler` plan a step, the `Session` run it and
the `Sampler` choose the tokens.
"""

from adaptive_k_moe.runtime.handle import GenerationHandle
from adaptive_k_moe.runtime.llm import LLM, KvCacheConfig
from adaptive_k_moe.runtime.outputs import (
    CompletionOutput,
    Enrollment,
    RequestContext,
    RequestMetrics,
    RequestOutput,
)
from adaptive_k_moe.runtime.sampling_params import SamplingParams
from adaptive_k_moe.runtime.telemetry import EngineStats, Observer, Refusal, StepRecord

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineStats",
    "Enrollment",
    "GenerationHandle",
    "KvCacheConfig",
    "Observer",
    "Refusal",
    "RequestContext",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StepRecord",
]
