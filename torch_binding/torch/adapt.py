# SPDX-License-Identifier: Apache-2.0
"""Puts the operator into a model of `transformers`, in place.

A MoE block of transformers 5 asks its router for logits, weights and indices, and its experts for the sum of their
outputs. Both get another `forward`: the router hands on its logits where the weights were, and the experts' is the
operator. Everything around them (shared experts, latent projections, device maps) is the model's own. What the router
and the experts of a family are is read off the model's configuration, as for an engine.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from adaptive_k_moe.engine_builder.checkpoint import HfConfig
from adaptive_k_moe.engine_builder.graph.moe_function import moe_attributes
from adaptive_k_moe.engine_builder.models import architecture_of
from adaptive_k_moe.engine_builder.models.decoder import expert_shapes
from adaptive_k_moe.errors import BuildError, DeviceError
from adaptive_k_moe.model_config import PretrainedConfig
from adaptive_k_moe.plugin.description import GATED_ACTIVATIONS
from adaptive_k_moe.policy import PolicySet, PolicyTables, compile_policies, parse_policy_set, read_policy_file
from adaptive_k_moe.torch.expert_parallel import ExpertShare, forward_name, held_range

_GATE = re.compile(r"(?:^|\.)layers\.(\d+)\.\w+\.gate$")


@dataclass(frozen=True, eq=False)
class Step:
    """What one forward of the model did. B sequences of S tokens, L MoE layers, E experts.

    Attributes:
        shape: B and S.
        layers: k [T], entropy [T] and expert_load [E] of each MoE layer, on its device.
    """

    shape: tuple[int, int]
    layers: tuple[tuple[Any, Any, Any], ...]

    @property
    def k(self) -> Any:
        """[B, S, L] int32, experts run."""
        return self._stacked(0).view(*self.shape, -1)

    @property
    def entropy(self) -> Any:
        """[B, S, L] float32, of the router's softmax, in nats."""
        return self._stacked(1).view(*self.shape, -1)

    @property
    def expert_load(self) -> Any:
        """[L, E] int32, tokens that ran each expert, whoever holds it."""
        return self._stacked(2).T

    @property
    def reads(self) -> Any:
        """[L] int64, experts that were read."""
        return (self.expert_load > 0).sum(dim=1)

    def _stacked(self, part: int) -> Any:
        device = self.layers[0][part].device
        return torch.stack([layer[part].to(device) for layer in self.layers], dim=1)


