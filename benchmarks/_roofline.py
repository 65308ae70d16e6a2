# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at best, measured: memory read bandwidth and matrix-product rates.

    python benchmarks/_roofline.py

A benchmark runs the probes in turns with what it compares with them, because shared machines change from minute
to minute. Neither uses code of this project.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openvino as ov
from openvino import opset13 as ops

BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
"""Of a weight as it is read, without its share of a scale."""


def seconds(call: Callable[[], object], *, repeats: int = 5, warmup: int = 1) -> float:
    """Median wall time of a call."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class _OpenVINOProduct:
    """OpenVINO's product of [tokens, columns] with a constant [rows, columns] matrix, in a precision."""

    def __init__(self, rows: int, columns: int, tokens: int, threads: int, precision: str = "f32") -> None:
        rng = np.random.default_rng(0)
        weight = ops.constant(rng.standard_normal((rows, columns), dtype=np.float32))
        x = ops.parameter([tokens, columns], np.float32)
        model = ov.Model([ops.matmul(x, weight, False, True)], [x])
        config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        self._request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
        self._request.set_input_tensor(ov.Tensor(rng.standard_normal((tokens, columns), dtype=np.float32)))

    def run(self) -> None:
        self._request.infer()


class ReadProbe:
    """Reads `num_bytes` from memory with all threads, in the faster of two ways on this machine.

    OpenVINO's matrix-vector product over a large float32 matrix, or BLAS dot products of an array with itself,
    one thread a part.
    """

    def __init__(self, threads: int, *, megabytes: int = 512) -> None:
        columns = 4096
        rows = megabytes * 2**20 // 4 // columns
        self.num_bytes = rows * columns * 4
        product = _OpenVINOProduct(rows, columns, 1, threads)
        self._parts = np.array_split(np.ones(rows * columns, np.float32), 16 * threads)
        self._pool = ThreadPoolExecutor(threads)
        self.run: Callable[[], None] = min(product.run, self._dot_products, key=seconds)

    def _dot_products(self) -> None:
        for _ in self._pool.map(lambda part: np.dot(part, part), self._parts):
            pass


class GemmProbe:
    """A matrix product of `operations` floating-point operations: OpenVINO's or NumPy's, the faster.

    In bfloat16 it is OpenVINO's, which sums in float32 and uses AMX where there is any.
    """

    def __init__(
        self, threads: int, *, bfloat16: bool = False, tokens: int = 256, columns: int = 4096, rows: int = 4096
    ) -> None:
        self.operations = 2 * tokens * columns * rows
        rng = np.random.default_rng(0)
        self._a = rng.standard_normal((tokens, columns), dtype=np.float32)
        self._b = rng.standard_normal((rows, columns), dtype=np.float32)
        product = _OpenVINOProduct(rows, columns, tokens, threads, "bf16" if bfloat16 else "f32")
        self.run: Callable[[], None] = product.run if bfloat16 else min(product.run, self._numpy, key=seconds)

    def _numpy(self) -> None:
        np.matmul(self._a, self._b.T)


def read_bandwidth(threads: int) -> float:
    """Bytes per second at which memory can be read."""
    probe = ReadProbe(threads)
    return probe.num_bytes / seconds(probe.run, repeats=9)


def gemm_rate(threads: int, *, bfloat16: bool = False) -> float:
    """Floating-point operations per second of matrix products."""
    probe = GemmProbe(threads, bfloat16=bfloat16)
    return probe.operations / seconds(probe.run, repeats=9)


if __name__ == "__main__":
    import os

    cores = len(os.sched_getaffinity(0))
    rates = {name: gemm_rate(cores, bfloat16=name == "bfloat16") for name in ("float32", "bfloat16")}
    products = ", ".join(f"{name} products {rate / 1e9:.0f} GFLOPS" for name, rate in rates.items())
    print(f"{cores} threads: read {read_bandwidth(cores) / 1e9:.1f} GB/s, {products}")
