# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of `checkpoints.py` with int8 or int4 weights in the format `compressed-tensors`, which vLLM reads.

    python benchmarks/_peers/write_compressed_tensors.py CHECKPOINT int8|int4 OUTPUT

int8 has a scale for each row and lets vLLM round activations to int8 by token, the only int8 that its experts have on a
CPU; int4 has one for each 128 neighbours. Routers, embedding and head stay bfloat16, as in published checkpoints.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

GROUP = 128


def int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """[rows, columns] as integers with one scale a row."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).clamp_min(1e-8)
    values = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
    return {"weight": values, "weight_scale": scale.to(torch.bfloat16)}


def int4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """[rows, columns] as integers with one scale a group, eight in an int32, the first in the lowest bits."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // GROUP, GROUP)
    scale = (groups.abs().amax(2, keepdim=True) / 7).clamp_min(1e-8)
    values = ((groups / scale).round().clamp(-8, 7) + 8).to(torch.uint8).view(rows, columns // 2, 2)
    packed = (values[..., 0] | values[..., 1] << 4).view(torch.int32)  # little-endian
    shape = torch.tensor([rows, columns], dtype=torch.int64)
    return {"weight_packed": packed, "weight_scale": scale.view(rows, -1).to(torch.bfloat16), "weight_shape": shape}


def quantization_config(weights: str) -> dict[str, Any]:
    """The entry of config.json."""
    integers: dict[str, Any] = {"num_bits": int(weights[3:]), "type": "int", "symmetric": True, "dynamic": False}
    activations: dict[str, Any] | None = None
    if weights == "int8":
        integers["strategy"] = "channel"
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    else:
        integers |= {"strategy": "group", "group_size": GROUP}
    layout = "int-quantized" if weights == "int8" else "pack-quantized"
    group = {"targets": ["Linear"], "weights": integers, "input_activations": activations, "format": layout}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head", r"re:.*block_sparse_moe\.gate$", r"re:.*mlp\.gate$"],
        "config_groups": {"group_0": group},
    }


def write(checkpoint: Path, weights: str, output: Path) -> None:
    """Write the checkpoint's copy."""
    torch.set_num_threads(1)  # thousands of small tensors: on a busy machine two threads wait for one another
    quantize = {"int8": int8, "int4": int4}[weights]
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            tensor, (owner, _, _) = file.get_tensor(name), name.rpartition(".weight")
            if owner.endswith(("_proj", ".w1", ".w2", ".w3")):
                tensors |= {f"{owner}.{part}": value for part, value in quantize(tensor).items()}
            else:
                tensors[name] = tensor
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(checkpoint, output, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"] = quantization_config(weights)
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
