# SPDX-License-Identifier: Apache-2.0
r"""Mixtral for TensorRT-LLM 1.2 whose experts are the operator `AdaptiveKMoe`, in place of its own plugin.

    adaptive-k convert --checkpoint_dir CHECKPOINT --output_dir ckpt --policy POLICY.json
    trtllm-build --checkpoint_dir ckpt --output_dir engine \
        --model_cls_file model.py --model_cls_name AdaptiveKMixtral

`trtllm-build` loads this file by its path, so it needs TensorRT-LLM and nothing of ours but the plugin's library, which
ADAPTIVE_K_TENSORRT_LIBRARY names. Only attention, norms and the head stay TensorRT-LLM's. Its runtime passes an engine
no inputs of ours, so the policy that `convert` wrote to ``config.json`` becomes constants.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorrt as trt
import torch
from tensorrt_llm._common import default_net, default_trtnet
from tensorrt_llm.functional import Tensor, _create_tensor, cast, concat, constant, expand, shape
from tensorrt_llm.layers import MOE
from tensorrt_llm.models.llama.model import LLaMAForCausalLM

PLUGIN_VARIABLE = "ADAPTIVE_K_TENSORRT_LIBRARY"


def operator_fields(activation: str, policy: dict[str, Any]) -> dict[str, Any]:
    """The operator's fields for a Mixtral: text, or whole numbers."""
    return {
        "activation": activation,
        "scoring": "softmax",
        "norm_topk_prob": 1,
        "max_k": max(max(row) for row in policy["k_values"]),
        "has_expert_norms": 1,
    }


def policy_tables(policy: dict[str, Any], layer: int) -> list[npt.NDArray[Any]]:
    """A layer's tables of one policy: its kind [1], thresholds [1, C - 1], experts by choice [1, C], norms [E]."""
    return [
        np.array([policy["policy_kind"]], np.int32),
        np.array([policy["thresholds"][layer]], np.float32),
        np.array([policy["k_values"][layer]], np.int32),
        np.array(policy["expert_norms"][layer], np.float32),
    ]


def gate_first(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts' up-projections as the operator takes them: TensorRT-LLM has the gate's rows below the others."""
    return {
        name: torch.cat(weight.chunk(2, dim=1)[::-1], dim=1) if name.endswith(".mlp.fc.weight") else weight
        for name, weight in weights.items()
    }


def plugin_creator() -> Any:
    """The operator's creator; loads the plugin's library if the registry does not know it yet."""
    registry = trt.get_plugin_registry()
    key = ("AdaptiveKMoe", "1", "adaptive_k")
    if registry.get_creator(*key) is None:
        library = os.environ.get(PLUGIN_VARIABLE)
        if not library or registry.load_library(library) is None:
            raise RuntimeError(f"cannot load the plugin {library!r}: name its library in {PLUGIN_VARIABLE}.")
    return registry.get_creator(*key)


class AdaptiveKExperts(MOE):  # type: ignore[misc]
    """TensorRT-LLM's MoE layer, with its parameters and their names, computed by `AdaptiveKMoe`.

    Args:
        policy: the policy of ``config.json``.
        layer: index of the MoE layer, by which the policy may differ.
        options: of TensorRT-LLM's layer.
    """

    def __init__(self, policy: dict[str, Any], layer: int, **options: Any) -> None:
        super().__init__(**options)
        self.policy = policy
        self.layer = layer

    def forward(
        self,
        hidden_states: Tensor,
        lora_layer_params: Any = None,
        all_reduce_params: Any = None,
        last_local_layer_residual: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """As TensorRT-LLM's; [T, H], the tokens of all sequences packed."""
        del others  # side streams and a routing from outside, which are for other models
        if not default_net().plugin_config.remove_input_padding:
            raise RuntimeError("AdaptiveKMoe takes packed tokens: build with --remove_input_padding enable.")
        if lora_layer_params is not None:
            raise RuntimeError("AdaptiveKMoe has no LoRA.")
        routing = self.router(cast(hidden_states, trt.float32), None)
        kind, thresholds, k_values, norms = (constant(table) for table in policy_tables(self.policy, self.layer))
        index = expand(constant(np.zeros(1, np.int32)), concat([shape(hidden_states, 0)]))
        weights = [self.fc.weight.value, self.proj.weight.value]
        inputs = [hidden_states, routing, index, kind, thresholds, k_values, *weights, norms]
        kept = []  # a field does not hold its values
        fields = []
        for name, value in operator_fields(self.hidden_act, self.policy).items():
            if isinstance(value, str):
                kept.append(np.frombuffer(value.encode(), np.int8))
                fields.append(trt.PluginField(name, kept[-1], trt.PluginFieldType.CHAR))
            else:
                kept.append(np.array([value], np.int32))
                fields.append(trt.PluginField(name, kept[-1], trt.PluginFieldType.INT32))
        plugin = plugin_creator().create_plugin(
            f"adaptive_k_moe.{self.layer}", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD
        )
        if plugin is None:
            raise RuntimeError("the plugin AdaptiveKMoe refuses its fields; TensorRT's log says which.")
        layer = default_trtnet().add_plugin_v3([tensor.trt_tensor for tensor in inputs], [], plugin)
        output = _create_tensor(layer.get_output(0), layer)
        # Each rank has a slice of every expert, so the ranks' outputs are parts of a sum.
        return self.forward_allreduce(output, all_reduce_params, last_local_layer_residual)


class AdaptiveKMixtral(LLaMAForCausalLM):  # type: ignore[misc]
    """`MixtralForCausalLM`, which in TensorRT-LLM is a Llama with experts, with ours in their place."""

    def __init__(self, config: Any) -> None:
        policy = getattr(config, "adaptive_k", None)
        if policy is None:
            raise RuntimeError("the checkpoint's config.json has no adaptive_k: write it with `adaptive-k convert`.")
        if config.quantization.quant_algo is not None:
            raise RuntimeError(
                "AdaptiveKMixtral takes unquantised checkpoints alone: convert without --use_weight_only."
            )
        if config.mapping.has_moe_ep():
            raise RuntimeError("AdaptiveKMixtral has no expert parallelism: convert with --tp_size alone.")
        super().__init__(config)
        first = config.mapping.pp_layers(config.num_hidden_layers)[0]
        for number, layer in enumerate(self.transformer.layers):
            layer.mlp = AdaptiveKExperts(
                policy,
                first + number,
                moe_config=config.moe,
                hidden_size=config.hidden_size,
                ffn_hidden_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                mapping=config.mapping,
                bias=config.mlp_bias,
                dtype=config.dtype,
                tp_group=config.mapping.tp_group,
                tp_size=config.mapping.tp_size,
                quant_mode=config.quant_mode,
            )

    def load(self, weights: dict[str, torch.Tensor], from_pruned: bool = False) -> None:
        """As TensorRT-LLM's, with the experts' rows in the operator's order."""
        super().load(gate_first(weights), from_pruned)
