# SPDX-License-Identifier: Apache-2.0
"""A text's perplexity under a policy, with what the policy saved: by count and by clock."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.errors import RequestError
from adaptive_k_moe.runtime.expert_runs import ExpertRuns
from adaptive_k_moe.runtime.outputs import RequestOutput
from adaptive_k_moe.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from adaptive_k_moe.runtime.llm import LLM


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """One policy's measurement.

    Attributes:
        policy: its name.
        perplexity: exp of the mean negative log-likelihood of the tokens predicted.
        num_tokens: tokens processed.
        num_predicted: tokens predicted: all but the first of each window.
        window: tokens in a window.
        avg_k: mean experts run for a token in a layer.
        compute_saved_ratio: share of expert runs left out against the trained top-k; a count, not a time.
        seconds: wall time of the model's runs.
        tokens_per_second: `num_tokens` over `seconds`.
    """

    policy: str
    perplexity: float
    num_tokens: int
    num_predicted: int
    window: int
    avg_k: float
    compute_saved_ratio: float
    seconds: float
    tokens_per_second: float


def measure_perplexity(llm: LLM, token_ids: Sequence[int], policy: str | None, window: int) -> PerplexityResult:
    """Perplexity of a text in windows that do not overlap, each read with no context before it.

    As many windows as the engine's batch holds run at a time, and one such batch before the clock starts.
    The scoring of the logits is not in the time.

    Args:
        llm: the engine.
        token_ids: the text.
        policy: name of the policy; None is the engine's default.
        window: tokens in a window, at least 2 and at most the engine's longest prompt; a last window of
            a single token is left out.

    Raises:
        RequestError: the text or the window is too short, or the window too long for the engine; or the policy has
            another rule for decode or sees the whole step, so that windows read whole would say nothing of it.
        PolicyError: there is no policy of that name.
    """
    longest = llm.config.build_config.longest_prompt
    if not 2 <= window <= longest:
        raise RequestError(f"the window is {window} tokens, but this engine takes 2 to {longest}.")
    name = llm.policies.names[llm.policies.index(policy)]
    if name in llm.policies.step_policies:
        raise RequestError(
            f"policy {name!r} differs by phase or sees the whole step, which windows read whole say nothing of: "
            "measure it with `adaptive-k eval`, in decode steps."
        )
    windows = [list(token_ids[start : start + window]) for start in range(0, len(token_ids), window)]
    windows = [tokens for tokens in windows if len(tokens) >= 2]
    if not windows:
        raise RequestError("the text has fewer than 2 tokens, so there is nothing to predict.")
    params = SamplingParams(max_tokens=1, end_id=-1, return_context_logits=True, adaptive_k_policy=policy)
    batch_size = llm.stats().max_batch_size
    llm.generate(windows[:batch_size], params)

    seconds = total = 0.0
    num_tokens = num_predicted = 0
    runs = ExpertRuns(llm.config.pretrained_config.num_experts_per_tok)
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        started = time.perf_counter()
        outputs = llm.generate(batch, params)
        seconds += time.perf_counter() - started
        for tokens, output in zip(batch, outputs, strict=True):
            total += negative_log_likelihood(_context_logits(output), tokens)
            num_tokens += len(tokens)
            num_predicted += len(tokens) - 1
            runs += output.expert_runs  # the one token of the answer is never computed
    return PerplexityResult(
        policy=name,
        perplexity=math.exp(total / num_predicted),
        num_tokens=num_tokens,
        num_predicted=num_predicted,
        window=window,
        avg_k=runs.avg_k,
        compute_saved_ratio=runs.compute_saved_ratio,
        seconds=seconds,
        tokens_per_second=num_tokens / seconds,
    )


def measure_policies(
    llm: LLM, token_ids: Sequence[int], policies: Sequence[str], window: int, *, rounds: int = 3
) -> list[PerplexityResult]:
    """`measure_perplexity` for several policies whose times can be compared.

    All policies are measured in each round, one after another, and the median of a policy's times counts,
    so that neither a cold start nor a busy moment of the machine falls on one of them.

    Args:
        llm: the engine.
        token_ids: the text.
        policies: their names.
        window: as for `measure_perplexity`.
        rounds: how often each is measured, at least 1.
    """
    results: dict[str, list[PerplexityResult]] = {name: [] for name in policies}
    for _ in range(max(1, rounds)):
        for name, measured in results.items():
            measured.append(measure_perplexity(llm, token_ids, name, window))
    summary = []
    for measured in results.values():
        seconds = statistics.median(result.seconds for result in measured)
        last = measured[-1]
        summary.append(replace(last, seconds=seconds, tokens_per_second=last.num_tokens / seconds))
    return summary


def negative_log_likelihood(logits: npt.NDArray[np.float32], token_ids: Sequence[int]) -> float:
    """Sum over the tokens after the first of -log p(token | those before), in nats.

    Args:
        logits: [n, V], row i the prediction after token i.
        token_ids: n tokens.
    """
    rows = logits[:-1].astype(np.float64)
    greatest = rows.max(axis=1)
    log_totals = greatest + np.log(np.exp(rows - greatest[:, None]).sum(axis=1))
    chosen = rows[np.arange(len(rows)), np.asarray(token_ids[1:])]
    return float((log_totals - chosen).sum())


def _context_logits(output: RequestOutput) -> npt.NDArray[np.float32]:
    if output.context_logits is None or output.error is not None:
        raise RequestError(f"a window could not be read: {output.error}")
    return output.context_logits
