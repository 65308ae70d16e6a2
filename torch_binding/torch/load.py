# SPDX-License-Identifier: Apache-2.0
"""Loads a process's part of a model from a checkpoint, for expert parallel."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adaptive_k_moe.engine_builder.checkpoint import CheckpointTensors, HfConfig
from adaptive_k_moe.engine_builder.models import architecture_of
from adaptive_k_moe.torch.adapt import moe_blocks, weight_names
from adaptive_k_moe.torch.expert_parallel import ExpertShare, mark

# In either layout of a checkpoint: a tensor an expert, or one for all.
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
_EXPERTS = re.compile(r".*\.experts\.(?:gate_up_proj|up_proj|down_proj)")


def load_expert_parallel(checkpoint_dir: str | Path, expert_parallel_group: Any, **options: Any) -> Any:
    """A model of `transformers` that holds this process's experts alone. Those of others are not read.

    It runs once `adapt(model, ..., expert_parallel_group=...)` has put the operator into it, with the same group.

    Args:
        checkpoint_dir: a directory with `config.json` and safetensors, of an architecture that `adapt` takes.
        expert_parallel_group: a group of `torch.distributed`.
        options: of `from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        BuildError: see `ExpertShare`.
        CheckpointError: the architecture is not known, or the checkpoint is not whole.
    """
    import transformers

    directory = Path(checkpoint_dir)
    hf_config = HfConfig.read(directory)
    model_config = architecture_of(hf_config).read_config(hf_config, "float32")
    share = ExpertShare(expert_parallel_group, model_config.num_experts)
    config = transformers.AutoConfig.from_pretrained(directory)
    whole = getattr(transformers, config.architectures[0])

    def make(self: Any, *arguments: Any, **keywords: Any) -> None:
        whole.__init__(self, *arguments, **keywords)
        for block in moe_blocks(self):
            for name in weight_names(model_config):
                weight = getattr(block.experts, name)
                part = weight.new_empty((share.end - share.first, *weight.shape[1:]))
                setattr(block.experts, name, torch.nn.Parameter(part, requires_grad=False))

    options.setdefault("dtype", config.dtype or torch.float32)
    part: Any = type(whole.__name__, (whole,), {"__init__": make, "__module__": whole.__module__})
    with ExitStack() as files:
        model = part.from_pretrained(None, config=config, state_dict=_tensors(directory, share, files), **options)
    model.__class__ = whole
    if (directory / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    for block in moe_blocks(model):
        mark(block.experts, share.first, share.end)
    return model.eval()


def _tensors(directory: Path, share: ExpertShare, files: ExitStack) -> dict[str, Any]:
    """The checkpoint's tensors as transformers loads them: not read yet, and of experts those of the share alone."""
    found: dict[str, Any] = {}
    for shard in CheckpointTensors(directory).shards():
        file = files.enter_context(safe_open(shard, framework="pt"))
        for name in file.keys():  # noqa: SIM118, a file is no mapping
            if one := _EXPERT.fullmatch(name):
                expert = int(one.group(2))
                if share.first <= expert < share.end:
                    found[f"{one.group(1)}{expert - share.first}{one.group(3)}"] = file.get_slice(name)
            elif _EXPERTS.fullmatch(name):
                # In memory of its own: a slice would keep the whole file mapped.
                found[name] = file.get_slice(name)[share.first : share.end].clone()
            else:
                found[name] = file.get_slice(name)
    return found
