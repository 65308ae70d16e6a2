# SPDX-License-Identifier: Apache-2.0
"""The engine directory: what its ``config.json`` says, and the checks made when one is opened.

An engine directory is laid out as TensorRT-LLM's: ``config.json`` with ``pretrained_config`` (the
model) and ``build_config`` (the sizes it was built for), and the engine's files beside it. Ours adds
``adaptive_k`` (the policies, which may be edited in place) and ``files`` (sizes and SHA-256).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adaptive_k_moe.errors import EngineError
from adaptive_k_moe.files import write_json
from adaptive_k_moe.policy import PolicySet, PolicyTables, compile_policies
from adaptive_k_moe.validation import describe_first_error

ENGINE_VERSION = "1"
"""Version of the engine directory's format; an engine of another version is refused."""

CONFIG_NAME = "config.json"

Target = Literal["openvino", "tensorrt", "onnx"]
Dtype = Literal["float32", "bfloat16", "float16"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RopeConfig(_Model):
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


class AttentionConfig(_Model):
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


class MlpConfig(_Model):
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


class MambaConfig(_Model):
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


class MoeConfig(_Model):
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


class QuantizationConfig(_Model):
    """Weights stored as integers; activations keep the model's dtype. The words are TensorRT-LLM's.

    Attributes:
        quant_algo: "W8A16", int8 with a scale for each row, or "W4A16", int4 with one for each group.
        group_size: neighbours along a row that share a scale; None is the whole row.
        exclude_modules: the linear layers that keep the model's dtype (the router: float32), as do embedding,
            norms, convolutions and biases.
    """

    quant_algo: Literal["W8A16", "W4A16"]
    group_size: int | None = Field(default=None, ge=1)
    exclude_modules: list[str] = ["lm_head", "router", "shared_expert_gate"]

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return {"W8A16": 8, "W4A16": 4}[self.quant_algo]


class PretrainedConfig(_Model):
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
        return self.dtype if self.quantization is None else f"int{self.quantization.bits}"

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


class BuildConfig(_Model):
    """The sizes an engine is built for; the words are TensorRT-LLM's.

    Attributes:
        target: what runs the engine.
        max_batch_size: most sequences in one step.
        max_input_len: most tokens of a prompt; None is as many as `max_seq_len` leaves room for.
        max_seq_len: most tokens of a sequence, prompt and answer together.
        max_num_tokens: most tokens in one step, over all sequences.
    """

    target: Target
    max_batch_size: int = Field(ge=1)
    max_input_len: int | None = Field(default=None, ge=1)
    max_seq_len: int = Field(ge=1)
    max_num_tokens: int = Field(ge=1)

    @property
    def longest_prompt(self) -> int:
        """Most tokens that a request's prompt may have, with room for one of the answer."""
        longest = self.max_seq_len - 1
        return longest if self.max_input_len is None else min(longest, self.max_input_len)


class FileEntry(_Model):
    """One file of the engine: its size in bytes and its SHA-256, in hexadecimal."""

    size: int = Field(ge=0)
    sha256: str


class EngineConfig(_Model):
    """``config.json`` of an engine directory."""

    version: str
    pretrained_config: PretrainedConfig
    build_config: BuildConfig
    adaptive_k: PolicySet
    files: dict[str, FileEntry]

    def policies_for_model(self) -> PolicySet:
        """The policies checked against the model and with `full` among them."""
        return self.pretrained_config.fit_policies(self.adaptive_k)

    def policy_tables(self) -> PolicyTables:
        """The policies as the engine's inputs."""
        model = self.pretrained_config
        return compile_policies(
            self.policies_for_model(),
            num_experts=model.num_experts,
            num_experts_per_tok=model.num_experts_per_tok,
            num_moe_layers=model.num_moe_layers,
        )

    def to_json(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        content = self.model_dump(mode="json", exclude_none=True)
        content["adaptive_k"] = self.adaptive_k.to_json()
        return content


def read_engine_config(engine_dir: str | Path, *, verify_files: bool = True) -> EngineConfig:
    """Open an engine directory and check version, sizes and, unless told not to, every file's hash.

    Args:
        engine_dir: the directory that ``adaptive-k build`` wrote.
        verify_files: compare each file with its recorded SHA-256 (about a second for each GB); without it
            only presence and size are checked.

    Raises:
        EngineError: one sentence that says what is missing, truncated, altered or too new.
    """
    directory = Path(engine_dir)
    content = _read_config(directory)
    version = content.get("version") if isinstance(content, dict) else None
    if version != ENGINE_VERSION:
        raise EngineError(
            f"{directory} was built in format {version!r}, and this release reads {ENGINE_VERSION!r}: "
            "build the engine again from its checkpoint."
        )
    try:
        config = EngineConfig.model_validate(content)
    except ValidationError as error:
        raise EngineError(f"{directory / CONFIG_NAME}: {describe_first_error(error)}.") from None
    for name, entry in config.files.items():
        _check_file(directory / name, entry, verify_hash=verify_files)
    return config


def read_policy_tables(engine_dir: str | Path) -> PolicyTables:
    """The policies that an engine directory holds now, as the engine's inputs.

    Raises:
        EngineError: the directory cannot be read.
        PolicyError: its policies do not fit its model.
    """
    return read_engine_config(engine_dir, verify_files=False).policy_tables()


def write_engine_config(engine_dir: str | Path, config: EngineConfig) -> None:
    """Write ``config.json`` so that a reader sees the old one or the new one, never half of it."""
    write_json(Path(engine_dir) / CONFIG_NAME, config.to_json())


def file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    with path.open("rb") as stream:
        return FileEntry(size=path.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def _read_config(directory: Path) -> Any:
    if not directory.is_dir():
        raise EngineError(f"there is no engine directory {directory}: `adaptive-k build` makes one.")
    try:
        return json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(f"{directory} has no {CONFIG_NAME}, so it is no engine directory.") from None
    except OSError as error:
        raise EngineError(f"cannot read {directory / CONFIG_NAME}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{directory / CONFIG_NAME} is not JSON: {error}.") from None


def _check_file(path: Path, entry: FileEntry, *, verify_hash: bool) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        raise EngineError(f"{path} is missing: build the engine again.") from None
    if size != entry.size:
        raise EngineError(f"{path} has {size} bytes instead of {entry.size}: build or copy the engine again.")
    if verify_hash and file_entry(path).sha256 != entry.sha256:
        raise EngineError(f"{path} was altered (its SHA-256 differs): build or copy the engine again.")
