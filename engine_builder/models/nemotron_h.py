# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H and Nemotron 3: every layer is one mixer behind a norm: Mamba-2, experts, attention or an MLP.

Attention has no rotary embedding: the Mamba layers know the order of the tokens. Names of weights in the
graph are those of the hub's checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from adaptive_k_moe.engine_builder.checkpoint import CheckpointTensors, HfConfig
from adaptive_k_moe.engine_builder.graph import DOMAIN, GraphBuilder, make_mamba_function
from adaptive_k_moe.engine_builder.graph.mamba_function import OP_TYPE, mamba_attributes
from adaptive_k_moe.engine_builder.models.decoder import Array, Decoder, Progress, expert_shapes
from adaptive_k_moe.engine_config import BuildConfig
from adaptive_k_moe.model_config import (
    AttentionConfig,
    Dtype,
    MambaConfig,
    MlpConfig,
    MoeConfig,
    PretrainedConfig,
    SharedExpertConfig,
)
from adaptive_k_moe.policy import MAX_K

# A layer's kind in `layers_block_type`, older spellings included, and in `hybrid_override_pattern`.
_KINDS = {
    "linear_attention": "mamba",
    "mamba": "mamba",
    "M": "mamba",
    "moe": "moe",
    "E": "moe",
    "full_attention": "attention",
    "attention": "attention",
    "*": "attention",
    "mlp": "mlp",
    "-": "mlp",
}

# `mlp_hidden_act` to the operator's activation; none of them has a gate.
_ACTIVATIONS = {
    "relu2": "relu2",
    "relu": "relu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Fields of older configs by other names, which would be overlooked.
_OLD_NAMES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_limit": "time_step_limit",
    "mamba_conv_bias": "use_conv_bias",
}