class Adapted:
    """A model whose experts are the operator. Leaving it as a context manager, or `remove`, puts the model back.

    Attributes:
        config: the model's sizes and rules.
        policies: the tables that its layers read.
        policy_index: the policy of the next forwards: its name, its index among `policies.names`, a tensor [B] of one
            index for each sequence or [B, S] of one for each token; None is the default policy.
        steps: what the last forwards did, the newest last.
        share: what this process holds of the experts; None is all.
    """

    def __init__(self, model: Any, policies: PolicySet, policy_index: Any, history: int | None, group: Any) -> None:
        self.config = _config_of(model)
        self.share = None if group is None else ExpertShare(group, self.config.num_experts)
        blocks = moe_blocks(model)
        if len(blocks) != self.config.num_moe_layers:
            raise BuildError(
                f"the model has {len(blocks)} blocks with a gate and experts, but its configuration tells of "
                f"{self.config.num_moe_layers}: it is not as transformers 5 builds it."
            )
        names = weight_names(self.config)
        for layer, block in enumerate(blocks):
            _check_weights(block, self.config, layer, self.share)
        self.set_policies(
            compile_policies(
                self.config.fit_policies(policies),
                num_experts=self.config.num_experts,
                num_experts_per_tok=self.config.num_experts_per_tok,
                num_moe_layers=self.config.num_moe_layers,
            )
        )
        self.policy_index = policy_index
        self.steps: deque[Step] = deque(maxlen=history)
        self._shape = (0, 0)
        self._rows: Any = None
        self._layers: list[tuple[Any, Any, Any]] = []
        if self.share is not None:
            for block in blocks:
                self.share.take(block.experts, names)
        decoder = model.base_model
        self._undo: list[Callable[[], None]] = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove,
            decoder.register_forward_hook(self._end).remove,
        ]
        for layer, block in enumerate(blocks):
            self._undo.append(_replace(block.gate, _router(block.gate)))
            self._undo.append(_replace(block.experts, self._experts(layer, block.experts, names)))

    def set_policies(self, tables: PolicyTables) -> None:
        """Follow these tables from the next forward on, in the default policy's row."""
        self.policies = tables
        self._by_phase = any(row != index for index, row in enumerate(tables.decode_row))
        self._decode_row = _Everywhere(tables.decode_row)
        self._kind = _Everywhere(tables.policy_kind)
        self._tables = [
            tuple(map(_Everywhere, layer))
            for layer in zip(tables.thresholds, tables.k_values, tables.expert_norms, strict=True)
        ]
        attributes = moe_attributes(
            self.config.moe, max_k=int(tables.k_values.max()), weight_format="", expert_norms=True
        )
        # Told by the call.
        del attributes["has_expert_norms"], attributes["first_expert"]
        self._attributes = attributes | {"norm_topk_prob": bool(attributes["norm_topk_prob"])}
        self.policy_index = None

    def remove(self) -> None:
        """Put the model back as it was; experts that other processes hold do not come back."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Adapted:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def policy_index(self) -> Any:
        """See the class."""
        return self._policy_index

    @policy_index.setter
    def policy_index(self, value: Any) -> None:
        if value is None or isinstance(value, str):
            value = self.policies.index(value)
        elif isinstance(value, int) and not 0 <= value < len(self.policies.names):
            raise IndexError(f"policy_index {value} is not one of the {len(self.policies.names)} policies")
        self._policy_index = value

    def check_agreement(self) -> None:
        """Compare the last forward of all processes that share out the experts. Every one of them has to call it.

        Raises:
            DeviceError: they ran other experts: their inputs, policies or devices differ, so their sums are worthless.
        """
        if self.share is None:
            return
        least = self.steps[-1].expert_load.contiguous()
        most = least.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.share.group)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.share.group)
        if not torch.equal(least, most):
            raise DeviceError(
                "the processes that share out the experts did not run the same ones: give all of them the same tokens "
                "and policies, and seed alike what draws them."
            )

    def _begin(self, _module: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """Every token's row, before the first layer."""
        given = (*arguments, keywords.get("input_ids"), keywords.get("inputs_embeds"))
        tokens = next(value for value in given if value is not None)
        batch, length = tokens.shape[:2]
        index = self._policy_index
        if isinstance(index, int):
            index = torch.full((batch,), index, device=tokens.device)
        # Rows by token say all.
        if self._by_phase and index.dim() == 1 and length == 1 and _past(keywords) > 0:
            index = self._decode_row.on(index.device)[index.long()]
        if index.dim() == 1:
            index = index[:, None].expand(batch, length)
        self._shape, self._layers = (batch, length), []
        self._rows = index.to(tokens.device, torch.int32).reshape(-1)

    def _end(self, *_: Any) -> None:
        self.steps.append(Step(self._shape, tuple(self._layers)))

    def _experts(self, layer: int, experts: Any, names: tuple[str, str]) -> Callable[..., Any]:
        up, down = names
        share = self.share
        first_expert = -1 if share is None else share.first

        def forward(hidden_states: Any, correction_bias: Any, router_logits: Any) -> Any:
            device = hidden_states.device
            thresholds, k_values, norms = (table.on(device) for table in self._tables[layer])
            output, *seen = torch.ops.adaptive_k.moe(
                hidden_states,
                router_logits,
                self._rows.to(device),
                self._kind.on(device),
                thresholds,
                k_values,
                getattr(experts, up),
                getattr(experts, down),
                correction_bias,
                expert_norms=norms,
                first_expert=first_expert,
                **self._attributes,
            )
            self._layers.append(tuple(seen))
            return output if share is None else share.add_up(output)

        return forward


def adapt(
    model: Any,
    policy: PolicySet | Mapping[str, Any] | str | Path | None = None,
    *,
    policy_index: Any = None,
    history: int | None = 1,
    expert_parallel_group: Any = None,
) -> Adapted:
    """Put the operator into a model of `transformers`, in place.

    Args:
        model: a Mixtral, Nemotron-H, Qwen2-MoE, Qwen3-MoE or OLMoE for causal language modelling, in float32, bfloat16
            or, on GPUs, float16.
        policy: a policy set, the content of a policy file, or its path; None is the trained top-k alone.
        policy_index: see `Adapted`.
        history: forwards that are kept in `Adapted.steps`; None is all.
        expert_parallel_group: a group of `torch.distributed` whose processes, with the same model and tokens, share out
            each layer's experts: others' are freed here, for good. None is no other process.

    Raises:
        BuildError: the model's experts are not laid out as transformers 5 has them, it is adapted already, or there are
            more processes than experts.
        CheckpointError: the architecture, or something in the configuration, is not known.
        PolicyError: a policy does not fit the model, or there is none of that name.
    """
    match policy:
        case None:
            policies = PolicySet()
        case PolicySet():
            policies = policy
        case str() | Path():
            policies = read_policy_file(policy)
        case _:
            policies = parse_policy_set(dict(policy), "the policy")
    return Adapted(model, policies, policy_index, history, expert_parallel_group)


