# SPDX-License-Identifier: Apache-2.0
"""``adaptive-k convert``: write TensorRT-LLM's checkpoint; flags are named as its own converters'."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="Hugging Face checkpoint of a Mixtral")
    parser.add_argument("--output_dir", type=Path, required=True, help="TensorRT-LLM checkpoint directory to make")
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"], help="of the weights; default: the checkpoint's"
    )
    parser.add_argument("--tp_size", type=int, default=1, help="GPUs that share each layer; default: %(default)s")
    parser.add_argument("--pp_size", type=int, default=1, help="GPUs that share the layers; default: %(default)s")
    parser.add_argument("--use_weight_only", action="store_true", help="have trtllm-build quantise the weights")
    parser.add_argument(
        "--weight_only_precision", choices=["int8", "int4"], default="int8", help="of those; default: int8"
    )
    parser.add_argument("--policy", type=Path, help="policy file (JSON); default: only the trained top-k")
    parser.add_argument("--adaptive_k_policy", help="the policy of the engine; default: the file's default")


def run(args: argparse.Namespace) -> int:
    """Convert, with a progress bar where there is a terminal."""
    from adaptive_k_moe.engine_builder.commands.console import progress_bar, warnings_as_sentences
    from adaptive_k_moe.engine_builder.tensorrt_llm import convert

    with warnings_as_sentences(), progress_bar("converting") as progress:
        content = convert(
            args.checkpoint_dir,
            args.output_dir,
            dtype=args.dtype,
            tp_size=args.tp_size,
            pp_size=args.pp_size,
            weight_only_precision=args.weight_only_precision if args.use_weight_only else None,
            policy=args.policy,
            adaptive_k_policy=args.adaptive_k_policy,
            progress=progress,
        )
    mapping = content["mapping"]
    print(
        f"converted {args.output_dir}: {content['architecture']}, {content['dtype']}, {mapping['world_size']} ranks "
        f"(tp_size {mapping['tp_size']}, pp_size {mapping['pp_size']}), policy {content['adaptive_k']['policy']}"
    )
    return 0