class NemotronH(Decoder):
    """``NemotronHForCausalLM``."""

    defaults = {
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
    }
    understands = frozenset(
        {
            "mlp_bias",
            "n_group",
            "n_shared_experts",
            "norm_topk_prob",
            "routed_scaling_factor",
            "topk_group",
        }
    )
    ignored_tensors = (r"mtp\..*",)  # the layers of multi-token prediction
    embedding_name = "backbone.embeddings.weight"
    norm_name = "backbone.norm_f.weight"

    def __init__(
        self, model: PretrainedConfig, build: BuildConfig, tensors: CheckpointTensors, graph: GraphBuilder
    ) -> None:
        super().__init__(model, build, tensors, graph)
        # transformers 5 saves the hub's "backbone" as "model" unless told to keep the original format.
        self._own_layout = self.embedding_name not in tensors and "model.embeddings.weight" in tensors

    # The config. ---------------------------------------------------------------------------------

    @classmethod
    def read_config(cls, config: HfConfig, dtype: Dtype) -> PretrainedConfig:
        """See `Decoder.read_config`."""
        cls._refuse_unknown(config)
        for old, name in _OLD_NAMES.items():
            if config.optional(old, object) is not None:
                raise config.error(old, config.optional(old, object), f"the field {name} in its place")
        config.require("mamba_hidden_act", "silu", default="silu")
        config.require("mamba_proj_bias", False, default=False)
        config.require("tie_word_embeddings", False, default=False)
        config.require("n_shared_experts", 1, default=1)
        cls._check_time_step_limit(config)
        kinds = cls._read_kinds(config)
        layers: dict[str, list[int]] = {kind: [] for kind in _KINDS.values()}
        for layer, kind in enumerate(kinds):
            layers[kind].append(layer)
        heads = cls._positive(config, "num_attention_heads")
        kv_heads = config.positive("num_key_value_heads", cls.defaults["num_key_value_heads"])
        if heads % kv_heads:
            raise config.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
        act = config.get("mlp_hidden_act", str, "relu2")
        if act not in _ACTIVATIONS:
            raise config.error("mlp_hidden_act", act, f"one of {sorted(_ACTIVATIONS)}")
        bias = config.get("mlp_bias", bool, False)
        eps = config.get("layer_norm_epsilon", float, 1e-5)
        if not 0 <= eps < 1:
            raise config.error("layer_norm_epsilon", eps, "a small number")
        mlp_size = cls._positive(config, "intermediate_size")
        return PretrainedConfig(
            architecture=config.architecture,
            dtype=dtype,
            vocab_size=cls._positive(config, "vocab_size"),
            hidden_size=cls._positive(config, "hidden_size"),
            num_hidden_layers=len(kinds),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=cls._positive(config, "head_dim"),
            max_position_embeddings=cls._positive(config, "max_position_embeddings"),
            rms_norm_eps=eps,
            attention=AttentionConfig(layers=layers["attention"]),
            mamba=cls._read_mamba(config, layers["mamba"]) if layers["mamba"] else None,
            dense_mlp=MlpConfig(intermediate_size=mlp_size, activation=_ACTIVATIONS[act], bias=bias)
            if layers["mlp"]
            else None,
            moe=cls._read_experts(config, layers["moe"], _ACTIVATIONS[act], bias=bias),
            bos_token_id=config.token_id("bos_token_id"),
            eos_token_ids=config.token_ids("eos_token_id"),
            pad_token_id=config.token_id("pad_token_id"),
        )

    @classmethod
    def _read_kinds(cls, config: HfConfig) -> list[str]:
        """What each layer is, from whichever of the two fields is there."""
        found: dict[str, list[str]] = {}
        for field, kind in (("layers_block_type", list), ("layer_types", list), ("hybrid_override_pattern", str)):
            value: Any = config.optional(field, kind)
            if value is None:
                continue
            for entry in value:
                # A pattern's letter is no name of a kind, nor the other way round.
                if not isinstance(entry, str) or entry not in _KINDS or (len(entry) == 1) != (kind is str):
                    known = [name for name in _KINDS if (len(name) == 1) == (kind is str)]
                    raise config.error(field, entry, f"layers that are each one of {known}")
            found[field] = [_KINDS[entry] for entry in value]
        if not found:
            raise config.error("layers_block_type", None, "a list of each layer's kind (it is missing)")
        field, kinds = next(iter(found.items()))
        for other, others in found.items():
            if others != kinds:
                raise config.error(other, config.optional(other, object), f"the layers that {field} names")
        count = config.optional("num_hidden_layers", int)
        if count is not None and count != len(kinds):
            raise config.error("num_hidden_layers", count, f"{len(kinds)}, as many layers as {field} has")
        if "moe" not in kinds:
            raise config.error(field, config.optional(field, object), "at least one layer with experts")
        return kinds

    @classmethod
    def _check_time_step_limit(cls, config: HfConfig) -> None:
        """The field has no effect in `transformers`, so that a limit in it would silently be another model."""
        limit = config.optional("time_step_limit", list)
        unlimited = (float("inf"), {"__float__": "Infinity"}, None)
        if limit is not None and not (len(limit) == 2 and limit[0] == 0 and limit[1] in unlimited):
            raise config.error("time_step_limit", limit, "[0, Infinity]: limits are those of time_step_min")

    @classmethod
    def _read_mamba(cls, config: HfConfig, layers: list[int]) -> MambaConfig:
        heads, groups = cls._positive(config, "mamba_num_heads"), cls._positive(config, "n_groups")
        if heads % groups:
            raise config.error("n_groups", groups, f"a divisor of mamba_num_heads ({heads})")
        taps = cls._positive(config, "conv_kernel")
        if not 2 <= taps <= 16:
            raise config.error("conv_kernel", taps, "2 to 16")
        dt_min = config.get("time_step_min", float, 0.001)
        if not 0 <= dt_min < float("inf"):
            raise config.error("time_step_min", dt_min, "a time of at least 0")
        return MambaConfig(
            num_heads=heads,
            head_dim=cls._positive(config, "mamba_head_dim"),
            state_size=cls._positive(config, "ssm_state_size"),
            n_groups=groups,
            conv_kernel=taps,
            conv_bias=config.get("use_conv_bias", bool, True),
            projection_bias=config.get("use_bias", bool, False),
            dt_min=dt_min,
            layers=layers,
        )

    @classmethod
    def _read_experts(cls, config: HfConfig, layers: list[int], activation: str, *, bias: bool) -> MoeConfig:
        field = "n_routed_experts" if config.optional("num_local_experts", int) is None else "num_local_experts"
        experts = config.positive(field, cls.defaults["n_routed_experts"])
        groups, chosen = config.positive("n_group", 1), config.positive("topk_group", 1)
        if experts % groups or (groups > 1 and experts // groups < 2):
            raise config.error("n_group", groups, f"a divisor of {field} ({experts}) that leaves 2 in each group")
        if chosen > groups:
            raise config.error("topk_group", chosen, f"at most n_group ({groups})")
        top_k, most = cls._positive(config, "num_experts_per_tok"), experts // groups * chosen
        if top_k > min(most, MAX_K):
            raise config.error("num_experts_per_tok", top_k, f"at most {min(most, MAX_K)}")
        scale = config.get("routed_scaling_factor", float, 1.0)
        if not 0 < scale < float("inf"):
            raise config.error("routed_scaling_factor", scale, "a number above 0")
        shared = cls._positive(config, "moe_shared_expert_intermediate_size")
        return MoeConfig(
            num_experts=experts,
            num_experts_per_tok=top_k,
            intermediate_size=cls._positive(config, "moe_intermediate_size"),
            activation=activation,
            scoring="sigmoid",
            norm_topk_prob=config.get("norm_topk_prob", bool, True),
            routed_scaling_factor=scale,
            n_group=groups,
            topk_group=chosen,
            correction_bias=True,
            latent_size=None if config.optional("moe_latent_size", int) is None else config.positive("moe_latent_size"),
            shared_expert=SharedExpertConfig(intermediate_size=shared, activation=activation, bias=bias),
            layers=layers,
        )

    # The graph. ----------------------------------------------------------------------------------

    def build(self, progress: Progress) -> None:
        """See `Decoder.build`."""
        if self.model.mamba is not None:
            self.graph.input("past_lens", "int32", ["num_sequences"])
            self.graph.input("subsequence_begins", "int32", ["num_begins"])
            self.graph.input("state_slots", "int32", ["num_sequences"])
            self.graph.function(make_mamba_function(self.model.mamba))
        super().build(progress)

    def make_layer(self, layer: int, hidden: str) -> str:
        """A norm, the layer's mixer and the residual sum."""
        m, prefix = self.model, f"backbone.layers.{layer}"
        normed = self.make_norm(f"{prefix}.norm", hidden)
        if layer in m.moe.layers:
            mixed = self.make_moe(layer, normed)
        elif layer in m.attention_layers:
            mixed = self.make_attention(layer, normed)
        elif m.mamba is not None and layer in m.mamba.layers:
            mixed = self.make_mamba(layer, normed, m.mamba)
        else:
            assert m.dense_mlp is not None  # set when the config was read, if any layer is of this kind
            mixed = self.make_mlp(f"{prefix}.mixer", normed, m.dense_mlp)
        return self.add(f"{prefix}.sum", hidden, mixed)

    def attention_name(self, layer: int) -> str:
        """See `Decoder.attention_name`."""
        return f"backbone.layers.{layer}.mixer"

    def make_mamba(self, layer: int, hidden: str, mamba: MambaConfig) -> str:
        """A Mamba-2 mixer: projection, `Mamba2` over packed tokens, gated norm, projection: [B, S, H]."""
        g, m = self.graph, self.model
        name, inner, bias = f"backbone.layers.{layer}.mixer", mamba.intermediate_size, mamba.projection_bias
        sizes = [inner, mamba.conv_dim, mamba.num_heads]
        tokens = g.node("Reshape", [hidden, g.constant([-1, m.hidden_size])], f"{name}.tokens")
        projected = self.linear(f"{name}.in_proj", tokens, m.hidden_size, sum(sizes), bias=bias)
        parts = [f"{name}.{part}" for part in ("gate", "conv_input", "dt")]
        gate, conv_input, dt = g.nodes("Split", [projected, g.constant(sizes)], parts, axis=1)

        heads = (mamba.num_heads,)
        decay_log = self.tensors.read(self.in_checkpoint(f"{name}.A_log"), heads)
        inputs = [
            *(conv_input, dt, "subsequence_begins", "past_lens", "state_slots"),
            *self._convolution(name, mamba),
            g.weight(f"{name}.A", "float32", heads, [-np.exp(decay_log.astype(np.float32))]),
            self.stored(f"{name}.D", heads, dtype="float32"),
            self.stored(f"{name}.dt_bias", heads, dtype="float32"),
        ]
        outputs = [f"{name}.scanned"]
        for state, shape in (("conv_state", mamba.conv_state_shape), ("ssm_state", mamba.ssm_state_shape)):
            inputs.append(g.input(f"{state}.{layer}", "float32", ["num_slots", *shape]))
            outputs.append(f"present_{state}.{layer}")
            g.output(outputs[-1], "float32", ["num_slots", *shape])
        g.nodes(OP_TYPE, inputs, outputs, domain=DOMAIN, **mamba_attributes(mamba))
        normed = self.make_gated_norm(f"{name}.norm", outputs[0], gate, mamba)
        output = self.linear(f"{name}.out_proj", normed, inner, m.hidden_size, bias=bias)
        return g.node("Reshape", [output, g.node("Shape", [hidden], f"{name}.shape")], f"{name}.out")

    def _convolution(self, name: str, mamba: MambaConfig) -> list[str]:
        """The convolution's weight, [K, channels], and its bias, which is zeros where the model has none."""
        g, taps, channels = self.graph, mamba.conv_kernel, mamba.conv_dim
        weight = self.tensors.read(self.in_checkpoint(f"{name}.conv1d.weight"), (channels, 1, taps))
        stored = g.weight(f"{name}.conv1d.weight", "float32", (taps, channels), [weight[:, 0].T])
        if mamba.conv_bias:
            return [stored, self.stored(f"{name}.conv1d.bias", (channels,), dtype="float32")]
        return [stored, g.weight(f"{name}.conv1d.bias", "float32", (channels,), [np.zeros(channels, np.float32)])]

    def make_gated_norm(self, name: str, hidden: str, gate: str, mamba: MambaConfig) -> str:
        """RMS norm, over each group of channels, of the scan's output times the gate's silu: [T, heads * head_dim]."""
        g, width, groups = self.graph, mamba.intermediate_size, mamba.n_groups
        opened = g.node("Mul", [gate, g.node("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
        gated = g.node("Mul", [hidden, opened], f"{name}.gated")
        split = g.node("Reshape", [gated, g.constant([-1, groups, width // groups])], f"{name}.groups")
        ones = self._ones(width // groups)
        normed = g.node("RMSNormalization", [split, ones], f"{name}.normed", axis=-1, epsilon=self.model.rms_norm_eps)
        joined = g.node("Reshape", [normed, g.constant([-1, width])], f"{name}.joined")
        weight = self.stored(f"{name}.weight", (width,), dtype="float32")
        return g.node("Mul", [joined, weight], f"{name}.out")

    def _ones(self, size: int) -> str:
        """The weight of a norm that has none; the layers share it."""
        if "ones" not in self._shared:
            self._shared["ones"] = self.graph.weight("ones", "float32", (size,), [np.ones(size, np.float32)])
        return self._shared["ones"]

    def make_moe(self, layer: int, hidden: str) -> str:
        """See `Decoder.make_moe`: the router and the shared expert see the hidden states, the experts the latent."""
        g, m, moe = self.graph, self.model, self.model.moe
        name = f"backbone.layers.{layer}.mixer"
        tokens = g.node("Reshape", [hidden, g.constant([-1, m.hidden_size])], f"{name}.tokens")
        logits = self.linear(
            f"{name}.gate", tokens, m.hidden_size, moe.num_experts, dtype="float32", output=f"{name}.router_logits"
        )
        up_shape, down_shape = expert_shapes(m)
        up = self.expert_weight(f"{name}.experts.up", up_shape, self._experts(name, "up_proj", up_shape))
        down = self.expert_weight(f"{name}.experts.down", down_shape, self._experts(name, "down_proj", down_shape))
        correction = self.stored(f"{name}.gate.e_score_correction_bias", (moe.num_experts,), dtype="float32")
        assert moe.shared_expert is not None  # the architecture has one always
        bias, states = moe.shared_expert.bias, tokens
        if moe.latent_size is not None:
            states = self.linear(f"{name}.fc1_latent_proj", tokens, m.hidden_size, moe.latent_size, bias=bias)
        output = self.make_experts(layer, states, logits, up, down, correction)
        if moe.latent_size is not None:
            output = self.linear(f"{name}.fc2_latent_proj", output, moe.latent_size, m.hidden_size, bias=bias)
        shared = self.make_mlp(f"{name}.shared_experts", tokens, moe.shared_expert)
        output = self.add(f"{name}.with_shared", output, shared)
        return g.node("Reshape", [output, g.node("Shape", [hidden], f"{name}.shape")], f"{name}.out")

    def _experts(self, name: str, projection: str, shape: tuple[int, int, int]) -> Iterator[Array]:
        """Pieces of one of the experts' weights, in order: from one fused tensor, or one an expert."""
        fused = self.in_checkpoint(f"{name}.experts.{projection}")
        if fused in self.tensors:
            yield from self.tensors.rows(fused, shape)
            return
        for expert in range(shape[0]):
            yield self.tensors.read(self.in_checkpoint(f"{name}.experts.{expert}.{projection}.weight"), shape[1:])

    def make_mlp(self, name: str, hidden: str, mlp: MlpConfig) -> str:
        """``down(act(up(x)))`` over the last dimension."""
        g, size = self.graph, self.model.hidden_size
        up = self.linear(f"{name}.up_proj", hidden, size, mlp.intermediate_size, bias=mlp.bias)
        match mlp.activation:
            case "relu2":
                positive = g.node("Relu", [up], f"{name}.relu")
                active = g.node("Mul", [positive, positive], f"{name}.act")
            case "relu":
                active = g.node("Relu", [up], f"{name}.act")
            case "silu":
                active = g.node("Mul", [up, g.node("Sigmoid", [up], f"{name}.sigmoid")], f"{name}.act")
            case "gelu":
                active = g.node("Gelu", [up], f"{name}.act")
            case "gelu_tanh":
                active = g.node("Gelu", [up], f"{name}.act", approximate="tanh")
            case _:
                raise AssertionError(f"activation {mlp.activation}")
        return self.linear(f"{name}.down_proj", active, mlp.intermediate_size, size, bias=mlp.bias)

    def in_checkpoint(self, name: str) -> str:
        """See `Decoder.in_checkpoint`."""
        return f"model.{name.removeprefix('backbone.')}" if self._own_layout and name.startswith("backbone.") else name
