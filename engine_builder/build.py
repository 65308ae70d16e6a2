# SPDX-License-Identifier: Apache-2.0
"""`build`: a checkpoint becomes an engine directory, whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

from adaptive_k_moe.arguments import check_arguments
from adaptive_k_moe.engine_builder.checkpoint import CheckpointTensors, HfConfig
from adaptive_k_moe.engine_builder.graph import GraphBuilder
from adaptive_k_moe.engine_builder.graph.weight_only import plan_weight_only
from adaptive_k_moe.engine_builder.models import architecture_of
from adaptive_k_moe.engine_builder.output_dir import check_output, replace, written_beside
from adaptive_k_moe.engine_builder.targets import lower
from adaptive_k_moe.engine_config import (
    ENGINE_VERSION,
    BuildConfig,
    EngineConfig,
    Target,
    file_entry,
    write_engine_config,
)
from adaptive_k_moe.errors import BuildError
from adaptive_k_moe.model_config import Dtype, PretrainedConfig, QuantAlgo, WeightOnlyPrecision
from adaptive_k_moe.policy import PolicySet, read_policy_file

if TYPE_CHECKING:
    from adaptive_k_moe.engine_builder.models.decoder import Decoder
    from adaptive_k_moe.engine_builder.targets.tensorrt import DryRun

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

# A page of the KV cache must not be most of a small model's memory.
_DEFAULT_MAX_SEQ_LEN = 4096


def build(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    *,
    target: Target = "openvino",
    dtype: Dtype | None = None,
    weight_only_precision: WeightOnlyPrecision | None = None,
    quant_algo: QuantAlgo | None = None,
    group_size: int | None = None,
    policy: str | Path | PolicySet | None = None,
    max_batch_size: int = 16,
    max_input_len: int | None = None,
    max_seq_len: int | None = None,
    max_num_tokens: int | None = None,
    timing_cache: str | Path | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> EngineConfig:
    """Convert a checkpoint into an engine directory.

    The directory is written under a temporary name beside `output_dir` and renamed when it is whole.
    Memory in use stays at a few of the model's layers; weights go from file to file.

    Args:
        checkpoint_dir: Hugging Face checkpoint (``config.json`` and safetensors).
        output_dir: the engine directory to make; it must not exist yet unless `force`.
        target: "openvino" (any CPU), "tensorrt" (the GPU at hand), "torch" (any GPU or CPU that torch has) or "onnx"
            (the specification, for a plain ONNX Runtime).
        dtype: of the weights; None is the checkpoint's own, or the nearest that the target has.
        weight_only_precision: store weights as "int8" or "int4"; None does not unless `quant_algo` says so.
        quant_algo: bits of weights and activations, "W8A16", "W8A8", "W4A16" or "W4A8"; None is that of
            `weight_only_precision`, with activations rounded to int8 for "openvino" and kept for the other targets.
        group_size: int4 that share a scale: 128, 64 or 32; None is the largest that fits the model.
        policy: policy file or set; None gives the engine `full` alone.
        max_batch_size: most sequences in one step.
        max_input_len: most tokens of a prompt; None is one less than `max_seq_len`.
        max_seq_len: most tokens of a sequence; None is the model's own limit, 4096 at most.
        max_num_tokens: most tokens in one step; None is 512, and never under `max_batch_size`.
        timing_cache: file of kernel timings, which TensorRT's builder reads if it is there, and writes.
        force: replace an engine directory that is already there.
        progress: called with a part's name, the parts done and their number.

    Returns:
        The configuration as written.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete or of an unsupported kind.
        BuildError: it cannot be built as asked.
        PolicyError: the policies do not fit the model.
    """
    check_arguments(BuildError, str | PathLike, checkpoint_dir=checkpoint_dir, output_dir=output_dir)
    check_arguments(BuildError, str | PathLike | PolicySet | None, policy=policy)
    check_arguments(BuildError, str | PathLike | None, timing_cache=timing_cache)
    check_arguments(BuildError, Callable | None, progress=progress)
    check_arguments(BuildError, bool, force=force)
    source, output = Path(checkpoint_dir), Path(output_dir)
    output = check_output(output, source, force=force)
    sizes = Sizes(max_batch_size, max_input_len, max_seq_len, max_num_tokens)
    given = policy if isinstance(policy, PolicySet) else read_policy_file(policy) if policy else PolicySet()
    plan = _plan(source, target, dtype, weight_only_precision, quant_algo, group_size, sizes, given)
    model, build_config = plan.model, plan.build_config
    if target == "tensorrt":
        from adaptive_k_moe.engine_builder.targets.tensorrt import require_tensorrt

        require_tensorrt()  # before hours of writing weights
    policies = plan.policies

    with written_beside(output, "engine") as temporary:
        total = model.num_hidden_layers + 4  # embedding, layers, head, lowering, hashes
        done = 0

        def report(part: str) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(part, done, total)

        _write_graph(plan, temporary / "model.onnx", report)
        lower(
            temporary,
            model,
            build_config,
            timing_cache=None if timing_cache is None else Path(timing_cache),
            progress=None if progress is None else lambda phase: progress(f"TensorRT: {phase}", done, total),
        )
        report("lowering")
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        files = {path.name: file_entry(path) for path in sorted(temporary.iterdir())}
        report("hashes")
        config = EngineConfig(
            version=ENGINE_VERSION,
            pretrained_config=model,
            build_config=build_config,
            adaptive_k=policies,
            files=files,
        )
        write_engine_config(temporary, config)
        check_output(output, source, force=force)  # again: a long build leaves time for others to write there
        replace(output, temporary)
    return config


def dry_run(
    checkpoint_dir: str | Path,
    *,
    dtype: Dtype | None = None,
    weight_only_precision: WeightOnlyPrecision | None = None,
    quant_algo: QuantAlgo | None = None,
    group_size: int | None = None,
    max_batch_size: int = 16,
    max_input_len: int | None = None,
    max_seq_len: int | None = None,
    max_num_tokens: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> DryRun:
    """Lower a checkpoint for TensorRT and compile it as far as a machine without a GPU can.

    The graph and its weights are written to a temporary directory and dropped again.

    Args:
        checkpoint_dir: Hugging Face checkpoint.
        dtype: "float16" or "bfloat16"; None is the checkpoint's own, or float16.
        weight_only_precision: as for `build`.
        quant_algo: as for `build`.
        group_size: as for `build`.
        max_batch_size: most sequences in one step.
        max_input_len: as for `build`.
        max_seq_len: most tokens of a sequence, which is the cache's length.
        max_num_tokens: most tokens of a chunk of a prompt.
        progress: called with a part's name, the parts done and their number.

    Returns:
        The engine's inputs and outputs, and what was proved.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete or of an unsupported kind.
        BuildError: it cannot be built as asked.
    """
    from adaptive_k_moe.engine_builder.targets.tensorrt import dry_run as dry_run_for_tensorrt

    check_arguments(BuildError, str | PathLike, checkpoint_dir=checkpoint_dir)
    check_arguments(BuildError, Callable | None, progress=progress)
    sizes = Sizes(max_batch_size, max_input_len, max_seq_len, max_num_tokens)
    plan = _plan(
        Path(checkpoint_dir), "tensorrt", dtype, weight_only_precision, quant_algo, group_size, sizes, PolicySet()
    )
    total, done = plan.model.num_hidden_layers + 3, 0

    def report(part: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(part, done, total)

    with tempfile.TemporaryDirectory(prefix="adaptive-k-") as directory:
        try:
            _write_graph(plan, Path(directory) / "model.onnx", report)
            report("lowering")
            return dry_run_for_tensorrt(Path(directory), plan.model, plan.build_config)
        except OSError as error:
            raise BuildError(f"cannot write the graph to {directory}: {error.strerror or error}.") from error


class Sizes(NamedTuple):
    """The sizes asked for; None is for a default of the model's."""

    max_batch_size: int
    max_input_len: int | None
    max_seq_len: int | None
    max_num_tokens: int | None


