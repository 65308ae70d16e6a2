# SPDX-License-Identifier: Apache-2.0
"""Policies of single requests: `SamplingParams(extra_args={"adaptive_k_policy": "balanced"})`.

vLLM tells its logits processors before each forward which request came into which place of the batch, and its
parameters. This one leaves the logits alone and notes the policies.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from adaptive_k_moe.errors import PolicyError
from adaptive_k_moe.vllm.configuration import REQUEST_FIELD, policy_names, server_policies
from adaptive_k_moe.vllm.server import Server


def policy_of(params: SamplingParams) -> str:
    """The policy's name.

    Raises:
        PolicyError: there is no policy of that name, or no policies at all.
    """
    policies = server_policies()
    name = (params.extra_args or {}).get(REQUEST_FIELD)
    if name is None:
        return policies.default
    if name not in (names := policy_names(policies)):
        raise PolicyError(f"{REQUEST_FIELD} {name!r} is not one of this server's policies: {', '.join(names)}.")
    return str(name)


class RequestPolicy(LogitsProcessor):  # type: ignore[misc]
    """Give it to vLLM as `--logits-processors adaptive_k_moe.vllm.requests:RequestPolicy`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        del device, is_pin_memory
        self._server = Server.of(vllm_config)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request with a policy that there is not.

        Raises:
            ValueError: the sentence for the client.
        """
        try:
            policy_of(sampling_params)
        except PolicyError as error:
            raise ValueError(str(error)) from None

    def is_argmax_invariant(self) -> bool:
        """It never changes a logit."""
        return True

    def apply(self, logits: Any) -> Any:
        """The logits as they are."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Note who came and who moved; a place that somebody left is not looked at."""
        if batch_update is None:
            return
        slots = self._server.slots
        for place, params, prompt, _ in batch_update.added:
            slots[0, place] = self._server.names.index(policy_of(params))
            slots[1, place] = len(prompt or ())
        for start, end, direction in batch_update.moved:
            if direction is MoveDirectionality.SWAP:
                slots[:, [start, end]] = slots[:, [end, start]]
            else:
                slots[:, end] = slots[:, start]
