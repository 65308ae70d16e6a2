# SPDX-License-Identifier: Apache-2.0
r"""What each precision costs in quality and takes in bytes: perplexity and KL divergence to the float32 engine.

    python benchmarks/weight_only.py --checkpoint_dir examples/models/mixtral-small \
        --text examples/models/mixtral-small/heldout.txt

Each row is a build for the target "openvino", run on this machine's processor with every expert of the trained top-k.
A window goes through in steps of 16 tokens, so that most keys and values are read from the cache. With
``--target onnx`` the builds are run by ONNX Runtime in float32 arithmetic: the figures are then those of the stored
weights alone. Intervals are 95 %, by bootstrap over the windows, paired with the float32 run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from adaptive_k_moe.calibration.bootstrap import mean, perplexity_change
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import EngineConfig, Target
from adaptive_k_moe.model_config import Dtype, KvCacheDtype, QuantAlgo
from adaptive_k_moe.runtime.perplexity import negative_log_likelihood
from adaptive_k_moe.runtime.session import StepInput, create_session
from adaptive_k_moe.runtime.tokenizer import Tokenizer

from _results import write_results

CHUNK = 16
"""Tokens of a window in a step."""


class Precision(NamedTuple):
    """What a row of the table is: options of a build, and of the cache."""

    dtype: Dtype
    quant_algo: QuantAlgo | None = None
    kv_cache_dtype: KvCacheDtype = "auto"


PRECISIONS: dict[Target, list[Precision]] = {
    "openvino": [
        Precision("float32"),
        Precision("float32", None, "int8"),
        Precision("bfloat16"),
        Precision("bfloat16", None, "int8"),
        Precision("float32", "W8A16"),
        Precision("float32", "W8A8"),
        Precision("bfloat16", "W8A8"),
        Precision("float32", "W4A16"),
        Precision("float32", "W4A8"),
        Precision("bfloat16", "W4A8"),
    ],
    "onnx": [Precision("float32"), Precision("float32", "W8A16"), Precision("float32", "W4A16")],
}

Logits = npt.NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_dir", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--target", choices=["openvino", "onnx"], default="openvino", help="default: %(default)s")
    parser.add_argument("--window", type=int, default=128, help="tokens in a window; default: %(default)s")
    parser.add_argument("--max_windows", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--num_threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/weight_only.json"))
    args = parser.parse_args()
    ids = Tokenizer.from_dir(args.checkpoint_dir).encode(args.text.read_text(encoding="utf-8"))
    count = min(len(ids) // args.window, args.max_windows)
    windows = np.array(ids[: count * args.window]).reshape(count, args.window)
    rows: list[dict[str, Any]] = []
    full: list[Logits] = []
    for precision in PRECISIONS[args.target]:
        with tempfile.TemporaryDirectory() as scratch:
            engine = Path(scratch) / "engine"
            config = build(
                args.checkpoint_dir,
                engine,
                target=args.target,
                dtype=precision.dtype,
                quant_algo=precision.quant_algo,
                max_seq_len=args.window,
            )
            reading = read_session if args.target == "openvino" else read
            logits = reading(engine, config, windows, args.num_threads, precision.kv_cache_dtype)
        full = full or logits
        rows.append({**describe(config, precision), **compare(logits, full, windows)})
    show(rows)
    content = {
        "model": args.checkpoint_dir.name,
        "target": args.target,
        "text": args.text.name,
        "windows": count,
        "window": args.window,
    }
    write_results(args.output, {**content, "rows": rows})


def describe(config: EngineConfig, precision: Precision) -> dict[str, Any]:
    """A build's precision and the size of its weights."""
    quantization, files = config.pretrained_config.quantization, config.files
    groups = quantization.group_size if quantization is not None else None
    size = sum(entry.size for name, entry in files.items() if name in ("rank0.bin", "model.onnx.data"))
    return {**precision._asdict(), "group_size": groups, "bytes": size}


def compare(logits: list[Logits], full: list[Logits], windows: npt.NDArray[Any]) -> dict[str, Any]:
    """Quality beside that of float32 weights."""

    def losses(of: list[Logits]) -> npt.NDArray[np.float64]:
        pairs = zip(of, windows.tolist(), strict=True)
        return np.array([negative_log_likelihood(rows, window) / (len(window) - 1) for rows, window in pairs])

    pairs = list(zip(full, logits, strict=True))
    nll = losses(logits)
    return {
        "perplexity": float(np.exp(nll.mean())),
        "change": perplexity_change(nll, losses(full)).to_json(),
        "kl": mean(np.array([divergence(left, right) for left, right in pairs])).to_json(),
        "same_top_token": float(np.mean([(left.argmax(-1) == right.argmax(-1)).mean() for left, right in pairs])),
    }