@dataclass(frozen=True)
class _Plan:
    """A checkpoint, and what is to become of it."""

    source: Path
    architecture: type[Decoder]
    model: PretrainedConfig
    build_config: BuildConfig
    policies: PolicySet


def _plan(
    source: Path,
    target: Target,
    dtype: Dtype | None,
    weight_only_precision: WeightOnlyPrecision | None,
    quant_algo: QuantAlgo | None,
    group_size: int | None,
    sizes: Sizes,
    policies: PolicySet,
) -> _Plan:
    check_arguments(BuildError, Target, target=target)
    check_arguments(BuildError, Dtype | None, dtype=dtype)
    check_arguments(BuildError, WeightOnlyPrecision | None, weight_only_precision=weight_only_precision)
    check_arguments(BuildError, QuantAlgo | None, quant_algo=quant_algo)
    check_arguments(BuildError, int, max_batch_size=sizes.max_batch_size)
    check_arguments(BuildError, int | None, group_size=group_size, **sizes._asdict())
    hf_config = HfConfig.read(source)
    hf_config.require("quantization_config", None)
    architecture = architecture_of(hf_config)
    model = architecture.read_config(hf_config, _dtype(hf_config, target, dtype))
    quantization = plan_weight_only(model, target, weight_only_precision, quant_algo, group_size)
    model = model.model_copy(update={"quantization": quantization})
    policies = model.fit_policies(policies)
    build_config = _build_config(model, target, sizes, max(model.largest_k(policies).values()))
    return _Plan(source, architecture, model, build_config, policies)


