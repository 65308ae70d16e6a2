# SPDX-License-Identifier: Apache-2.0
"""Policies of an engine measured side by side on a text: quality, experts run, time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration import bootstrap
from adaptive_k_moe.calibration.decoding import MAX_STEPS, Decoding, decode_policies, why_too_large
from adaptive_k_moe.calibration.evaluator import TOP_TOKENS, Evaluator, Reference, Scores, kl_divergence, take
from adaptive_k_moe.calibration.recording import top_tokens
from adaptive_k_moe.calibration.timing import Timing, time_policies
from adaptive_k_moe.calibration.windows import Windows, token_class, token_texts
from adaptive_k_moe.policy import FULL

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PolicyEvaluation:
    """One policy on one text. L MoE layers, K the largest k that ran.

    Attributes:
        policy: its name.
        scores: by window.
        full: `full`'s scores, by window.
        full_k: the trained top-k.
        k_share: [L, K + 1] share of each layer's tokens that ran each k.
        class_avg_k: token class to its mean k, over the layers.
        timings: prefill and decode.
    """

    policy: str
    scores: Scores
    full: Scores
    full_k: int
    k_share: Float64Array
    class_avg_k: dict[str, float]
    timings: list[Timing]

    def to_json(self) -> dict[str, Any]:
        """Figures with their 95 % intervals."""
        return {
            "policy": self.policy,
            "perplexity": self.scores.perplexity,
            "perplexity_change": bootstrap.perplexity_change(self.scores.nll, self.full.nll).to_json(),
            "kl_to_full_nats": bootstrap.mean(self.scores.kl).to_json(),
            "top_token_agreement": bootstrap.mean(self.scores.agreement).to_json(),
            "avg_k": bootstrap.mean(self.scores.k.mean(axis=1)).to_json(),
            "experts_saved_ratio": 1 - self.scores.avg_k / self.full_k,
            "avg_k_by_layer": self.scores.k.mean(axis=0).tolist(),
            "k_share_by_layer": self.k_share.tolist(),
            "avg_k_by_token_class": self.class_avg_k,
            "timings": [timing.to_json() for timing in self.timings],
        }


def evaluate(
    evaluator: Evaluator,
    windows: Windows,
    policies: Sequence[str],
    *,
    batches: Sequence[int] = (1, 4, 16),
    rounds: int = 15,
    max_steps: int = MAX_STEPS,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[PolicyEvaluation], list[Decoding]]:
    """Measure policies of the engine; `full` comes first, whether named or not.

    Args:
        evaluator: the engine.
        windows: the text.
        policies: names.
        batches: sequences in a step for decode and the times; those that do not fit the engine or the text are left
            out.
        rounds: rounds of timing; 0 takes no times.
        max_steps: most decode steps of one policy at one batch size; 0 reads no decode steps.
        progress: called with what is measured, and how much of how much.

    Returns:
        Each policy on windows read whole, without those of `PolicyTables.step_policies`; and each policy in decode
        steps of each batch size.

    Raises:
        PolicyError: the engine has no policy of a name.
    """
    tables = evaluator.config.policy_tables()
    names = list(dict.fromkeys([FULL, *policies]))
    rows = {name: tables.index(name) for name in names}
    classes, labels = _classes(evaluator, windows)
    model = evaluator.config.pretrained_config
    count, kept = len(windows), min(TOP_TOKENS, model.vocab_size)
    reference = Reference(
        np.empty((count, windows.num_predicted, kept), np.int32),
        np.empty((count, windows.num_predicted, kept), np.float32),
    )
    highest = int(tables.k_values.max())
    found: dict[str, tuple[Scores, Float64Array, dict[str, float]]] = {}
    whole = {name: row for name, row in rows.items() if name not in tables.step_policies}
    for name, row in whole.items():
        scores = Scores(np.empty(count), np.empty(count), np.empty(count), np.empty((count, evaluator.num_layers)))
        histogram = np.zeros((evaluator.num_layers, highest + 1))
        sums = np.zeros(len(labels))
        for batch in evaluator.batches(windows, tables, row):
            chosen = batch.windows
            if name == FULL:
                top = top_tokens(batch.log_probs, kept)
                reference.ids[chosen], reference.log_probs[chosen] = top.ids, top.log_probs
            ids = reference.ids[chosen]
            targets = windows.tokens[chosen, windows.first :]
            scores.nll[chosen] = -take(batch.log_probs, targets[..., None])[..., 0].mean(axis=1, dtype=np.float64)
            scores.kl[chosen] = kl_divergence(reference.log_probs[chosen], take(batch.log_probs, ids)).mean(axis=1)
            scores.agreement[chosen] = (batch.log_probs.argmax(axis=-1) == ids[..., 0]).mean(axis=1)
            scores.k[chosen] = batch.k.mean(axis=1)
            for layer in range(evaluator.num_layers):
                histogram[layer] += np.bincount(batch.k[..., layer].ravel(), minlength=highest + 1)
            sums += np.bincount(classes[chosen].ravel(), batch.k.mean(axis=-1).ravel(), minlength=len(labels))
            if progress is not None:
                progress(f"reading under {name}", chosen.stop, count)
        sizes = np.bincount(classes.ravel(), minlength=len(labels))
        by_class = {label: float(sums[i] / sizes[i]) for i, label in enumerate(labels)}
        found[name] = (scores, histogram / histogram.sum(axis=1, keepdims=True), by_class)
    timings: list[Timing] = []
    if rounds:
        timings = time_policies(
            evaluator,
            windows,
            tables,
            names,
            batches=batches,
            rounds=rounds,
            progress=None if progress is None else lambda what: progress(f"timing {what}", 0, 1),
        )
    decodings: list[Decoding] = []
    for batch_size in batches if max_steps else ():
        if why_too_large(evaluator, windows, batch_size) is None:
            what = f"decode steps of {batch_size}"
            decodings += decode_policies(
                evaluator,
                windows,
                rows,
                tables,
                batch_size,
                timings,
                max_steps=max_steps,
                progress=None if progress is None else lambda done, what=what: progress(what, done, len(rows)),  # type: ignore[misc]
            )
    evaluations = [
        PolicyEvaluation(
            name,
            scores,
            found[FULL][0],
            evaluator.full_k,
            share,
            by_class,
            [timing for timing in timings if timing.policy == name],
        )
        for name, (scores, share, by_class) in found.items()
    ]
    return evaluations, decodings


def _classes(evaluator: Evaluator, windows: Windows) -> tuple[npt.NDArray[np.int64], list[str]]:
    """[W, n] the class of every token as an index, and the classes that occur."""
    ids, places = np.unique(windows.tokens, return_inverse=True)
    of_id = [token_class(text) for text in token_texts(evaluator.tokenizer, ids.tolist())]
    labels = sorted(set(of_id))
    index = np.array([labels.index(name) for name in of_id])
    return index[places].reshape(windows.tokens.shape), labels
