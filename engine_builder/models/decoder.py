# SPDX-License-Identifier: Apache-2.0
"""What every decoder with experts shares: its config, and the graph of a pre-norm transformer, layer by layer.

Shapes in comments: B batch, S new tokens, T = B * S, H hidden size, D head dim, E experts, L MoE
layers, N logits rows, P policies, C choices, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, ClassVar

import numpy.typing as npt

from adaptive_k_moe.engine_builder.checkpoint import CheckpointTensors, HfConfig
from adaptive_k_moe.engine_builder.graph import DOMAIN, GraphBuilder, make_moe_function
from adaptive_k_moe.engine_builder.graph.moe_function import OP_TYPE, moe_attributes
from adaptive_k_moe.engine_builder.models.expert_tensors import ExpertTensors
from adaptive_k_moe.engine_builder.models.rope import rope_tables
from adaptive_k_moe.engine_config import BuildConfig
from adaptive_k_moe.model_config import (
    AttentionConfig,
    Dtype,
    MlpConfig,
    MoeConfig,
    PretrainedConfig,
    QuantizationConfig,
    RopeConfig,
    SharedExpertConfig,
)
from adaptive_k_moe.plugin.description import GATED_ACTIVATIONS
from adaptive_k_moe.policy import MAX_K

Array = npt.NDArray[Any]
Progress = Callable[[str], None]


# Hugging Face's activation of a gated MLP's gate, to the operator's activation of the pair.
_GATED_ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu"}

# Fields by which some architectures change the numbers, with the value that changes nothing. One that an
# architecture does not understand must be absent, null or that value.
_NEUTRAL: dict[str, Any] = {
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "clip_qkv": None,
    "decoder_sparse_step": 1,
    "final_logit_softcapping": None,
    "first_k_dense_replace": 0,
    "mlp_bias": False,
    "mlp_only_layers": [],
    "n_group": 1,
    "n_shared_experts": 0,
    "norm_topk_prob": True,
    "qkv_bias": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "shared_expert_intermediate_size": 0,
    "sliding_window": None,
    "topk_group": 1,
    "use_sliding_window": False,
}


class Decoder:
    """A decoder-only model whose MLPs are mixtures of experts.

    A subclass says how its architecture differs: data in the class variables, rules in the ``read_`` and
    ``make_`` methods. Names of weights in the graph are those of the checkpoint.

    Args:
        model: the model's sizes and rules.
        build: the engine's sizes.
        tensors: the checkpoint's weights.
        graph: where nodes and weights go.
    """

    defaults: ClassVar[Mapping[str, Any]]
    """What the architecture's config class in `transformers` assumes where ``config.json`` is silent."""

    understands: ClassVar[frozenset[str]] = frozenset()
    """The fields of `_NEUTRAL` that the architecture has."""

    expert_size_field: ClassVar[str] = "intermediate_size"
    """The field with an expert's intermediate size."""

    hub_moe: ClassVar[str] = "mlp"
    """The MoE block's name in the hub's checkpoints; transformers 5 calls every one "mlp" in its own."""

    hub_expert: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    """An expert's gate, up and down projections in the hub's checkpoints, which keep a tensor for each."""

    ignored_tensors: ClassVar[tuple[str, ...]] = (r".*rotary_emb\.inv_freq",)
    """Patterns of tensors that checkpoints may hold and `transformers` does not use either."""

    embedding_name: ClassVar[str] = "model.embed_tokens.weight"
    norm_name: ClassVar[str] = "model.norm.weight"
    lm_head_name: ClassVar[str] = "lm_head.weight"

    def __init__(
        self, model: PretrainedConfig, build: BuildConfig, tensors: CheckpointTensors, graph: GraphBuilder
    ) -> None:
        self.model = model
        self.build_config = build
        self.tensors = tensors
        self.graph = graph
        self.experts = ExpertTensors(tensors, model, self.hub_moe, self.hub_expert)
        self.vocabulary = model.quantization and model.quantization.vocabulary
        self._shared: dict[str, str] = {}
        self._scales: dict[str, str] = {}
        self._stored_dtypes: dict[str, str] = {}
        self._k: list[str] = []
        self._entropy: list[str] = []

    # The config. ---------------------------------------------------------------------------------

    @classmethod
    def read_config(cls, config: HfConfig, dtype: Dtype) -> PretrainedConfig:
        """The model's sizes and rules from its ``config.json``.

        Raises:
            CheckpointError: a field is missing, of a wrong type, or says something unsupported.
        """
        cls._refuse_unknown(config)
        hidden_act = config.get("hidden_act", str, "silu")
        if hidden_act not in _GATED_ACTIVATIONS:
            raise config.error("hidden_act", hidden_act, f"one of {sorted(_GATED_ACTIVATIONS)}")
        activation = _GATED_ACTIVATIONS[hidden_act]
        heads, hidden_size = cls._positive(config, "num_attention_heads"), cls._positive(config, "hidden_size")
        kv_heads = config.positive("num_key_value_heads", cls.defaults["num_key_value_heads"] or heads)
        if heads % kv_heads:
            raise config.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
        head_dim = config.positive("head_dim", cls.defaults.get("head_dim") or hidden_size // heads)
        if head_dim % 2:
            raise config.error("head_dim", head_dim, "an even number: rotary embedding turns pairs")
        num_layers = cls._positive(config, "num_hidden_layers")
        moe = cls.read_moe(config, num_layers, activation)
        dense = len(moe.layers) < num_layers
        positions = cls._positive(config, "max_position_embeddings")
        eps = config.get("rms_norm_eps", float, cls.defaults["rms_norm_eps"])
        if not 0 <= eps < 1:
            raise config.error("rms_norm_eps", eps, "a small number")
        return PretrainedConfig(
            architecture=config.architecture,
            dtype=dtype,
            vocab_size=cls._positive(config, "vocab_size"),
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=eps,
            tie_word_embeddings=config.get("tie_word_embeddings", bool, False),
            sliding_window=cls._checked_sliding_window(config),
            rope=config.rope(default_theta=cls.defaults["rope_theta"], max_position_embeddings=positions),
            attention=cls.read_attention(config),
            dense_mlp=MlpConfig(intermediate_size=cls._positive(config, "intermediate_size"), activation=activation)
            if dense
            else None,
            moe=moe,
            bos_token_id=config.token_id("bos_token_id"),
            eos_token_ids=config.token_ids("eos_token_id"),
            pad_token_id=config.token_id("pad_token_id"),
        )

    @classmethod
    def read_attention(cls, config: HfConfig) -> AttentionConfig:
        """What attention does besides the ordinary; here nothing."""
        del config
        return AttentionConfig()

    @classmethod
    def read_sliding_window(cls, config: HfConfig) -> int | None:
        """How many tokens every layer's attention sees; here all."""
        del config
        return None

    @classmethod
    def read_moe(cls, config: HfConfig, num_layers: int, activation: str) -> MoeConfig:
        """Sizes and rules of the MoE layers."""
        # transformers 5 saves some architectures' "num_experts" under the other name.
        field = "num_experts" if config.optional("num_local_experts", int) is None else "num_local_experts"
        num_experts = config.positive(field, cls.defaults["num_experts"])
        top_k = cls._positive(config, "num_experts_per_tok")
        if top_k > min(num_experts, MAX_K):
            limit = f"{field} ({num_experts})" if num_experts <= MAX_K else f"{MAX_K}, the operator's limit"
            raise config.error("num_experts_per_tok", top_k, f"at most {limit}")
        return MoeConfig(
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            intermediate_size=cls._positive(config, cls.expert_size_field),
            activation=activation,
            norm_topk_prob=config.get("norm_topk_prob", bool, cls.defaults["norm_topk_prob"]),
            shared_expert=cls.read_shared_expert(config, activation),
            layers=cls._moe_layers(config, num_layers),
        )

    @classmethod
    def read_shared_expert(cls, config: HfConfig, activation: str) -> SharedExpertConfig | None:
        """The expert that runs for every token; here none."""
        del config, activation
        return None

    @classmethod
    def unread_tensors(cls, model: PretrainedConfig) -> list[str]:
        """Patterns of tensors that a checkpoint may hold and nothing reads."""
        head = [re.escape(cls.lm_head_name)] if model.tie_word_embeddings else []
        return [*cls.ignored_tensors, *head]

    @classmethod
    def _positive(cls, config: HfConfig, name: str) -> int:
        return config.positive(name, cls.defaults[name])

    @classmethod
    def _refuse_unknown(cls, config: HfConfig) -> None:
        for name, neutral in _NEUTRAL.items():
            value = config.optional(name, object)
            if name not in cls.understands and value is not None and value != neutral:
                raise config.error(name, value, f"{neutral!r}: {cls.__name__} knows nothing else")

    @classmethod
    def _checked_sliding_window(cls, config: HfConfig) -> int | None:
        window = cls.read_sliding_window(config)
        known = ["full_attention"] if window is None else ["full_attention", "sliding_attention"]
        for kind in config.optional("layer_types", list) or []:
            if kind not in known:
                raise config.error("layer_types", kind, f"one of {known}")
        return window

    @classmethod
    def _moe_layers(cls, config: HfConfig, num_layers: int) -> list[int]:
        """Indices of the layers with experts: every ``decoder_sparse_step``-th but for ``mlp_only_layers``."""
        step = config.positive("decoder_sparse_step", 1)
        dense = config.optional("mlp_only_layers", list) or []
        layers = [layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense]
        if not layers:
            name = "mlp_only_layers" if step <= num_layers else "decoder_sparse_step"
            value = dense if step <= num_layers else step
            raise config.error(name, value, f"a value that leaves experts in some of the {num_layers} layers")
        return layers

    # The graph. ----------------------------------------------------------------------------------

    def build(self, progress: Progress) -> None:
        """Write the whole graph; `progress` is called with a name as each part is done."""
        g, m = self.graph, self.model
        input_ids = g.input("input_ids", "int64", ["batch", "sequence"])
        g.input("position_ids", "int64", ["batch", "sequence"])
        g.input("logits_indices", "int64", ["num_logits"])
        g.input("policy_index", "int32", ["num_tokens"])
        g.input("policy_kind", "int32", ["num_policies"])
        g.input("thresholds", "float32", [m.num_moe_layers, "num_policies", "num_limits"])
        g.input("k_values", "int32", [m.num_moe_layers, "num_policies", "num_choices"])
        g.input("expert_norms", "float32", [m.num_moe_layers, m.num_experts])
        g.function(
            make_moe_function(
                m.moe,
                max_k=self.build_config.capacity(m),
                correction_bias=m.moe.correction_bias,
                expert_norms=True,
                quantization=m.quantization,
            )
        )
        if m.rope is not None:
            self.make_rope(m.rope)

        hidden = self.make_embedding(input_ids)
        progress("embedding")
        for layer in range(m.num_hidden_layers):
            hidden = self.make_layer(layer, hidden)
            progress(f"layer {layer}")
        self.make_head(hidden)
        progress("head")

    # Parts of the graph, in order. ---------------------------------------------------------------

    def make_embedding(self, input_ids: str) -> str:
        """The tokens' rows of the embedding: [B, S, H]."""
        g, name = self.graph, self.embedding_name
        if self.vocabulary is None:
            embedding = self.stored(name, (self.model.vocab_size, self.model.hidden_size))
            return self.as_float(g.node("Gather", [embedding, input_ids], "embeddings", axis=0))
        # Rows are looked up as integers: whole, the embedding in floats would be the largest tensor there is.
        embedding, scales = self.stored_integers(name, (self.model.vocab_size, self.model.hidden_size), self.vocabulary)
        rows = g.node(
            "Cast", [g.node("Gather", [embedding, input_ids], "embeddings.rows", axis=0)], "embeddings.float", to=1
        )
        own = self.as_float(g.node("Gather", [scales, input_ids], "embeddings.scales", axis=0))
        return g.node("Mul", [rows, g.node("Unsqueeze", [own, g.constant([-1])], "embeddings.scale")], "embeddings")

    def make_rope(self, rope: RopeConfig) -> None:
        """Cosines and sines of the step's positions, shared by all layers: [B, S, D / 2]."""
        g, m = self.graph, self.model
        tables = rope_tables(rope, m.head_dim, self.build_config.max_seq_len, m.max_position_embeddings)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            g.weight(f"rope.{name}_table", "float32", table.shape, [table])
            g.node("Gather", [f"rope.{name}_table", "position_ids"], f"rope.{name}", axis=0)

    def make_mask(self) -> str:
        """What each new token may see: [B, 1, S, keys] bool, by absolute position; one for all layers."""
        g = self.graph
        if "mask" in self._shared:
            return self._shared["mask"]
        keys = g.node("Shape", [f"present.{self.model.attention_layers[0]}.key"], "mask.keys", start=2, end=3)
        count = g.node("Squeeze", [keys], "mask.count")
        positions = g.node("Range", [g.constant(0), count, g.constant(1)], "mask.positions")
        queries = g.node("Unsqueeze", ["position_ids", g.constant([1, 3])], "mask.queries")
        mask = g.node("LessOrEqual", [positions, queries], "mask.causal")
        if self.model.sliding_window is not None:
            oldest = g.node("Sub", [queries, g.constant(self.model.sliding_window)], "mask.oldest")
            mask = g.node("And", [mask, g.node("Greater", [positions, oldest], "mask.recent")], "mask.window")
        self._shared["mask"] = mask
        return mask

    def make_layer(self, layer: int, hidden: str) -> str:
        """One decoder layer: attention, then experts or a dense MLP, each behind a norm and a residual sum."""
        prefix = f"model.layers.{layer}"
        normed = self.make_norm(f"{prefix}.input_layernorm", hidden)
        hidden = self.add(f"{prefix}.attention_sum", hidden, self.make_attention(layer, normed))
        normed = self.make_norm(f"{prefix}.post_attention_layernorm", hidden)
        mlp = self.make_moe if layer in self.model.moe.layers else self.make_dense_mlp
        return self.add(f"{prefix}.sum", hidden, mlp(layer, normed))

    def make_norm(self, name: str, hidden: str, size: int | None = None) -> str:
        """RMS norm over the last dimension, which is the hidden size unless another is given."""
        weight = self.stored(f"{name}.weight", (size or self.model.hidden_size,), dtype="float32")
        return self.graph.node(
            "RMSNormalization", [hidden, weight], f"{name}.out", axis=-1, epsilon=self.model.rms_norm_eps
        )

    def make_attention(self, layer: int, hidden: str) -> str:
        """Grouped-query attention over cached and new keys, with rotary embedding if the model has one: [B, S, H]."""
        g, m = self.graph, self.model
        name = self.attention_name(layer)
        heads = {"q": m.num_attention_heads, "k": m.num_key_value_heads, "v": m.num_key_value_heads}
        states = {kind: self.make_projection(name, kind, hidden, count) for kind, count in heads.items()}
        for kind in ("q", "k") if m.rope is not None else ():
            states[kind] = g.node(
                "RotaryEmbedding", [states[kind], "rope.cos", "rope.sin"], f"{name}.{kind}_rope", interleaved=0
            )
        joined = {kind: self.make_cache(layer, kind, states[kind[0]]) for kind in ("key", "value")}
        attended = g.node(
            "Attention",
            [states["q"], joined["key"], joined["value"], self.make_mask()],
            f"{name}.attended",
            scale=m.head_dim**-0.5,
        )
        merged = g.node("Transpose", [attended], f"{name}.by_token", perm=[0, 2, 1, 3])
        width = m.num_attention_heads * m.head_dim
        merged = g.node("Reshape", [merged, g.constant([0, 0, width])], f"{name}.merged")
        return self.linear(f"{name}.o_proj", merged, width, m.hidden_size, bias=m.attention.output_bias)

    def attention_name(self, layer: int) -> str:
        """What an attention layer's tensors begin with."""
        return f"model.layers.{layer}.self_attn"

    def make_projection(self, name: str, kind: str, hidden: str, heads: int) -> str:
        """The queries (kind "q"), keys or values, normed and clipped where the model does: [B, heads, S, D]."""
        g, m = self.graph, self.model
        proj, norm = f"{name}.{kind}_proj", f"{name}.{kind}_norm"
        qk_norm, clip = None if kind == "v" else m.attention.qk_norm, m.attention.clip_qkv
        states = self.linear(proj, hidden, m.hidden_size, heads * m.head_dim, bias=m.attention.qkv_bias)
        if qk_norm == "projection":
            states = self.make_norm(norm, states, heads * m.head_dim)
        states = g.node("Reshape", [states, g.constant([0, 0, heads, m.head_dim])], f"{proj}.split")
        if qk_norm == "head":
            states = self.make_norm(norm, states, m.head_dim)
        if clip is not None:
            limits = [g.constant(-clip, "float32"), g.constant(clip, "float32")]
            states = g.node("Clip", [states, *limits], f"{proj}.clipped")
        return g.node("Transpose", [states], f"{proj}.heads", perm=[0, 2, 1, 3])

    def make_cache(self, layer: int, kind: str, new: str) -> str:
        """Join the past keys or values with the new ones and repeat them for the query's heads.

        The join and the repetition are spelled out because OpenVINO's paged attention is matched on them.
        """
        g, m = self.graph, self.model
        heads, width = m.num_key_value_heads, m.head_dim
        past = g.input(f"past_key_values.{layer}.{kind}", "float32", ["batch", heads, "past", width])
        present = g.node("Concat", [past, new], f"present.{layer}.{kind}", axis=2)
        g.output(present, "float32", ["batch", heads, "total", width])
        groups = m.num_attention_heads // m.num_key_value_heads
        if groups == 1:
            return present
        spread = g.node("Unsqueeze", [present, g.constant([2])], f"{present}.grouped")
        spread = g.node("Expand", [spread, g.constant([1, 1, groups, 1, 1])], f"{present}.repeated")
        return g.node("Reshape", [spread, g.constant([0, m.num_attention_heads, -1, m.head_dim])], f"{present}.heads")

    def make_moe(self, layer: int, hidden: str) -> str:
        """The layer's router and experts, the shared one included: [B, S, H]."""
        g, m = self.graph, self.model
        name = f"model.layers.{layer}.moe"
        tokens = g.node("Reshape", [hidden, g.constant([-1, m.hidden_size])], f"{name}.tokens")
        # The router decides everything, so it stays float32 whatever the engine's dtype is.
        router = self.experts.name(layer, "gate.weight").removesuffix(".weight")
        logits = self.linear(
            router, tokens, m.hidden_size, m.num_experts, dtype="float32", output=f"{name}.router_logits"
        )
        up_shape, down_shape = expert_shapes(m)
        gate_up = chain.from_iterable(self.experts.gate_and_up(layer))
        up = self.expert_weight(f"{name}.gate_up", up_shape, gate_up)
        down = self.expert_weight(f"{name}.down", down_shape, self.experts.down(layer))
        output = self.make_experts(layer, tokens, logits, up, down)
        if m.moe.shared_expert is not None:
            output = self.add(
                f"{name}.with_shared", output, self.make_shared_expert(layer, tokens, m.moe.shared_expert)
            )
        shape = g.node("Shape", [hidden], f"{name}.shape")
        return g.node("Reshape", [output, shape], f"{name}.out")

    def make_experts(self, layer: int, hidden: str, router_logits: str, *weights: str) -> str:
        """The operator over packed tokens, with its row of the policy tables.

        Args:
            layer: index of the decoder layer.
            hidden: [T, H], or of the latent size.
            router_logits: [T, E] float32.
            weights: names of the up (or fused gate and up) weight, the down weight and, if the router has one,
                its correction bias; scales are found by the weights' names.

        Returns:
            [T, H], or of the latent size.
        """
        g, m = self.graph, self.model
        name, moe_layer = f"model.layers.{layer}.moe", m.moe.layers.index(layer)
        index = g.constant(moe_layer)
        thresholds = g.node("Gather", ["thresholds", index], f"{name}.thresholds", axis=0)
        k_values = g.node("Gather", ["k_values", index], f"{name}.k_values", axis=0)
        scales = [self._scales[weight] for weight in weights if weight in self._scales]
        norms = g.node("Gather", ["expert_norms", index], f"{name}.expert_norms", axis=0)
        output, k, entropy = g.nodes(
            OP_TYPE,
            [hidden, router_logits, "policy_index", "policy_kind", thresholds, k_values, *weights, *scales, norms],
            [f"{name}.output", f"{name}.k", f"{name}.entropy"],
            domain=DOMAIN,
            **moe_attributes(
                m.moe,
                max_k=self.build_config.capacity(m),
                weight_format=m.weight_format,
                activation_format="int8" if m.quantization and m.quantization.rounds_activations else "",
                expert_norms=True,
            ),
        )
        self._k.append(k)
        self._entropy.append(entropy)
        return output

    def make_shared_expert(self, layer: int, tokens: str, shared: SharedExpertConfig) -> str:
        """The expert that every token runs, in standard ops: [T, H]."""
        g, name = self.graph, f"model.layers.{layer}.mlp.shared_expert"
        output = self.make_mlp(name, tokens, shared)
        if not shared.gated:
            return output
        gate = self.linear(f"{name}_gate", tokens, self.model.hidden_size, 1, weight_only=False)
        gate = g.node("Sigmoid", [gate], f"{name}_gate.sigmoid")
        return g.node("Mul", [output, gate], f"{name}.gated")

    def make_dense_mlp(self, layer: int, hidden: str) -> str:
        """The MLP of a layer without experts: [B, S, H]."""
        assert self.model.dense_mlp is not None  # set when the config was read, if any layer is dense
        return self.make_mlp(f"model.layers.{layer}.mlp", hidden, self.model.dense_mlp)

    def make_mlp(self, name: str, hidden: str, mlp: MlpConfig) -> str:
        """``down(act(gate(x)) * up(x))`` over the last dimension."""
        g, size = self.graph, self.model.hidden_size
        gate = self.linear(f"{name}.gate_proj", hidden, size, mlp.intermediate_size, bias=mlp.bias)
        up = self.linear(f"{name}.up_proj", hidden, size, mlp.intermediate_size, bias=mlp.bias)
        match mlp.activation:
            case "swiglu":
                active = g.node("Mul", [gate, g.node("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.act")
            case "geglu":
                active = g.node("Gelu", [gate], f"{name}.act")
            case _:
                raise AssertionError(f"activation {mlp.activation}")
        product = g.node("Mul", [active, up], f"{name}.product")
        return self.linear(f"{name}.down_proj", product, mlp.intermediate_size, size, bias=mlp.bias)

    def make_head(self, hidden: str) -> None:
        """Final norm and logits for the rows asked for, and the k and entropy of every token and layer."""
        g, m = self.graph, self.model
        # The norm is a row's own, so the rows that nobody asks logits for are dropped before it.
        rows = g.node("Reshape", [hidden, g.constant([-1, m.hidden_size])], "rows")
        rows = g.node("Gather", [rows, "logits_indices"], "rows.asked", axis=0)
        rows = self.make_norm(self.norm_name.removesuffix(".weight"), rows)
        name = self.embedding_name if m.tie_word_embeddings else self.lm_head_name
        shape = (m.vocab_size, m.hidden_size)
        if self.vocabulary is not None:
            weight = self.quantised(name, shape, self.vocabulary)
        else:
            weight = self.as_float(name if m.tie_word_embeddings else self.stored(name, shape), transposed=True)
        g.node("MatMul", [rows, weight], "logits")
        g.output("logits", "float32", ["num_logits", m.vocab_size])
        for output, dtype, columns in (("k", "int32", self._k), ("entropy", "float32", self._entropy)):
            spread = [g.node("Unsqueeze", [column, g.constant([1])], f"{column}.column") for column in columns]
            g.node("Concat", spread, output, axis=1)
            g.output(output, dtype, ["num_tokens", m.num_moe_layers])

    # Pieces. -------------------------------------------------------------------------------------

    def add(self, name: str, left: str, right: str) -> str:
        """Elementwise sum."""
        return self.graph.node("Add", [left, right], name)

    def linear(
        self,
        name: str,
        hidden: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        output: str | None = None,
        dtype: str | None = None,
        weight_only: bool = True,
    ) -> str:
        """``hidden @ weight.T + bias``, as `torch.nn.Linear`.

        Args:
            name: what its tensors begin with.
            hidden: its input.
            in_features: the input's last dimension.
            out_features: the output's.
            bias: whether it has one.
            output: the output's name, if not ``<name>.out``.
            dtype: of the weight, if not the engine's; such a weight is never quantised.
            weight_only: quantise the weight if the engine's weights are.
        """
        shape = (out_features, in_features)
        if self.model.quantization is not None and weight_only and dtype is None:
            weight = self.quantised(f"{name}.weight", shape, self.model.quantization)
        else:
            weight = self.as_float(self.stored(f"{name}.weight", shape, dtype=dtype), transposed=True)
        output = output or f"{name}.out"
        if not bias:
            return self.graph.node("MatMul", [hidden, weight], output)
        product = self.graph.node("MatMul", [hidden, weight], f"{name}.product")
        return self.add(output, product, self.stored(f"{name}.bias", (out_features,), dtype="float32"))

    def stored(self, name: str, shape: tuple[int, ...], *, dtype: str | None = None) -> str:
        """A checkpoint tensor as a weight of the graph, in the engine's dtype unless another is asked for."""
        self._stored_dtypes[name] = dtype or self.model.dtype
        values = self.tensors.read(self.in_checkpoint(name), shape)
        return self.graph.weight(name, self._stored_dtypes[name], shape, [values])

    def quantised(self, name: str, shape: tuple[int, int], quantization: QuantizationConfig) -> str:
        """A checkpoint tensor stored as integers, as float32 and transposed."""
        integers, scales = self.stored_integers(name, shape, quantization)
        blocks: dict[str, Any] = {"axis": 0}
        if quantization.group_size is not None:
            blocks = {"axis": 1, "block_size": quantization.group_size}
        weight = self.graph.node("DequantizeLinear", [integers, self.as_float(scales)], f"{name}.values", **blocks)
        return self.graph.node("Transpose", [weight], f"{name}.T", perm=[1, 0])

    def stored_integers(self, name: str, shape: tuple[int, int], quantization: QuantizationConfig) -> tuple[str, str]:
        """A checkpoint tensor stored as integers, once, and their scales."""
        if name not in self._scales:
            values = self.tensors.read(self.in_checkpoint(name), shape)
            _, self._scales[name] = self.graph.quantised_weight(name, quantization, self.model.dtype, shape, [values])
        return name, self._scales[name]

    def expert_weight(self, name: str, shape: tuple[int, int, int], pieces: Iterator[Array]) -> str:
        """One of the operator's weights, in the engine's dtype or, with its scales beside it, as integers."""
        g, m = self.graph, self.model
        if m.quantization is None:
            return g.weight(name, m.dtype, shape, pieces)
        _, self._scales[name] = g.quantised_weight(name, m.quantization, m.dtype, shape, pieces, for_operator=True)
        return name

    def in_checkpoint(self, name: str) -> str:
        """The checkpoint's name for a weight of the graph; here the same."""
        return name

    def as_float(self, value: str, *, transposed: bool = False) -> str:
        """A stored weight (or values gathered from one) as float32, transposed if asked: nodes that runtimes fold."""
        if self._stored_dtypes.get(value, self.model.dtype) != "float32":
            value = self._once("Cast", value, f"{value}.float", to=1)
        return self._once("Transpose", value, f"{value}.T", perm=[1, 0]) if transposed else value

    def _once(self, op_type: str, value: str, output: str, **attributes: Any) -> str:
        if output not in self._shared:
            self._shared[output] = self.graph.node(op_type, [value], output, **attributes)
        return self._shared[output]


def expert_shapes(model: PretrainedConfig) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of the operator's weights: up (or fused gate and up) [E, U, H] and down [E, H, I]."""
    moe = model.moe
    width = moe.intermediate_size * (2 if moe.activation in GATED_ACTIVATIONS else 1)
    size = moe.latent_size or model.hidden_size
    return (moe.num_experts, width, size), (moe.num_experts, size, moe.intermediate_size)
