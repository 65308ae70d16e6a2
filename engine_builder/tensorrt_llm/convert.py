# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Mixtral as TensorRT-LLM's unified checkpoint: ``config.json`` and a ``rankN.safetensors`` each.

Names, shapes and fields are those of TensorRT-LLM 1.2, the last line with `trtllm-build`. Tensor parallelism
splits attention by heads and experts by their intermediate size; pipeline parallelism splits the layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.engine_builder.checkpoint import CheckpointTensors, HfConfig
from adaptive_k_moe.engine_builder.graph.graph_builder import require_float16
from adaptive_k_moe.engine_builder.models import architecture_of
from adaptive_k_moe.engine_builder.models.expert_tensors import ExpertTensors
from adaptive_k_moe.engine_builder.models.mixtral import Mixtral
from adaptive_k_moe.engine_builder.output_dir import check_empty, replace, written_beside
from adaptive_k_moe.engine_builder.tensorrt_llm.safetensors_writer import SafetensorsWriter, TensorSpec
from adaptive_k_moe.errors import BuildError
from adaptive_k_moe.model_config import Dtype, PretrainedConfig
from adaptive_k_moe.policy import PolicySet, compile_policies, read_policy_file

_QUANT_ALGOS = {"int8": "W8A16", "int4": "W4A16"}

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Part:
    """One tensor of every rank of a stage.

    Attributes:
        spec: what a rank's file says of it; all ranks' shapes are equal.
        pieces: reads its values in order, each piece for all ranks.
        take: a tensor-parallel rank's share of a piece.
    """

    spec: TensorSpec
    pieces: Callable[[], Iterator[Any]]
    take: Callable[[Any, int], Array]


