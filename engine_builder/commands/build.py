# SPDX-License-Identifier: Apache-2.0
"""``adaptive-k build``: convert a checkpoint into an engine; flags are named as `trtllm-build`'s."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="Hugging Face checkpoint directory")
    parser.add_argument("--output_dir", type=Path, help="engine directory to make; needed but for --dry_run")
    parser.add_argument(
        "--target", choices=["openvino", "tensorrt", "torch", "onnx"], default="openvino", help="default: %(default)s"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; default: the checkpoint's"
    )
    parser.add_argument("--use_weight_only", action="store_true", help="quantise the weights")
    parser.add_argument("--weight_only_precision", choices=["int8", "int4"], help="of quantised weights; default: int8")
    parser.add_argument(
        "--quant_algo",
        choices=["W8A16", "W8A8", "W4A16", "W4A8"],
        help="quantise to these bits of weights and activations; default with --use_weight_only: A8 for openvino, "
        "A16 for the other targets",
    )
    parser.add_argument(
        "--group_size", type=int, help="int4 that share a scale: 128, 64 or 32; default: the most that fits the model"
    )
    parser.add_argument("--policy", type=Path, help="policy file (JSON); default: only the trained top-k")
    parser.add_argument("--max_batch_size", type=int, default=16, help="sequences in a step; default: %(default)s")
    parser.add_argument("--max_input_len", type=int, help="tokens of a prompt; default: one less than max_seq_len")
    parser.add_argument("--max_seq_len", type=int, help="tokens of a sequence; default: the model's, 4096 at most")
    parser.add_argument("--max_num_tokens", type=int, help="tokens in a step; default: 512")
    parser.add_argument("--timing_cache", type=Path, help="tensorrt: file of kernel timings to use and extend")
    parser.add_argument(
        "--dry_run", action="store_true", help="tensorrt: check graph and sizes without a GPU; build nothing"
    )
    parser.add_argument("--force", action="store_true", help="replace an engine that is already there")


def run(args: argparse.Namespace) -> int:
    """Build, with a progress bar where there is a terminal."""
    from adaptive_k_moe.engine_builder import build
    from adaptive_k_moe.engine_builder.commands.console import progress_bar, warnings_as_sentences
    from adaptive_k_moe.errors import BuildError

    if args.dry_run:
        return _dry_run(args)
    if args.output_dir is None:
        raise BuildError("give --output_dir, the engine directory to make.")
    start = time.monotonic()
    with warnings_as_sentences(), progress_bar("building") as progress:
        config = build(
            args.checkpoint_dir,
            args.output_dir,
            target=args.target,
            policy=args.policy,
            timing_cache=args.timing_cache,
            force=args.force,
            progress=progress,
            **_asked(args),
        )
    if "tokenizer.json" not in config.files:
        print(
            f"adaptive-k: warning: {args.checkpoint_dir} has no tokenizer.json, so the engine takes token ids and no "
            f"text: save the model's tokenizer with transformers and put its files into {args.output_dir}.",
            file=sys.stderr,
        )
    size = sum(entry.size for entry in config.files.values())
    quantised = config.pretrained_config.quantization is not None
    weights = f", {config.pretrained_config.weight_format} weights" if quantised else ""
    print(
        f"built {args.output_dir}: {config.pretrained_config.architecture}, {config.build_config.target}, "
        f"{config.pretrained_config.dtype}{weights}, {size / 1e6:.1f} MB, "
        f"policies {', '.join(config.adaptive_k.policies)} in {time.monotonic() - start:.1f} s"
    )
    return 0


def _dry_run(args: argparse.Namespace) -> int:
    """Print what a TensorRT engine would be; 1 where TensorRT refuses it."""
    from adaptive_k_moe.engine_builder.build import dry_run
    from adaptive_k_moe.engine_builder.commands.console import progress_bar
    from adaptive_k_moe.errors import BuildError

    if args.target != "tensorrt":
        raise BuildError("--dry_run is for --target tensorrt: the other targets build on every machine.")
    with progress_bar("building") as progress:
        found = dry_run(
            args.checkpoint_dir,
            progress=progress,
            **_asked(args),
        )
    print("\n".join(found.lines()))
    return int(found.failed)


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """What a build and a dry run are asked alike."""
    precision = args.weight_only_precision
    if args.quant_algo is None:
        precision = (precision or "int8") if args.use_weight_only else None
    return {
        "dtype": args.dtype,
        "weight_only_precision": precision,
        "quant_algo": args.quant_algo,
        "group_size": args.group_size,
        "max_batch_size": args.max_batch_size,
        "max_input_len": args.max_input_len,
        "max_seq_len": args.max_seq_len,
        "max_num_tokens": args.max_num_tokens,
    }
