# SPDX-License-Identifier: Apache-2.0
"""The small models: their configurations, their routers and what keeps these balanced, and measurements of both."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig, NemotronHConfig, OlmoeConfig, PreTrainedConfig

from texts import BOS_ID, EOS_ID, PAD_ID

PERCENTILES = (5, 25, 50, 75, 95)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How to configure one architecture and where its routers are.

    Attributes:
        config: from the arguments to its config.
        router_class: name of the module that scores the experts; it returns the [tokens, experts] logits first.
        sizes: defaults of the size options for it.
        facts: rows of the model card that only it has.
    """

    config: Callable[[argparse.Namespace], PreTrainedConfig]
    router_class: str
    sizes: dict[str, int]
    facts: Callable[[PreTrainedConfig], list[list[str]]] = lambda _config: []


def common_fields(args: argparse.Namespace) -> dict[str, Any]:
    """What every architecture's config calls by the same name."""
    return {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "max_position_embeddings": args.max_positions,
        "num_experts_per_tok": args.top_k,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }


def mixtral_config(args: argparse.Namespace) -> PreTrainedConfig:
    """A Mixtral of about seven million parameters at the default sizes."""
    return MixtralConfig(
        **common_fields(args),
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        head_dim=args.head_dim,
        num_local_experts=args.experts,
        router_aux_loss_coef=args.router_aux_loss_coef,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        sliding_window=None,
    )


def olmoe_config(args: argparse.Namespace) -> PreTrainedConfig:
    """An OLMoE of about five million parameters at the default sizes; its head size is hidden size / heads."""
    return OlmoeConfig(
        **common_fields(args),
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_experts=args.experts,
        router_aux_loss_coef=args.router_aux_loss_coef,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
    )


def nemotron_layers(layers: int) -> list[str]:
    """Mamba and experts in turn, as in Nemotron 3 Nano, with attention after every second Mamba layer."""
    kinds: list[str] = []
    while len(kinds) < layers:
        kinds += ["mamba", "moe", "mamba", "attention", "moe"]
    return kinds[:layers]


def nemotron_config(args: argparse.Namespace) -> PreTrainedConfig:
    """A Nemotron 3 of about six million parameters at the default sizes."""
    return NemotronHConfig(
        **common_fields(args),
        layers_block_type=nemotron_layers(args.layers),
        head_dim=args.head_dim,
        n_routed_experts=args.experts,
        moe_intermediate_size=args.intermediate_size,
        moe_shared_expert_intermediate_size=2 * args.intermediate_size,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        mamba_num_heads=8,
        mamba_head_dim=args.hidden_size // 4,
        ssm_state_size=32,
        n_groups=2,
        conv_kernel=4,
        chunk_size=32,
        tie_word_embeddings=False,
    )


def nemotron_facts(config: Any) -> list[list[str]]:
    """Its layers and the shapes of its Mamba-2 mixers."""
    names = {"linear_attention": "Mamba-2", "full_attention": "attention"}  # what transformers makes of the kinds
    kinds = [names.get(kind, kind) for kind in config.layers_block_type]
    return [
        ["layers by kind", ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))],
        [
            "Mamba-2 heads, head size, state size, groups",
            f"{config.mamba_num_heads}, {config.mamba_head_dim}, {config.ssm_state_size}, {config.n_groups}",
        ],
        ["width of the shared expert", str(config.moe_shared_expert_intermediate_size)],
    ]


# To add an architecture: a function from the arguments to its config, the name of its routers' class, its sizes.
ARCHITECTURES: dict[str, Architecture] = {
    "mixtral": Architecture(
        mixtral_config,
        "MixtralTopKRouter",
        dict(hidden_size=192, intermediate_size=224, layers=6, experts=8, top_k=2, heads=6, kv_heads=2, head_dim=32),
    ),
    "olmoe": Architecture(
        olmoe_config,
        "OlmoeTopKRouter",
        dict(hidden_size=160, intermediate_size=32, layers=4, experts=64, top_k=8, heads=5, kv_heads=5, head_dim=32),
    ),
    "nemotron_h": Architecture(
        nemotron_config,
        "NemotronHTopkRouter",
        dict(hidden_size=160, intermediate_size=72, layers=12, experts=32, top_k=6, heads=6, kv_heads=2, head_dim=32),
        nemotron_facts,
    ),
}
SIZE_HELP = {"intermediate_size": "width of one expert", "top_k": "experts that a token runs"}


def routers(model: nn.Module, architecture: Architecture) -> list[nn.Module]:
    """The model's routers, in layer order."""
    return [module for module in model.modules() if type(module).__name__ == architecture.router_class]


