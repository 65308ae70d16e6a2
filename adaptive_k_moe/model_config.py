# SPDX-License-Identifier: Apache-2.0
"""The model's schema: sizes and rules in the field's terms, as ``pretrained_config`` of an engine has them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adaptive_k_moe.policy import PolicySet
from adaptive_k_moe.validation import FileModel

Dtype = Literal["float32", "bfloat16", "float16"]

WeightOnlyPrecision = Literal["int8", "int4"]
"""The weight formats that a build quantises to."""

QuantAlgo = Literal["W8A16", "W8A8", "W4A16", "W4A8"]
"""Bits of the weights and of the activations that they are multiplied with."""

KvCacheDtype = Literal["auto", "float32", "bfloat16", "int8"]
"""Of the cached keys and values; "auto" is what the engine's attention computes in."""

Device = Literal["cpu", "cuda"]
"""What an engine of the target "torch" runs on: "cuda" is the first GPU that CUDA_VISIBLE_DEVICES leaves."""


class RopeConfig(FileModel):
    """Rotary embedding as Hugging Face's ``rope_parameters`` has it."""

    rope_type: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    rope_theta: float = Field(gt=0)
    factor: float = Field(default=1.0, gt=0)
    original_max_position_embeddings: int | None = Field(default=None, gt=0)
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class AttentionConfig(FileModel):
    """What an attention layer does besides grouped-query attention with rotary embedding.

    Attributes:
        layers: indices of the decoder layers that have attention; None is every layer.
        qkv_bias: the projections to queries, keys and values have a bias.
        output_bias: the projection back to the hidden size has one.
        qk_norm: RMS norm of queries and keys before the rotary embedding: over each head, or over the
            whole projection (all heads together).
        clip_qkv: queries, keys and values are cut off beyond this absolute value, after the norm.
    """

    layers: list[int] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    clip_qkv: float | None = Field(default=None, gt=0)


class MlpConfig(FileModel):
    """A dense MLP; the activation is named as the operator's, so a gated one says "swiglu".

    Attributes:
        bias: its projections have one.
    """

    intermediate_size: int = Field(ge=1)
    activation: str
    bias: bool = False


class SharedExpertConfig(MlpConfig):
    """An MLP that runs for every token beside the chosen experts, whatever k is.

    Attributes:
        gated: its output is scaled by the sigmoid of a projection of its own.
    """

    gated: bool = False


class MambaConfig(FileModel):
    """The Mamba-2 layers (the attributes and sizes of the operator ``Mamba2``).

    Attributes:
        num_heads, head_dim, state_size: each head's state is [state_size, head_dim].
        n_groups: groups of heads that share B and C, and of channels that the gated norm norms together.
        conv_kernel: taps of the causal convolution.
        conv_bias: it has a bias.
        projection_bias: the projections in and out have one.
        dt_min: lower limit of the step sizes behind softplus.
        layers: indices of the decoder layers that are of this kind.
    """

    num_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    state_size: int = Field(ge=1)
    n_groups: int = Field(ge=1)
    conv_kernel: int = Field(ge=2)
    conv_bias: bool = True
    projection_bias: bool = False
    dt_min: float = Field(default=0.0, ge=0)
    layers: list[int]

    @property
    def intermediate_size(self) -> int:
        """Width of all heads."""
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C side by side."""
        return self.intermediate_size + 2 * self.n_groups * self.state_size

    @property
    def conv_state_shape(self) -> tuple[int, int]:
        """A sequence's last inputs of the convolution: [conv_kernel - 1, conv_dim]."""
        return self.conv_kernel - 1, self.conv_dim

    @property
    def ssm_state_shape(self) -> tuple[int, int, int]:
        """A sequence's state of the scan: [num_heads, state_size, head_dim]."""
        return self.num_heads, self.state_size, self.head_dim


