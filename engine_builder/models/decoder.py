# SPDX-License-Identifier: Apache-2.0
"""What every decoder with experts shares: the graph of a pre-norm transformer, written layer by layer.

Shapes in comments: B batch, S new tokens, T = B * S, H hidden size, D head dim, E experts, L MoE
layers, N logits rows, P policies, C choices, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy.typing as npt

from adaptive_k_moe.engine_builder.checkpoint import CheckpointTensors, HfConfig
from adaptive_k_moe.engine_builder.graph import DOMAIN, GraphBuilder, make_moe_function
from adaptive_k_moe.engine_builder.graph.moe_function import GATED_ACTIVATIONS, OP_TYPE, moe_attributes
from adaptive_k_moe.engine_builder.models.rope import rope_tables
from adaptive_k_moe.engine_config import BuildConfig, Dtype, PretrainedConfig
from adaptive_k_moe.policy import MAX_K

Array = npt.NDArray[Any]
Progress = Callable[[str], None]


class Decoder(ABC):
    """A decoder-only model whose MLPs are mixtures of experts.

    A subclass reads its architecture's config in `read_config` and overrides the ``make_`` methods in
    which it differs; names of weights in the graph are those of the checkpoint.

    Args:
        model: the model's sizes and rules.
        build: the engine's sizes.
        tensors: the checkpoint's weights.
        graph: where nodes and weights go.
    """

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
        self._shared: dict[str, str] = {}
        self._stored_dtypes: dict[str, str] = {}
        self._k: list[str] = []
        self._entropy: list[str] = []

    @classmethod
    @abstractmethod
    def read_config(cls, config: HfConfig, dtype: Dtype) -> PretrainedConfig:
        """The model's sizes and rules from its ``config.json``.

        Raises:
            CheckpointError: a field is missing, of a wrong type, or says something unsupported.
        """

    @property
    def max_k(self) -> int:
        """Most experts that the operator lets a token run (policies are capped lower by default)."""
        return min(self.model.num_experts, MAX_K)

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
        g.function(make_moe_function(m.moe, max_k=self.max_k, correction_bias=False))
        self.make_rope()

        embedding = self.stored(self.embedding_name, (m.vocab_size, m.hidden_size))
        hidden = self.as_float(g.node("Gather", [embedding, input_ids], "embeddings", axis=0))
        progress("embedding")
        for layer in range(m.num_hidden_layers):
            hidden = self.make_layer(layer, hidden)
            progress(f"layer {layer}")
        self.make_head(hidden, embedding)
        progress("head")

    # Parts of the graph, in order. ---------------------------------------------------------------

    def make_rope(self) -> None:
        """Cosines and sines of the step's positions, shared by all layers: [B, S, D / 2]."""
        g, m = self.graph, self.model
        tables = rope_tables(m.rope, m.head_dim, self.build_config.max_seq_len, m.max_position_embeddings)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            g.weight(f"rope.{name}_table", "float32", table.shape, [table])
            g.node("Gather", [f"rope.{name}_table", "position_ids"], f"rope.{name}", axis=0)

    def make_mask(self) -> str:
        """What each new token may see: [B, 1, S, keys] bool, by absolute position; one for all layers."""
        g = self.graph
        if "mask" in self._shared:
            return self._shared["mask"]
        keys = g.node("Shape", ["present.0.key"], "mask.keys", start=2, end=3)
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
        """One decoder layer: attention, then experts, each behind a norm and a residual sum."""
        prefix = f"model.layers.{layer}"
        normed = self.make_norm(f"{prefix}.input_layernorm", hidden)
        hidden = self.add(f"{prefix}.attention_sum", hidden, self.make_attention(layer, normed))
        normed = self.make_norm(f"{prefix}.post_attention_layernorm", hidden)
        return self.add(f"{prefix}.sum", hidden, self.make_moe(layer, normed))

    def make_norm(self, name: str, hidden: str) -> str:
        """RMS norm over the last dimension."""
        weight = self.stored(f"{name}.weight", (self.model.hidden_size,), dtype="float32")
        return self.graph.node(
            "RMSNormalization", [hidden, weight], f"{name}.out", axis=-1, epsilon=self.model.rms_norm_eps
        )

    def make_attention(self, layer: int, hidden: str) -> str:
        """Grouped-query attention with rotary embedding over cached and new keys: [B, S, H]."""
        g, m = self.graph, self.model
        name = f"model.layers.{layer}.self_attn"
        heads = {"q": m.num_attention_heads, "k": m.num_key_value_heads, "v": m.num_key_value_heads}
        states = {kind: self.make_projection(f"{name}.{kind}_proj", hidden, count) for kind, count in heads.items()}
        for kind in ("q", "k"):
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
        return self.linear(f"{name}.o_proj", merged, width, m.hidden_size)

    def make_projection(self, name: str, hidden: str, heads: int) -> str:
        """Project and split into heads: [B, heads, S, D]."""
        g, m = self.graph, self.model
        flat = self.linear(name, hidden, m.hidden_size, heads * m.head_dim)
        split = g.node("Reshape", [flat, g.constant([0, 0, heads, m.head_dim])], f"{name}.split")
        return g.node("Transpose", [split], f"{name}.heads", perm=[0, 2, 1, 3])

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

    @abstractmethod
    def make_moe(self, layer: int, hidden: str) -> str:
        """The layer's experts: [B, S, H]."""

    def make_experts(self, layer: int, hidden: str, router_logits: str, up: str, down: str) -> str:
        """The operator over packed tokens, with its row of the policy tables.

        Args:
            layer: index of the decoder layer.
            hidden: [T, H].
            router_logits: [T, E] float32.
            up: name of the up (or fused gate and up) weight.
            down: name of the down weight.

        Returns:
            [T, H].
        """
        g, m = self.graph, self.model
        name, moe_layer = f"model.layers.{layer}.moe", m.moe.layers.index(layer)
        index = g.constant(moe_layer)
        thresholds = g.node("Gather", ["thresholds", index], f"{name}.thresholds", axis=0)
        k_values = g.node("Gather", ["k_values", index], f"{name}.k_values", axis=0)
        output, k, entropy = g.nodes(
            OP_TYPE,
            [hidden, router_logits, "policy_index", "policy_kind", thresholds, k_values, up, down],
            [f"{name}.output", f"{name}.k", f"{name}.entropy"],
            domain=DOMAIN,
            **moe_attributes(m.moe, max_k=self.max_k, weight_format=m.dtype),
        )
        self._k.append(k)
        self._entropy.append(entropy)
        return output

    def make_head(self, hidden: str, embedding: str) -> None:
        """Final norm and logits for the rows asked for, and the k and entropy of every token and layer."""
        g, m = self.graph, self.model
        # The norm is a row's own, so the rows that nobody asks logits for are dropped before it.
        rows = g.node("Reshape", [hidden, g.constant([-1, m.hidden_size])], "rows")
        rows = g.node("Gather", [rows, "logits_indices"], "rows.asked", axis=0)
        rows = self.make_norm(self.norm_name.removesuffix(".weight"), rows)
        if m.tie_word_embeddings:
            weight = self.as_float(embedding, transposed=True)
            g.node("MatMul", [rows, weight], "logits")
        else:
            head = self.lm_head_name.removesuffix(".weight")
            self.linear(head, rows, m.hidden_size, m.vocab_size, output="logits")
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
        output: str | None = None,
        dtype: str | None = None,
    ) -> str:
        """``hidden @ weight.T`` (and the bias, where the checkpoint has one), as `torch.nn.Linear`."""
        weight = self.as_float(self.stored(f"{name}.weight", (out_features, in_features), dtype=dtype), transposed=True)
        output = output or f"{name}.out"
        if f"{name}.bias" not in self.tensors:
            return self.graph.node("MatMul", [hidden, weight], output)
        product = self.graph.node("MatMul", [hidden, weight], f"{name}.product")
        return self.add(output, product, self.stored(f"{name}.bias", (out_features,), dtype="float32"))

    def stored(self, name: str, shape: tuple[int, ...], *, dtype: str | None = None) -> str:
        """A checkpoint tensor as a weight of the graph, in the engine's dtype unless another is asked for."""
        self._stored_dtypes[name] = dtype or self.model.dtype
        return self.graph.weight(name, self._stored_dtypes[name], shape, [self.tensors.read(name, shape)])

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
    return (moe.num_experts, width, model.hidden_size), (moe.num_experts, model.hidden_size, moe.intermediate_size)
