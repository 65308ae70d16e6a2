# SPDX-License-Identifier: Apache-2.0
"""Memory while a published model of full size is built, from a checkpoint whose weights are zeros in sparse files.

    python benchmarks/build_memory.py                                  # Mixtral 8x7B, 93 GB of bfloat16
    python benchmarks/build_memory.py --config tests/configs/qwen3-30b-a3b.json
    python benchmarks/build_memory.py --config tests/configs/olmoe-1b-7b.json --target openvino

Every byte is read, converted, compared with zero and hashed as in any build; only the graph's data file
leaves holes where zeros would be written (`rank0.bin` of the openvino target does not, so have room for it).
"anonymous" is memory that must stay in RAM, sampled every 10 ms; "maxrss" counts pages of mapped files too,
which the system drops when it needs them.
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
    args = parser.parse_args()

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
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    Console().print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=2) + "\n")


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


def _status(field: str) -> int:
    """Bytes of a field of ``/proc/self/status``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


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
