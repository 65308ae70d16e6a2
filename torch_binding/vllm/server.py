# SPDX-License-Identifier: Apache-2.0
"""What the MoE layers of a vLLM engine and its requests share: the policies, and the row that each token follows."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from adaptive_k_moe.errors import PolicyError
from adaptive_k_moe.policy import PolicyTables, compile_policies
from adaptive_k_moe.vllm.configuration import PROCESSOR, VARIABLE, policy_names, server_policies

_ROWS = "adaptive_k_rows"


@dataclass(eq=False)
class Step:
    """What one forward did. T tokens in vLLM's order, E experts; a list has an entry for each MoE layer.

    Attributes:
        rows: [T] int32, the row of the tables that each token followed.
        k: [T] int32, experts run.
        entropy: [T] float32, of the router's softmax, in nats.
        reads: experts that were read.
    """

    rows: Any
    k: list[Any] = field(default_factory=list)
    entropy: list[Any] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)


class Server:
    """The policies of a vLLM engine, in its worker's process.

    Args:
        config: vLLM's.

    Attributes:
        policies: the policy file's.
        names: of all policies, in the order of the tables; `default` is the place of the default policy's.
        slots: [2, places] the policy's index and the prompt's length of the request in each place of vLLM's batch; None
            where requests have no policies of their own.
        steps: what the last forwards did, the newest last. It keeps none until it is given a length; then each forward
            waits for the device.

    Raises:
        PolicyError: there is no policy file, or it is wrong.
    """

    _all: WeakValueDictionary[str, Server] = WeakValueDictionary()

    def __init__(self, config: VllmConfig) -> None:
        self.policies = server_policies()
        self.names = policy_names(self.policies)
        self.default = self.names.index(self.policies.default)
        self.steps: deque[Step] = deque(maxlen=0)
        self.slots: Any = None
        if PROCESSOR in (config.model_config.logits_processors or ()):
            self.slots = torch.zeros((2, config.scheduler_config.max_num_seqs), dtype=torch.int64)
        self._layers: list[str] = config.compilation_config.static_all_moe_layers
        self._tables: PolicyTables | None = None
        self._most_tokens = config.scheduler_config.max_num_batched_tokens
        self._same: Any = None
        # What is compiled from these policies is not for others.
        config.additional_config[VARIABLE] = self.policies.to_json()

    @classmethod
    def of(cls, config: VllmConfig) -> Server:
        """The one of this engine."""
        server = cls._all.get(config.instance_id)
        if server is None:
            server = cls._all[config.instance_id] = cls(config)
        return server

    def compiled(self, num_experts: int, num_experts_per_tok: int) -> PolicyTables:
        """The tables, once all layers are made.

        Raises:
            PolicyError: the policies do not fit the model, or need what vLLM was not asked for.
        """
        if self._tables is None:
            sizes = {
                "num_experts": num_experts,
                "num_experts_per_tok": num_experts_per_tok,
                "num_moe_layers": len(self._layers),
            }
            tables = compile_policies(self.policies.for_model(**sizes), **sizes)
            if self.slots is None and tables.decode_row[tables.default] != tables.default:
                raise PolicyError(
                    f"the default policy {self.policies.default!r} has a rule for each phase, which takes the lengths "
                    f"of prompts: start vLLM with --logits-processors {PROCESSOR}."
                )
            self._decode_row = torch.tensor(tables.decode_row)
            self._tables = tables
        return self._tables

    def layer(self, name: str) -> int:
        """Its place among the MoE layers."""
        return self._layers.index(name)

    def rows(self, num_tokens: int, device: Any) -> Any:
        """[num_tokens] int32, the row that each token of this forward follows: one tensor for all layers."""
        context = get_forward_context()
        # vLLM's own runs, to warm up and to measure memory, have no requests.
        if self.slots is None or not context.attn_metadata:
            if self._same is None:
                self._same = torch.full((self._most_tokens,), self.default, dtype=torch.int32, device=device)
            return self._same[:num_tokens]
        rows = context.additional_kwargs.get(_ROWS)
        if rows is None:
            rows = context.additional_kwargs[_ROWS] = self._rows(context.attn_metadata, num_tokens)
        return rows

    def _rows(self, attention: Any, num_tokens: int) -> Any:
        begins, lengths = next(
            (layer.query_start_loc, layer.seq_lens)
            for layer in attention.values()
            if hasattr(layer, "query_start_loc") and hasattr(layer, "seq_lens")
        )
        device = begins.device
        token = torch.arange(num_tokens, dtype=begins.dtype, device=device)
        place = torch.searchsorted(begins[1:], token, right=True).clamp(max=len(lengths) - 1)
        position = token - begins[place + 1] + lengths[place]
        policy, prompt = self.slots.to(device)[:, place]
        return torch.where(position < prompt, policy, self._decode_row.to(device)[policy]).to(torch.int32)