def convert(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    *,
    dtype: Dtype | None = None,
    tp_size: int = 1,
    pp_size: int = 1,
    weight_only_precision: Literal["int8", "int4"] | None = None,
    policy: str | Path | PolicySet | None = None,
    adaptive_k_policy: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint; the directory is there whole or not at all, and memory in use is that of one tensor.

    Args:
        checkpoint_dir: Hugging Face checkpoint of a Mixtral.
        output_dir: the directory to make; it must not exist, or be empty.
        dtype: of weights and activations; None is the checkpoint's own.
        tp_size: GPUs that share each layer.
        pp_size: groups of GPUs that share the layers.
        weight_only_precision: have `trtllm-build` round the weights when it loads them.
        policy: policy file or set; None has `full` alone.
        adaptive_k_policy: the one of them that the engine will follow; None is the set's default.
        progress: called with a part's name, the parts done and their number.

    Returns:
        The content of ``config.json``.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete or of an unsupported kind.
        BuildError: it cannot be converted as asked.
        PolicyError: the policies do not fit the model, or lack the one asked for.
    """
    source, output = Path(checkpoint_dir), Path(output_dir)
    hf_config = HfConfig.read(source)
    hf_config.require("quantization_config", None)
    if architecture_of(hf_config) is not Mixtral:
        raise BuildError(
            f"convert writes Mixtral's TensorRT-LLM checkpoint alone, not that of {hf_config.architecture}."
        )
    own = hf_config.optional("dtype", str) or hf_config.optional("torch_dtype", str)
    known: dict[str | None, Dtype] = {"float16": "float16", "bfloat16": "bfloat16"}
    model = Mixtral.read_config(hf_config, dtype or known.get(own, "float32"))
    _check(model, tp_size, pp_size)
    content = _config(model, tp_size, pp_size, weight_only_precision)
    policies = policy if isinstance(policy, PolicySet) else read_policy_file(policy) if policy else PolicySet()
    content["adaptive_k"] = _policy(model, model.fit_policies(policies), adaptive_k_policy)
    output = check_empty(output)

    with written_beside(output, "checkpoint") as temporary:
        tensors = CheckpointTensors(source)
        stages = _stages(model, tensors, tp_size, pp_size)
        total, done = sum(map(len, stages)), 0
        for stage, parts in enumerate(stages):
            with ExitStack() as files:
                specs = [part.spec for part in parts]
                names = [f"rank{stage * tp_size + rank}.safetensors" for rank in range(tp_size)]
                writers = [files.enter_context(SafetensorsWriter(temporary / name, specs)) for name in names]
                for part in parts:
                    _write(part, writers)
                    done += 1
                    if progress is not None:
                        progress(part.spec.name, done, total)
        tensors.require_all_used(Mixtral.__name__, Mixtral.unread_tensors(model))
        (temporary / "config.json").write_text(json.dumps(content, indent=4) + "\n")
        check_empty(output)  # again: others may have written there meanwhile
        replace(output, temporary)
    return content


def _write(part: _Part, writers: list[SafetensorsWriter]) -> None:
    for piece in part.pieces():
        for rank, writer in enumerate(writers):
            share = part.take(piece, rank)
            if part.spec.dtype == "float16":
                require_float16(part.spec.name, share)
            writer.write(share, part.spec.dtype)


def _check(model: PretrainedConfig, tp_size: int, pp_size: int) -> None:
    """Refuse what TensorRT-LLM's Mixtral does not compute, or not in so many parts."""
    for name, size in (("tp_size", tp_size), ("pp_size", pp_size)):
        if size < 1:
            raise BuildError(f"{name} is {size}: it must be at least 1.")
    if pp_size > model.num_hidden_layers:
        raise BuildError(f"pp_size is {pp_size}, but the model has {model.num_hidden_layers} layers.")
    for name, count in (
        ("num_attention_heads", model.num_attention_heads),
        ("intermediate_size", model.moe.intermediate_size),
    ):
        if count % tp_size:
            raise BuildError(f"tp_size is {tp_size}, which does not divide the model's {name} {count}.")
    heads = model.num_key_value_heads
    if heads % tp_size and tp_size % heads:
        raise BuildError(
            f"tp_size is {tp_size}, which neither divides num_key_value_heads {heads} nor is its multiple."
        )
    if model.rope is None or model.rope.rope_type != "default":
        raise BuildError("convert knows rotary embedding without scaling alone.")
    if model.sliding_window is not None:
        raise BuildError(
            f"the model's attention has a sliding window of {model.sliding_window} tokens, which TensorRT-LLM's "
            "Mixtral does not cut off."
        )


def _config(model: PretrainedConfig, tp_size: int, pp_size: int, precision: str | None) -> dict[str, Any]:
    """``config.json`` as TensorRT-LLM's own converter writes it for a Mixtral, which is a Llama with experts."""
    assert model.rope is not None
    return {
        "architecture": model.architecture,
        "dtype": model.dtype,
        "logits_dtype": "float32",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_size": model.head_dim,
        "intermediate_size": model.moe.intermediate_size,
        "hidden_act": model.moe.activation,
        "norm_epsilon": model.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": model.max_position_embeddings,
        "rotary_base": model.rope.rope_theta,
        "rotary_scaling": None,
        "attn_bias": False,
        "mlp_bias": False,
        "residual_mlp": False,
        "qk_layernorm": False,
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "disable_weight_only_quant_plugin": False,
        "moe": {
            "num_experts": model.num_experts,
            "top_k": model.num_experts_per_tok,
            "normalization_mode": 1,  # RENORMALIZE: the weights of the chosen sum to 1
        },
        "mapping": {
            "world_size": tp_size * pp_size,
            "tp_size": tp_size,
            "pp_size": pp_size,
            "moe_tp_size": tp_size,
            "moe_ep_size": 1,
        },
        "quantization": {
            "quant_algo": None if precision is None else _QUANT_ALGOS[precision],
            "kv_cache_quant_algo": None,
        },
    }


def _policy(model: PretrainedConfig, policies: PolicySet, name: str | None) -> dict[str, Any]:
    """One policy's tables, which become constants of the engine."""
    tables = compile_policies(
        policies,
        num_experts=model.num_experts,
        num_experts_per_tok=model.num_experts_per_tok,
        num_moe_layers=model.num_moe_layers,
    )
    row = tables.index(name)
    # JSON has no infinity; no entropy reaches the largest float32.
    thresholds = np.minimum(tables.thresholds[:, row], np.finfo(np.float32).max)
    return {
        "policy": tables.names[row],
        "policy_kind": int(tables.policy_kind[row]),
        "thresholds": thresholds.tolist(),
        "k_values": tables.k_values[:, row].tolist(),
        "expert_norms": tables.expert_norms.tolist(),
    }


def _stages(model: PretrainedConfig, tensors: CheckpointTensors, tp_size: int, pp_size: int) -> list[list[_Part]]:
    """The tensors of each pipeline stage, in order; layers are numbered from 0 in each."""
    reader = _MixtralParts(model, tensors, tp_size)
    # The first stages have one layer more where they cannot all have as many.
    layers = [part.tolist() for part in np.array_split(np.arange(model.num_hidden_layers), pp_size)]
    stages = [
        list(chain.from_iterable(reader.layer(layer, number) for number, layer in enumerate(stage))) for stage in layers
    ]
    stages[0].insert(0, reader.embedding())
    stages[-1].extend(reader.head())
    return stages


class _MixtralParts:
    """Which tensors of Hugging Face's checkpoint make which of TensorRT-LLM's."""

    def __init__(self, model: PretrainedConfig, tensors: CheckpointTensors, tp_size: int) -> None:
        self._model = model
        self._tensors = tensors
        self._tp_size = tp_size
        self._experts = ExpertTensors(tensors, model, Mixtral.hub_moe, Mixtral.hub_expert)

    def embedding(self) -> _Part:
        model = self._model
        shape = (model.vocab_size, model.hidden_size)
        return self._whole("transformer.vocab_embedding.weight", "model.embed_tokens.weight", shape)

    def head(self) -> Iterator[_Part]:
        """The last norm and the vocabulary's product, whose rows are padded to be split."""
        model, size = self._model, self._tp_size
        yield self._whole("transformer.ln_f.weight", "model.norm.weight", (model.hidden_size,))
        name = "model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight"
        rows = -(-model.vocab_size // size)

        def read() -> Iterator[Array]:
            weight = self._tensors.read(name, (model.vocab_size, model.hidden_size))
            yield np.pad(weight, [(0, rows * size - model.vocab_size), (0, 0)])

        spec = TensorSpec("lm_head.weight", model.dtype, (rows, model.hidden_size))
        yield _Part(spec, read, lambda weight, rank: _share(weight, 0, rank, size))

    def layer(self, layer: int, number: int) -> Iterator[_Part]:
        """A layer's tensors.

        Args:
            layer: its index in the model.
            number: its index in its stage.
        """
        model, size = self._model, self._tp_size
        source, name = f"model.layers.{layer}", f"transformer.layers.{number}"
        hidden, width = model.hidden_size, model.num_attention_heads * model.head_dim
        yield self._whole(f"{name}.input_layernorm.weight", f"{source}.input_layernorm.weight", (hidden,))
        yield self._attention(source, f"{name}.attention.qkv.weight")
        yield _Part(
            TensorSpec(f"{name}.attention.dense.weight", model.dtype, (hidden, width // size)),
            lambda: iter([self._tensors.read(f"{source}.self_attn.o_proj.weight", (hidden, width))]),
            lambda weight, rank: _share(weight, 1, rank, size),
        )
        yield self._whole(f"{name}.post_layernorm.weight", f"{source}.post_attention_layernorm.weight", (hidden,))
        gate = self._experts.name(layer, "gate.weight")
        yield self._whole(f"{name}.mlp.router.weight", gate, (model.num_experts, hidden), dtype="float32")
        inner = model.moe.intermediate_size // size
        yield _Part(
            TensorSpec(f"{name}.mlp.fc.weight", model.dtype, (model.num_experts, 2 * inner, hidden)),
            lambda: self._experts.gate_and_up(layer),
            # The linear half comes first, the one that the activation is applied to second.
            lambda pair, rank: np.concatenate([_share(half, 0, rank, size) for half in reversed(pair)]),
        )
        yield _Part(
            TensorSpec(f"{name}.mlp.proj.weight", model.dtype, (model.num_experts, hidden, inner)),
            lambda: self._experts.down(layer),
            lambda weight, rank: _share(weight, 1, rank, size),
        )

    def _attention(self, source: str, name: str) -> _Part:
        """A rank's query heads, key heads and value heads, one below the other.

        Where there are fewer key-value heads than ranks, neighbouring ranks hold the same one.
        """
        model, size = self._model, self._tp_size
        repeats = max(1, size // model.num_key_value_heads)
        heads = {"q": model.num_attention_heads, "k": model.num_key_value_heads, "v": model.num_key_value_heads}

        def read() -> Iterator[list[Array]]:
            weights = []
            for kind, count in heads.items():
                shape = (count * model.head_dim, model.hidden_size)
                weight = self._tensors.read(f"{source}.self_attn.{kind}_proj.weight", shape)
                by_head = weight.reshape(count, model.head_dim, model.hidden_size)
                weights.append(by_head if kind == "q" else np.repeat(by_head, repeats, axis=0))
            yield weights

        def take(weights: list[Array], rank: int) -> Array:
            return np.concatenate([_share(weight, 0, rank, size) for weight in weights])

        rows = (heads["q"] + 2 * repeats * heads["k"]) // size * model.head_dim
        return _Part(TensorSpec(name, model.dtype, (rows, model.hidden_size)), read, take)

    def _whole(self, name: str, source: str, shape: tuple[int, ...], dtype: str | None = None) -> _Part:
        """A tensor that every rank of its stage has."""
        spec = TensorSpec(name, dtype or self._model.dtype, shape)
        return _Part(spec, lambda: iter([self._tensors.read(source, shape)]), lambda weight, _: weight)


def _share(weight: Array, axis: int, rank: int, size: int) -> Array:
    """The `rank`-th of `size` equal parts along an axis."""
    return np.split(weight, size, axis)[rank]
