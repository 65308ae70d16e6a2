# SPDX-License-Identifier: Apache-2.0
"""What a server answers. Shapes: n tokens, L MoE layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer.

    Attributes:
        text: what the text gained. It may be empty: text that could still become a stop string, or is
            half a character, is held back, while its tokens' k is reported at once.
        num_output_tokens: n, the tokens that the answer gained.
        avg_k: mean number of experts run a token and layer, over the prompt and the answer so far.
        compute_saved_ratio: share of expert runs left out so far against the trained top-k; a count,
            not a time.
        k: [n, L] experts that ran for each token, in each layer; None if it was not asked for.
        entropy: [n, L] the router's entropy, in nats; None if it was not asked for.
        num_input_tokens: tokens of the prompt.
        log_probs: [n] log-probabilities of the tokens; None if they were not asked for.
        variant: the variant of the server's A/B test that the request belongs to; None if it is in none.
        avg_reads: mean experts that the request's steps read in a MoE layer so far, for all that ran in them; None
            where the server's engine does not count.
        reads_per_token: experts read for a token of it in a MoE layer, each step's shared out evenly among the step's
            tokens; None likewise.
        followed: tokens computed so far under each policy, where the request's own is of the kind `by_load`; else None.
    """

    text: str
    num_output_tokens: int
    avg_k: float
    compute_saved_ratio: float
    k: npt.NDArray[np.int32] | None
    entropy: npt.NDArray[np.float32] | None
    num_input_tokens: int
    log_probs: npt.NDArray[np.float32] | None
    variant: str | None = None
    avg_reads: float | None = None
    reads_per_token: float | None = None
    followed: dict[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Completion(Chunk):
    """A whole answer: the attributes are those of `Chunk`, over all n tokens of the answer."""


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What a server serves.

    Attributes:
        policies: names that a request may give as `adaptive_k_policy`.
        default_policy: the one of a request that gives none.
        num_moe_layers: L.
        num_experts: experts in a MoE layer.
        num_experts_per_tok: the trained top-k, which `full` runs.
    """

    policies: list[str]
    default_policy: str
    num_moe_layers: int
    num_experts: int
    num_experts_per_tok: int
