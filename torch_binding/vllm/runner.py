# SPDX-License-Identifier: Apache-2.0
"""The router of a MoE layer under policies: the layer's own rule at the k that each token's policy gives it.

vLLM's kernels take the same number of experts for each token. So a token that runs fewer names its first expert again,
with weight 0: that expert is read anyway. What is saved is reading; the product is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, direct_register_custom_op

from adaptive_k_moe.errors import BuildError
from adaptive_k_moe.torch import ops  # noqa: F401 (registers torch.ops.adaptive_k)
from adaptive_k_moe.vllm.server import Server, Step


class Router(BaseRouter):  # type: ignore[misc]
    """Chooses as the router that vLLM made, at another k.

    Args:
        server: the engine's.
        layer_name: vLLM's name of the layer.
        plain: the router that vLLM made.
        experts: the layer's, which know the router's rule.

    Raises:
        BuildError: the rule is none of ours.
    """

    def __init__(self, server: Server, layer_name: str, plain: Any, experts: Any) -> None:
        super().__init__(plain.top_k, plain.global_num_experts)
        self.server = server
        self.layer_name = layer_name
        self._routing_method_type = plain.routing_method_type
        self._bias = experts.e_score_correction_bias
        groups = (experts.num_expert_group, experts.topk_group) if experts.use_grouped_topk else (1, 1)
        self._attributes = {
            "scoring": experts.scoring_func,
            "norm_topk_prob": experts.renormalize,
            "routed_scaling_factor": float(experts.routed_scaling_factor),
            "n_group": groups[0],
            "topk_group": groups[1],
        }
        self._table: Any = None

    @property
    def routing_method_type(self) -> Any:
        """As vLLM names the rule."""
        return self._routing_method_type

    @torch.compiler.assume_constant_result  # type: ignore[misc]
    def width(self) -> int:
        """The most experts that a token of any request may run here."""
        server = self.server
        tables = server.compiled(self.global_num_experts, self.top_k)
        row = slice(None) if server.slots is not None else tables.default
        return int(tables.k_values[:, row].max())

    def _compute_routing(
        self, hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
    ) -> tuple[Any, Any]:
        del hidden_states, indices_type, input_ids
        name = _encode_layer_name(self.layer_name)
        weights, experts = torch.ops.vllm.adaptive_k_route(router_logits, name, self.width())
        return weights, experts

    def route(self, router_logits: Any, width: int) -> tuple[Any, Any]:
        """Weights and experts, [T, width] each."""
        server = self.server
        if self._table is None:
            tables, layer = server.compiled(self.global_num_experts, self.top_k), server.layer(self.layer_name)
            arrays = tables.policy_kind, tables.thresholds[layer], tables.k_values[layer], tables.expert_norms[layer]
            self._table = tuple(torch.from_numpy(array).to(router_logits.device) for array in arrays)
        rows = server.rows(len(router_logits), router_logits.device)
        kind, thresholds, k_values, norms = self._table
        k, entropy, experts, weights = torch.ops.adaptive_k.route(
            router_logits.float(),
            rows,
            kind,
            thresholds,
            k_values,
            self._bias,
            expert_norms=norms,
            max_k=width,
            **self._attributes,
        )
        # A token without any expert, as policies that share may have it, names one that another token reads.
        first = torch.where(experts[:, :1] < 0, experts.max().clamp(min=0), experts[:, :1])
        experts = torch.where(experts < 0, first, experts)
        if server.steps.maxlen != 0:
            self._record(rows, k, entropy, experts)
        return weights, experts

    def _record(self, rows: Any, k: Any, entropy: Any, experts: Any) -> None:
        steps = self.server.steps
        if self.server.layer(self.layer_name) == 0:
            steps.append(Step(rows))
        step = steps[-1]
        step.k.append(k)
        step.entropy.append(entropy)
        step.reads.append(len(experts.unique()))


class AdaptiveKRunner(MoERunner):  # type: ignore[misc]
    """vLLM's MoE layer with our router; everything else is vLLM's."""

    def __init__(
        self, layer_name: str, moe_config: Any, router: Any, routed_experts: Any, *rest: Any, **more: Any
    ) -> None:
        config = get_current_vllm_config()
        check(config, layer_name, router, routed_experts)
        router = Router(Server.of(config), layer_name, router, routed_experts)
        super().__init__(layer_name, moe_config, router, routed_experts, *rest, **more)


def check(config: VllmConfig, layer_name: str, router: Any, experts: Any) -> None:
    """Refuse what policies cannot be followed in.

    Raises:
        BuildError: which part, and what to do.
    """
    parallel = config.parallel_config
    grouped_without_bias = experts.use_grouped_topk and experts.e_score_correction_bias is None
    graphs = config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    refused = {
        f"{parallel.world_size_across_dp} processes: run one": parallel.world_size_across_dp > 1,
        "speculative decoding: run without it": config.speculative_config is not None,
        "expert load balancing: run without it": router.eplb_state is not None,
        f"a router of its own ({type(router).__name__})": experts.custom_routing_function is not None
        or getattr(router, "_hash_indices_table", None) is not None,
        f"a router that scores by {experts.scoring_func}": experts.scoring_func not in ("softmax", "sigmoid"),
        "groups of experts without a correction bias": grouped_without_bias and experts.num_expert_group > 1,
        "a kernel that routes itself: choose another with --moe-backend": experts.quant_method.is_monolithic,
        "requests with policies of their own in CUDA graphs: run with --enforce-eager": graphs
        and Server.of(config).slots is not None,
    }
    for what, is_so in refused.items():
        if is_so:
            raise BuildError(f"{layer_name}: policies of adaptive k do not go with {what}.")


def _route(router_logits: torch.Tensor, layer_name: LayerNameType, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    name = getattr(layer_name, "value", layer_name)
    router: Router = get_forward_context().no_compile_layers[name].router
    return router.route(router_logits, width)


def _route_shapes(
    router_logits: torch.Tensor, layer_name: LayerNameType, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    del layer_name
    shape = (router_logits.shape[0], width)
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int32)


def take_over() -> None:
    """Have vLLM make its MoE layers by `AdaptiveKRunner`; once more is nothing.

    Raises:
        BuildError: another plugin has them made by a class of its own.
    """
    found = op_registry_oot.get(MoERunner.__name__)
    if found is AdaptiveKRunner:
        return
    if found is not None:
        raise BuildError(
            f"vLLM's MoE layers are made by {found.__module__}.{found.__name__} of another plugin: leave one of the "
            "two out with VLLM_PLUGINS."
        )
    direct_register_custom_op("adaptive_k_route", _route, fake_impl=_route_shapes)
    MoERunner.register_oot(AdaptiveKRunner)