class _Everywhere:
    """A tensor that is copied to a device once, so that later steps can be captured in a CUDA graph."""

    def __init__(self, values: Any) -> None:
        self._host = torch.as_tensor(values)
        self._copies: dict[Any, Any] = {}

    def on(self, device: Any) -> Any:
        """The copy there."""
        if device not in self._copies:
            self._copies[device] = self._host.to(device)
        return self._copies[device]


def moe_blocks(model: Any) -> list[Any]:
    """The modules with a router, `gate`, of one weight row an expert, and `experts`, in the order of the layers.

    They are named `model.layers.N.mlp` (Mixtral, Qwen-MoE, OLMoE) or `backbone.layers.N.mixer` (Nemotron 3), with
    `model.` or `block_sparse_moe` in other versions.
    """
    found = []
    for name, module in model.named_modules():
        match = _GATE.search(name)
        weight = getattr(module, "weight", None)
        # A shared expert's gate is a single row, and a gated MLP's gate is no [E, hidden] router beside experts.
        block = model.get_submodule(name.rpartition(".")[0])
        if match and weight is not None and weight.dim() == 2 and hasattr(block, "experts"):
            found.append((int(match.group(1)), block))
    return [block for _, block in sorted(found, key=lambda item: item[0])]


def _config_of(model: Any) -> PretrainedConfig:
    content = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config = HfConfig(content, Path(model.name_or_path or "the model's configuration"))
    return architecture_of(config).read_config(config, "float32")


def weight_names(config: PretrainedConfig) -> tuple[str, str]:
    """Names of the experts' two weights."""
    return "gate_up_proj" if config.moe.activation in GATED_ACTIVATIONS else "up_proj", "down_proj"


def _check_weights(block: Any, config: PretrainedConfig, layer: int, share: ExpertShare | None) -> None:
    """Refuses experts' weights that are not what the operator reads, or that cannot be divided."""
    held = held_range(block.experts)
    if held is not None and (share is None or held != (share.first, share.end)):
        raise BuildError(
            f"MoE layer {layer}: this process holds the experts {held[0]} to {held[1] - 1} alone: give the "
            "expert_parallel_group that the model was divided for."
        )
    experts = config.num_experts if held is None else held[1] - held[0]
    for name, (_, *shape) in zip(weight_names(config), expert_shapes(config), strict=True):
        weight = getattr(block.experts, name, None)
        if weight is None or tuple(weight.shape) != (experts, *shape):
            raise BuildError(
                f"MoE layer {layer}: experts.{name} is {'missing' if weight is None else tuple(weight.shape)} but must "
                f"be {(experts, *shape)}, all experts in one weight: load the model with transformers 5."
            )
        if share is not None and weight.is_meta:
            raise BuildError(
                f"MoE layer {layer}: experts.{name} is offloaded, and expert parallel divides weights in memory: load "
                "the model with no device map, or with load_expert_parallel."
            )
    if held is None and "forward" in vars(block.experts) and not hasattr(block.experts, "_hf_hook"):
        raise BuildError(f"MoE layer {layer}: the experts' forward is replaced already: remove what did so first.")


def _router(gate: Any) -> Callable[..., Any]:
    def forward(hidden_states: Any) -> tuple[Any, Any, Any]:
        # The router decides everything, so it is computed in float32 whatever the model's type is, as in an engine.
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1]).float()
        logits = torch.nn.functional.linear(hidden, gate.weight.float())
        return logits, logits, getattr(gate, "e_score_correction_bias", None)

    return forward


def _replace(module: Any, forward: Callable[..., Any]) -> Callable[[], None]:
    """Gives a module another forward; what is returned takes it back."""
    name = forward_name(module)
    before = vars(module).get(name)
    setattr(module, name, forward)

    def undo() -> None:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)

    return undo


def _past(keywords: Mapping[str, Any]) -> int:
    cache = keywords.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())
