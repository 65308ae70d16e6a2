# SPDX-License-Identifier: Apache-2.0
"""Random models of published layer shapes whose routers choose as trained ones do.

Weights are random; the routing is not. The embedding of each token holds, beside noise, the router logits that a
bundled trained model had at one position of its held-out text, in all of its layers; each router reads those of one
layer out again. Nothing else writes to these dimensions of the hidden states, and all embeddings have the same norm. So
skew, correlation and sharpness are a trained model's, and the checkpoint is an ordinary one: every engine can run it.

A shape with more experts than the trained model takes the logits of several of its layers side by side. A shape has a
few of the published layers, and as large a share of the published vocabulary, so that the head weighs in a step as it
does in the whole model.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.calibrate_decode import DecodeLaboratory
from adaptive_k_moe.calibration.decoding import DecodeReader
from adaptive_k_moe.calibration.engines import engine_of
from adaptive_k_moe.calibration.evaluator import Evaluator
from adaptive_k_moe.calibration.routers import RouterProbe
from adaptive_k_moe.calibration.windows import make_windows, read_text
from adaptive_k_moe.policy import FixedPolicy

MODELS = Path(__file__).resolve().parents[1] / "examples" / "models"
WINDOWS = 64
"""Texts that the tokens of a random model stand for: token `w * positions + p` is position p of text w."""

FIRST, LAST = 64, 192
"""Positions of a text that there are tokens for, so far as the vocabulary goes."""

NOISE = 2**20
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """A published model, some layers of it, and the bundled model that its routing is taken from.

    Attributes:
        model: the bundled model.
        config: transformers' class of its configuration.
        fields: the published values.
        layers: how many are built, in `fields`' spelling where they are of several kinds.
        published_layers: of the published model.
        vocab_size: of the published model.
    """

    model: str
    config: str
    fields: dict[str, Any]
    layers: int | list[str]
    published_layers: int
    vocab_size: int

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts that are built."""
        return self.layers if isinstance(self.layers, int) else self.layers.count("moe")

    @property
    def num_experts(self) -> int:
        """E."""
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        return int(next(self.fields[name] for name in names if name in self.fields))

    @property
    def rows(self) -> int:
        """The vocabulary that is built."""
        return max(2048, round(self.vocab_size * self.num_moe_layers / self.published_layers))

    @property
    def positions(self) -> int:
        """Of each text that there are tokens for."""
        return min(LAST - FIRST, self.rows // WINDOWS)


SHAPES = {
    "olmoe": Shape(
        "olmoe-small",
        "OlmoeConfig",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16,
         "num_experts": 64, "num_experts_per_tok": 8},
        3, 16, 50304,
    ),
    "qwen3": Shape(
        "olmoe-small",
        "Qwen3MoeConfig",
        {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32,
         "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
         "norm_topk_prob": True},
        2, 48, 151936,
    ),
    "nemotron": Shape(
        "nemotron-small",
        "NemotronHConfig",
        {"hidden_size": 2688, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
         "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856, "n_shared_experts": 1,
         "moe_shared_expert_intermediate_size": 3712, "mamba_num_heads": 64, "mamba_head_dim": 64,
         "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "n_group": 1, "topk_group": 1,
         "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        ["linear_attention", "moe", "full_attention"], 23, 131072,
    ),
    "mixtral": Shape(
        "mixtral-small",
        "MixtralConfig",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
         "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
        1, 32, 32000,
    ),
}  # fmt: skip
"""OLMoE-1B-7B, Qwen3-30B-A3B, Nemotron 3 Nano (30B-A3B) and Mixtral 8x7B."""


@dataclass(frozen=True, eq=False)
class TrainedRouting:
    """What the routers of a bundled model said of its held-out text.

    Attributes:
        logits: [WINDOWS, LAST - FIRST, L, E] raw router logits.
        correction_bias: [L, E], or None.
    """

    logits: npt.NDArray[np.float32]
    correction_bias: npt.NDArray[np.float32] | None


def small_engine(model: str, work_dir: Path) -> Path:
    """The bundled model's engine, with room for `WINDOWS` sequences."""
    return engine_of(MODELS / model, work_dir / f"engine-{model}", max_batch_size=WINDOWS)


@contextmanager
def damage_laboratory(
    model: str, batch: int, tokens: int, work_dir: Path, num_threads: int | None = None
) -> Iterator[DecodeLaboratory]:
    """Measures what policies cost a bundled model in decode steps of its held-out text.

    Args:
        model: its name.
        batch: sequences in a step.
        tokens: to decode in a measurement; at least those of one group of sequences.
        work_dir: keeps engine and measurements.
        num_threads: of the engine.
    """
    with Evaluator(small_engine(model, work_dir), num_threads=num_threads) as evaluator:
        windows = make_windows(evaluator.tokenizer, {model: read_text(MODELS / model / "heldout.txt")}, LAST)
        reader = DecodeReader(evaluator, windows, batch, max_steps=max(LAST // 2 - 1, tokens // batch))
        full = FixedPolicy(kind="fixed", k=evaluator.full_k)
        yield DecodeLaboratory(reader, evaluator, full, work_dir / "damage" / f"{model}-{batch}", lambda *_: None)


@cache
def trained_routing(model: str, work_dir: Path) -> TrainedRouting:
    """Read windows of the held-out text that lie evenly in it, and see what the routers say."""
    with Evaluator(small_engine(model, work_dir)) as evaluator:
        windows = make_windows(evaluator.tokenizer, {model: read_text(MODELS / model / "heldout.txt")}, LAST)
        windows = windows.take(np.linspace(0, len(windows) - 1, WINDOWS).astype(np.int64))
        config = evaluator.config.pretrained_config
        probe = RouterProbe(config)
        logits = np.empty((WINDOWS, LAST - FIRST, config.num_moe_layers, config.num_experts), np.float32)
        with evaluator.with_session(probe.open):
            for batch in evaluator.batches(windows, evaluator.tables({}), 0):
                for layer in range(config.num_moe_layers):
                    seen, _ = probe.route(layer, config.num_experts_per_tok)
                    of_batch = seen.reshape(-1, LAST, config.num_experts)
                    logits[batch.windows, :, layer] = of_batch[:, FIRST:]
            biases = [probe.correction_bias(layer) for layer in range(config.num_moe_layers)]
    found = [bias for bias in biases if bias is not None]
    return TrainedRouting(logits, np.stack(found) if found else None)


def layers_beside(shape: Shape, trained_layers: int, trained_experts: int) -> list[list[int]]:
    """For each MoE layer of a shape, the trained layers whose logits it has, side by side."""
    each = shape.num_experts // trained_experts
    return [[(layer * each + part) % trained_layers for part in range(each)] for layer in range(shape.num_moe_layers)]


def shape_routing(shape: Shape, trained: TrainedRouting) -> TrainedRouting:
    """What the routers of a shape's model say of its tokens: [WINDOWS, positions, L, E]."""
    _, _, layers, experts = trained.logits.shape
    beside = layers_beside(shape, layers, experts)
    logits = [
        np.concatenate([trained.logits[:, : shape.positions, each] for each in parts], axis=-1) for parts in beside
    ]
    bias = trained.correction_bias
    return TrainedRouting(
        np.stack(logits, axis=2),
        None if bias is None else np.stack([np.concatenate([bias[each] for each in parts]) for parts in beside]),
    )


def shape_checkpoint(name: str, work_dir: Path) -> Path:
    """The checkpoint of a shape in `work_dir`, written where it is not there yet."""
    directory = work_dir / f"{name}-checkpoint"
    if not (directory / "config.json").exists():
        print(f"random checkpoint of {name}'s shape", flush=True)
        shutil.rmtree(directory, ignore_errors=True)
        random_checkpoint(SHAPES[name], directory, work_dir)
    return directory


def random_checkpoint(shape: Shape, directory: Path, work_dir: Path) -> Path:
    """Write a shape's checkpoint in bfloat16, with the tokenizer of the bundled model.

    Args:
        shape: the model.
        directory: where it will be.
        work_dir: keeps the bundled model's engine.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    trained = trained_routing(shape.model, work_dir)
    fields = {**shape.fields, "vocab_size": shape.rows, "tie_word_embeddings": False, "max_position_embeddings": 4096}
    key = "num_hidden_layers" if isinstance(shape.layers, int) else "layers_block_type"
    config = getattr(transformers, shape.config)(**fields, **{key: shape.layers}, eos_token_id=2)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    _, _, layers, experts = trained.logits.shape
    carried = layers * experts
    embeddings, scale = carrying_embeddings(shape, trained, config.hidden_size)
    beside = iter(layers_beside(shape, layers, experts))
    bias = iter(() if trained.correction_bias is None else shape_routing(shape, trained).correction_bias)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(NOISE, np.float32)).to(torch.bfloat16)
    tensors = {}
    for name, parameter in model.state_dict().items():
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16)
        kind = name.split(".")[-2] if name.endswith(".weight") else name.rsplit(".", 1)[-1]
        if kind in ("embed_tokens", "embeddings"):
            tensor[:] = torch.from_numpy(embeddings)
        elif kind == "gate":
            tensor.zero_()
            for part, layer in enumerate(next(beside)):
                for expert in range(experts):
                    tensor[part * experts + expert, layer * experts + expert] = scale
        elif kind == "e_score_correction_bias":
            tensor[:] = torch.from_numpy(next(bias))
        elif "norm" in kind or kind == "D":
            tensor.fill_(1)
        elif tensor.ndim == 1 or kind == "A_log":
            tensor.zero_()
        else:
            writes = kind in ("o_proj", "out_proj", "down_proj")  # to the hidden states
            flat, size = tensor.view(-1), noise.numel()
            # Another beginning for each tensor: OpenVINO keeps equal weights once, so they would be read from a cache.
            scaled = noise.roll(1009 * len(tensors)) * (0.002 if writes else 0.02)
            for begin in range(0, flat.numel(), size):
                piece = flat[begin : begin + size]
                piece.copy_(scaled[: piece.numel()])
            if writes:
                tensor[..., :carried, :] = 0
        tensors[name] = tensor
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config.architectures = [type(model).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / file).write_bytes((MODELS / shape.model / file).read_bytes())
    return directory


def carrying_embeddings(shape: Shape, trained: TrainedRouting, hidden_size: int) -> tuple[Array, float]:
    """[rows, hidden_size] embeddings of mean square 1 that hold a token's logits over a scale, and that scale."""
    logits = trained.logits[:, : shape.positions].reshape(WINDOWS * shape.positions, -1)
    logits = logits[np.arange(shape.rows) % len(logits)]
    squares = np.square(logits, dtype=np.float64).sum(axis=1)
    scale = float(2.0 ** math.ceil(math.log2(math.sqrt(2 * squares.max() / hidden_size))))  # exact in any format
    rest = np.random.default_rng(1).standard_normal((shape.rows, hidden_size - logits.shape[1]))
    left = hidden_size - squares / scale**2
    rest *= np.sqrt(left / np.square(rest).sum(axis=1))[:, None]
    return np.concatenate([logits / scale, rest], axis=1).astype(np.float32), scale


def shape_tokens(shape: Shape, length: int) -> npt.NDArray[np.int64]:
    """[WINDOWS, length] tokens: positions of each text in their order."""
    if length > shape.positions:
        raise ValueError(f"this shape has tokens for {shape.positions} positions, not {length}")
    return np.arange(WINDOWS)[:, None] * shape.positions + np.arange(length)
