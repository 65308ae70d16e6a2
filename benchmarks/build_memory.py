# SPDX-License-Identifier: Apache-2.0
"""Memory while a published model of full size is built, or while an engine is opened and serves.

    python benchmarks/build_memory.py                                  # Mixtral 8x7B, 93 GB of bfloat16
    python benchmarks/build_memory.py --config tests/configs/qwen3-30b-a3b.json
    python benchmarks/build_memory.py --config tests/configs/olmoe-1b-7b.json --target openvino
    python benchmarks/build_memory.py --serve ENGINE_DIR               # any engine, which two processes serve

A checkpoint's weights are zeros in sparse files. Every byte is read, converted, compared with zero and hashed as in
any build; only the graph's data file leaves holes where zeros would be written (`rank0.bin` of the openvino target
does not, so have room for it). "anonymous" is memory that must stay in RAM, sampled every 10 ms; "maxrss" counts pages
of mapped files too, which the system drops when it needs them. Serving is a prompt of as many tokens as a step takes
and 8 tokens of an answer, in two processes at once: "together" is their memory with each page counted once, and the
bound is the engine's size and the caches' and a tenth more, beside what Python and the packages take before the engine
is opened.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import multiprocessing
import resource
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from adaptive_k_moe.engine_builder.graph import GraphBuilder

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=ROOT / "tests" / "configs" / "mixtral-8x7b.json")
    parser.add_argument("--target", choices=["onnx", "openvino"], default="onnx")
    parser.add_argument("--num_hidden_layers", type=int, help="build fewer layers")
    parser.add_argument("--work_dir", type=Path, help="where to write; default: a temporary directory")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "benchmarks" / "build_memory.json")
    parser.add_argument("--serve", type=Path, metavar="ENGINE_DIR", help="measure how this engine is served")
    args = parser.parse_args()
    if args.serve is not None:
        report(serving(args.serve), args.output.with_name("serving_memory.json"))
        return

    sys.path.insert(0, str(ROOT / "tests" / "support"))  # the tests' checkpoints are written here too
    from checkpoints import make_sparse_checkpoint

    changes = {} if args.num_hidden_layers is None else {"num_hidden_layers": args.num_hidden_layers}
    with tempfile.TemporaryDirectory(dir=args.work_dir) as directory:
        checkpoint = Path(directory) / "checkpoint"
        make_sparse_checkpoint(checkpoint, args.config, changes=changes)
        index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
        # A process of its own, so that what named the tensors is not counted.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            figures = pool.submit(measured_build, checkpoint, Path(directory) / "engine", args.target).result()
    figures = {
        "model": args.config.stem,
        "target": args.target,
        "tensors": len(index["weight_map"]),
        "weights_gb": index["metadata"]["total_size"] / 1e9,
        **figures,
    }
    report(figures, args.output)


def report(figures: dict[str, Any], output: Path) -> None:
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    Console().print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n")


def serving(engine: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(2)
    with ProcessPoolExecutor(2, context, initializer=_share, initargs=(together,)) as pool:
        found = [future.result() for future in [pool.submit(measured_serving, engine) for _ in range(2)]]
    figures = found[0]
    size = sum(path.stat().st_size for path in engine.iterdir()) / 2**30
    start, caches = figures["rss_at_start_gib"], figures["caches_gib"]
    return {
        "engine": engine.name,
        "engine_gib": size,
        **figures,
        "together_gib": sum(one["pss_gib"] for one in found),
        "peak_to_bound": (figures["maxrss_gib"] - start) / (1.1 * (size + caches)),
    }


_together: Any = None


def _share(barrier: Any) -> None:
    global _together
    _together = barrier


def measured_serving(engine: Path) -> dict[str, float]:
    from adaptive_k_moe.engine_config import read_engine_config
    from adaptive_k_moe.runtime import LLM, SamplingParams
    from adaptive_k_moe.runtime.session import create_session

    before = _status("VmRSS")
    start = time.monotonic()
    config = read_engine_config(engine)
    checked = time.monotonic()
    build = config.build_config
    length = min(build.max_num_tokens, build.longest_prompt - 8)
    session = create_session(engine, config, kv_cache_max_tokens=length + 64)  # in use to the end, so resident
    opened = time.monotonic()
    caches = sum(tensor.byte_size for tensor in session._cache.values())
    caches += sum(state.nbytes for state in session._states.values())
    with LLM.from_session(session, config, config.policy_tables()) as llm:
        prompt = np.random.default_rng(0).integers(0, session.vocab_size, length).tolist()
        llm.generate([prompt], SamplingParams(max_tokens=8, end_id=-1))
        _together.wait()
        pss = _status("Pss", "smaps_rollup")
        anonymous = _status("RssAnon")
        _together.wait()
    return {
        "check_files_seconds": checked - start,
        "open_seconds": opened - checked,
        "caches_gib": caches / 2**30,
        "rss_at_start_gib": before / 2**30,
        "anonymous_gib": anonymous / 2**30,
        "maxrss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30,
        "pss_gib": pss / 2**30,
    }


def measured_build(checkpoint: Path, engine: Path, target: str) -> dict[str, float]:
    # By name, since the package exports the function `build` over the module.
    module: Any = importlib.import_module("adaptive_k_moe.engine_builder.build")
    module.GraphBuilder = _SparseGraph
    before = _status("RssAnon")
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, _status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    try:
        module.build(checkpoint, engine, target=target)
    finally:
        done.set()
        watcher.join()
    maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "anonymous_at_start_gib": before / 2**30,
        "peak_anonymous_gib": peak / 2**30,
        "maxrss_gib": maxrss / 2**30,
        "seconds": time.monotonic() - start,
    }


def _status(field: str, file: str = "status") -> int:
    """Bytes of a field of ``/proc/self/status`` or another file of its kind."""
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/{file} has no {field}")


class _Sparse(io.FileIO):
    """A file that leaves a hole for every write of zeros."""

    def write(self, data: Any) -> int:
        array = np.frombuffer(data, np.uint8)
        if array.any():
            for begin in range(0, len(array), 1 << 28):  # one call writes 2 GiB at most
                super().write(array[begin : begin + (1 << 28)].data)
        else:
            self.seek(len(array), io.SEEK_CUR)
        return len(array)

    def close(self) -> None:
        if not self.closed:
            self.truncate(self.tell())
        super().close()


class _SparseGraph(GraphBuilder):
    def __init__(self, path: Path, name: str) -> None:
        super().__init__(path, name)
        self._data.close()
        self._data: Any = _Sparse(path.with_name(path.name + ".data"), "wb")


if __name__ == "__main__":
    main()