@contextmanager
def recorded_router_logits(model: nn.Module, architecture: Architecture) -> Iterator[list[Tensor]]:
    """Within the block, every forward pass appends each layer's router logits to the yielded list."""
    record: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        logits = output[0]
        record.append(logits.reshape(-1, logits.shape[-1]))

    handles = [router.register_forward_hook(hook) for router in routers(model, architecture)]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def mean_entropies(router_logits: list[Tensor]) -> list[float]:
    """Each layer's router entropy in nats, averaged over the tokens of one pass."""
    probabilities = [logits.detach().float().softmax(dim=-1) for logits in router_logits]
    return [round(float(torch.special.entr(p).sum(dim=-1).mean()), 3) for p in probabilities]


def choice(router: nn.Module, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The experts' scores, which sum to one for a token, and those that it runs ([tokens, top_k]).

    A router with a correction bias scores by a sigmoid and adds the bias for the choice alone.
    """
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is None:
        scores = logits.float().softmax(dim=-1)
        return scores, scores.topk(top_k, dim=-1).indices
    sigmoid = logits.float().sigmoid()
    return sigmoid / sigmoid.sum(dim=-1, keepdim=True), (sigmoid.detach() + bias).topk(top_k, dim=-1).indices


def expert_load(chosen: Tensor, experts: int) -> Tensor:
    """Each expert's share of the choices [tokens, top_k]."""
    return torch.bincount(chosen.flatten(), minlength=experts).float() / chosen.numel()


def load_balancing_loss(gates: list[nn.Module], router_logits: list[Tensor], top_k: int, bias_rate: float) -> Tensor:
    """Switch load-balancing loss (Fedus et al. 2021) of each layer, averaged; 1 when balanced.

    On the way the correction biases, where there are any, move by `bias_rate` towards the experts that were
    chosen too seldom (Wang et al. 2024, "Auxiliary-loss-free load balancing").
    """
    losses = []
    for gate, logits in zip(gates, router_logits, strict=True):
        scores, chosen = choice(gate, logits, top_k)
        experts = logits.shape[-1]
        load = expert_load(chosen, experts)
        losses.append(experts * torch.dot(load, scores.mean(dim=0)))
        bias: Any = getattr(gate, "e_score_correction_bias", None)
        if bias is not None:
            bias += bias_rate * torch.sign(1 / experts - load)
    return torch.stack(losses).mean()


def mean_loss(model: Any, windows: list[Tensor], batch: int = 16) -> float:
    """Mean cross-entropy in nats over every token after ``<s>`` of the windows."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(windows), batch):
        group = windows[start : start + batch]
        by_length: dict[int, list[Tensor]] = {}
        for window in group:
            by_length.setdefault(window.numel(), []).append(window)
        for same in by_length.values():
            ids = torch.stack(same)
            with torch.inference_mode():
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            target = ids[:, 1:].flatten()
            total += float(F.cross_entropy(logits.flatten(0, 1).float(), target, reduction="sum"))
            count += target.numel()
    model.train(was_training)
    return total / count


def router_statistics(
    model: Any, architecture: Architecture, windows: list[Tensor], top_k: int
) -> list[dict[str, Any]]:
    """For each layer: every expert's share of the top-k choices, and the spread of router entropy."""
    per_layer: list[list[Tensor]] = [[] for _ in routers(model, architecture)]
    with torch.inference_mode(), recorded_router_logits(model, architecture) as record:
        for window in windows:
            record.clear()
            model(input_ids=window[None, :-1], use_cache=False)
            for layer, logits in enumerate(record):
                per_layer[layer].append(logits.float())
    statistics = []
    for layer, (gate, pieces) in enumerate(zip(routers(model, architecture), per_layer, strict=True)):
        logits = torch.cat(pieces)
        probabilities = logits.softmax(dim=-1)
        entropy = torch.special.entr(probabilities).sum(dim=-1)
        load = expert_load(choice(gate, logits, top_k)[1], logits.shape[-1])
        quantiles = torch.quantile(entropy, torch.tensor(PERCENTILES, dtype=torch.float32) / 100)
        statistics.append(
            {
                "layer": layer,
                "expert_load": [round(value, 4) for value in load.tolist()],
                "entropy_mean": round(float(entropy.mean()), 4),
                "entropy_percentiles": {
                    f"p{percent}": round(value, 4)
                    for percent, value in zip(PERCENTILES, quantiles.tolist(), strict=True)
                },
                "top1_probability_mean": round(float(probabilities.amax(dim=-1).mean()), 4),
            }
        )
    return statistics