def _write_graph(plan: _Plan, path: Path, report: Callable[[str], None]) -> None:
    """Write the one graph, which every target starts from."""
    architecture, model = plan.architecture, plan.model
    tensors = CheckpointTensors(plan.source)
    with GraphBuilder(path, architecture.__name__) as graph:
        architecture(model, plan.build_config, tensors, graph).build(report)
        tensors.require_all_used(architecture.__name__, architecture.unread_tensors(model))
        graph.save({"adaptive_k.pretrained_config": json.dumps(model.model_dump(mode="json"))})


def _dtype(config: HfConfig, target: Target, asked: Dtype | None) -> Dtype:
    """The dtype asked for if the target has it, or else the checkpoint's own or nearest.

    On CPUs float16 widens to float32, which holds all of it; TensorRT's attention has only 16-bit kernels.
    """
    choices = {"tensorrt": ("float16", "bfloat16"), "openvino": ("float32", "bfloat16")}.get(target, get_args(Dtype))
    if asked is not None and asked not in choices:
        raise BuildError(f"the {target} target has no dtype {asked!r}: it is one of {', '.join(choices)}.")
    own = config.optional("dtype", str) or config.optional("torch_dtype", str)
    return asked or ("bfloat16" if own == "bfloat16" else "float16" if target == "tensorrt" else "float32")


def _build_config(model: PretrainedConfig, target: Target, sizes: Sizes, max_k: int) -> BuildConfig:
    max_batch_size, input_len, seq_len, num_tokens = sizes
    if seq_len is None:
        seq_len = min(model.max_position_embeddings, _DEFAULT_MAX_SEQ_LEN)
    if num_tokens is None:
        num_tokens = max(512, max_batch_size)
    if input_len is None:
        input_len = max(1, seq_len - 1)
    names = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens")
    for name, value in zip(names, (max_batch_size, input_len, seq_len, num_tokens), strict=True):
        if value < 1:
            raise BuildError(f"{name} is {value}: it must be at least 1.")
    if input_len >= max(2, seq_len):
        raise BuildError(
            f"max_input_len {input_len} leaves no room for an answer in max_seq_len {seq_len}: it must be less."
        )
    if num_tokens < max_batch_size:
        raise BuildError(
            f"max_num_tokens {num_tokens} is below max_batch_size {max_batch_size}: a step of decode needs one token "
            "for each sequence."
        )
    if seq_len > model.max_position_embeddings:
        raise BuildError(
            f"max_seq_len {seq_len} is above the model's max_position_embeddings {model.max_position_embeddings}."
        )
    return BuildConfig(
        target=target,
        max_batch_size=max_batch_size,
        max_input_len=input_len,
        max_seq_len=seq_len,
        max_num_tokens=num_tokens,
        max_k=max_k,
    )