def read_session(
    engine: Path, config: EngineConfig, windows: npt.NDArray[Any], num_threads: int, kv_cache_dtype: KvCacheDtype
) -> list[Logits]:
    """Logits of every window, [n, V] each, one window after another in steps of `CHUNK` tokens."""
    session = create_session(engine, config, num_threads=num_threads, kv_cache_dtype=kv_cache_dtype)
    tables, length = config.policy_tables(), windows.shape[1]
    session.set_policies(tables)
    blocks = list(range(-(-length // session.block_size)))
    slots = np.zeros(1, np.int32) if config.pretrained_config.mamba is not None else None
    logits = []
    for window in windows:
        steps = []
        for past in range(0, length, CHUNK):
            tokens = window[past : past + CHUNK]
            step = StepInput(
                input_ids=tokens,
                position_ids=np.arange(past, past + len(tokens)),
                policy_index=np.full(len(tokens), tables.index("full"), np.int32),
                past_lens=np.array([past], np.int32),
                subsequence_begins=np.array([0, len(tokens)], np.int32),
                block_tables=[blocks[: -(-(past + len(tokens)) // session.block_size)]],
                state_slots=slots,
                logits_indices=np.arange(len(tokens)),
            )
            steps.append(session.step(step).logits)
        logits.append(np.concatenate(steps))
    session.close()
    return logits


def read(
    engine: Path, config: EngineConfig, windows: npt.NDArray[Any], num_threads: int, kv_cache_dtype: KvCacheDtype
) -> list[Logits]:
    """Logits of every window, [n, V] each, by ONNX Runtime."""
    assert kv_cache_dtype == "auto"
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    # Further optimisations round activations, too: not what is measured here.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(engine / "model.onnx", options, providers=["CPUExecutionProvider"])
    tables, model, length = config.policy_tables(), config.pretrained_config, windows.shape[1]
    past = np.zeros((1, model.num_key_value_heads, 0, model.head_dim), np.float32)
    feed = {
        "position_ids": np.arange(length)[None],
        "logits_indices": np.arange(length),
        "policy_index": np.full(length, tables.index("full"), np.int32),
        "policy_kind": tables.policy_kind,
        "thresholds": tables.thresholds,
        "k_values": tables.k_values,
        "expert_norms": tables.expert_norms,
        **{f"past_key_values.{layer}.{kind}": past for layer in model.attention_layers for kind in ("key", "value")},
    }
    if model.mamba is not None:
        feed |= {
            "past_lens": np.zeros(1, np.int32),
            "subsequence_begins": np.array([0, length], np.int32),
            "state_slots": np.zeros(1, np.int32),
        }
        for layer in model.mamba.layers:
            feed[f"conv_state.{layer}"] = np.zeros((1, *model.mamba.conv_state_shape), np.float32)
            feed[f"ssm_state.{layer}"] = np.zeros((1, *model.mamba.ssm_state_shape), np.float32)
    return [session.run(["logits"], {**feed, "input_ids": window[None]})[0] for window in windows]


def divergence(full: Logits, own: Logits) -> float:
    """Mean over the rows of KL(full || own), in nats."""

    def log_probabilities(logits: Logits) -> npt.NDArray[np.float64]:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))

    left, right = log_probabilities(full), log_probabilities(own)
    return float((np.exp(left) * (left - right)).sum(-1).mean())


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("dtype", "quant_algo", "KV cache", "MB", "perplexity", "change", "KL, nats", "same top token")
    for row in rows:
        change, kl = row["change"], row["kl"]
        groups = f", groups of {row['group_size']}" if row["group_size"] else ""
        algorithm = f"{row['quant_algo'] or ''}{groups}"
        table.add_row(
            row["dtype"],
            algorithm,
            row["kv_cache_dtype"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['perplexity']:.3f}",
            f"{change['value']:+.2%} ({change['low']:+.2%} to {change['high']:+.2%})",
            f"{kl['value']:.5f}",
            f"{row['same_top_token']:.1%}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