class MoeConfig(FileModel):
    """The mixture-of-experts layers: their sizes and the router's rule (the operator's attributes).

    Attributes:
        correction_bias: the operator has its ninth input.
        latent_size: width of the experts' inputs and outputs where it is not the hidden size.
    """

    num_experts: int = Field(ge=1)
    num_experts_per_tok: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    activation: str
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    correction_bias: bool = False
    latent_size: int | None = Field(default=None, ge=1)
    shared_expert: SharedExpertConfig | None = None
    layers: list[int]
    """Indices of the decoder layers that have experts, in order; MoE layer 0 is the first of them."""


class QuantizationConfig(FileModel):
    """Weights stored as integers. The words are TensorRT-LLM's.

    Attributes:
        quant_algo: "W8..." is int8 with a scale for each row, "W4..." int4 with one for each group. "...A16" leaves
            activations as they are; "...A8" lets them be rounded to int8 as a product reads them, by token and group.
        group_size: neighbours along a row that share a scale; None is the whole row.
        exclude_modules: what keeps the model's dtype (the router: float32), as do norms, convolutions and biases.
            Embedding and head, where they are not named here, are int8 with a scale for each row whatever
            `quant_algo` is. (Engines of earlier releases have their embedding in the model's dtype and do not name it.)
    """

    quant_algo: QuantAlgo
    group_size: int | None = Field(default=None, ge=1)
    exclude_modules: list[str] = ["lm_head", "vocab_embedding", "router", "shared_expert_gate"]

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return 8 if self.quant_algo.startswith("W8") else 4

    @property
    def weight_format(self) -> WeightOnlyPrecision:
        """How a weight is stored: the operator's attribute."""
        return "int8" if self.bits == 8 else "int4"

    @property
    def rounds_activations(self) -> bool:
        """Activations may be rounded to int8."""
        return self.quant_algo.endswith("A8")

    @property
    def vocabulary(self) -> QuantizationConfig | None:
        """How embedding and head are stored; None is in the model's dtype."""
        if "vocab_embedding" in self.exclude_modules or "lm_head" in self.exclude_modules:
            return None
        return QuantizationConfig(quant_algo="W8A16")


class PretrainedConfig(FileModel):
    """The model, in the field's terms."""

    architecture: str
    dtype: Dtype
    quantization: QuantizationConfig | None = None
    """None: weights are of `dtype`."""
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    max_position_embeddings: int = Field(ge=1)
    rms_norm_eps: float
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    rope: RopeConfig | None = None
    """None: attention without rotary embedding."""
    attention: AttentionConfig = AttentionConfig()
    mamba: MambaConfig | None = None
    dense_mlp: MlpConfig | None = None
    """The layers with an MLP and no experts; None where there are none."""
    moe: MoeConfig
    bos_token_id: int | None = None
    eos_token_ids: list[int] = Field(default_factory=list)
    pad_token_id: int | None = None

    @property
    def attention_layers(self) -> list[int]:
        """Indices of the layers that have attention, and so keys and values to cache."""
        return list(range(self.num_hidden_layers)) if self.attention.layers is None else self.attention.layers

    @property
    def weight_format(self) -> str:
        """How the experts' weights are stored: the operator's attribute."""
        return self.dtype if self.quantization is None else self.quantization.weight_format

    @property
    def num_experts(self) -> int:
        """Experts in a MoE layer."""
        return self.moe.num_experts

    @property
    def num_experts_per_tok(self) -> int:
        """The trained top-k."""
        return self.moe.num_experts_per_tok

    @property
    def num_moe_layers(self) -> int:
        """Layers that have experts."""
        return len(self.moe.layers)

    def fit_policies(self, policies: PolicySet) -> PolicySet:
        """The policies checked against this model and with `full` among them; see `PolicySet.for_model`."""
        return policies.for_model(
            num_experts=self.num_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            num_moe_layers=self.num_moe_layers,
        )

    def largest_k(self, policies: PolicySet) -> dict[str, int]:
        """The most experts that each of some fitted policies may run for a token."""
        return policies.largest_k(num_experts_per_tok=self.num_experts_per_tok, num_moe_layers=self.num_moe_layers)
