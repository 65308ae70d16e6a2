# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at best, measured: memory read bandwidth and float32 matrix-product rate.

    python benchmarks/_roofline.py

Both are taken with the threads that the benchmark uses and in the same run as what is compared with
them, because shared machines change from minute to minute.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import openvino as ov
from openvino import opset13 as ops


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


def _matmul(rows: int, columns: int, tokens: int, threads: int) -> Callable[[], object]:
    """OpenVINO's float32 product of [tokens, columns] with a constant [rows, columns] matrix."""
    weight = ops.constant(np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32))
    x = ops.parameter([tokens, columns], np.float32)
    model = ov.Model([ops.matmul(x, weight, False, True)], [x])
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    request.set_input_tensor(ov.Tensor(np.random.default_rng(1).standard_normal((tokens, columns), np.float32)))
    return request.infer


def read_bandwidth(threads: int, *, megabytes: int = 1024, repeats: int = 9) -> float:
    """Bytes per second at which memory can be read: the better of two plain readers.

    Either OpenVINO's matrix-vector product over a large float32 matrix, or NumPy's sum over an array of that
    size in each of `threads` threads.
    """
    from concurrent.futures import ThreadPoolExecutor

    count = megabytes * 2**20 // 4
    array = np.ones(count, np.float32)
    parts = np.array_split(array, threads)
    with ThreadPoolExecutor(threads) as pool:

        def total() -> float:
            return sum(pool.map(lambda part: float(np.max(part)), parts))

        by_numpy = array.nbytes / seconds(total, repeats=repeats)
    columns = 4096
    rows = count // columns
    by_openvino = rows * columns * 4 / seconds(_matmul(rows, columns, 1, threads), repeats=repeats)
    return max(by_numpy, by_openvino)


def gemm_rate(threads: int, *, tokens: int = 256, columns: int = 4096, rows: int = 4096, repeats: int = 5) -> float:
    """Floating-point operations per second of float32 matrix products: the better of OpenVINO and NumPy."""
    operations = 2 * tokens * columns * rows
    by_openvino = operations / seconds(_matmul(rows, columns, tokens, threads), repeats=repeats)
    a = np.ones((tokens, columns), np.float32)
    b = np.ones((rows, columns), np.float32)
    by_numpy = operations / seconds(lambda: a @ b.T, repeats=repeats)
    return max(by_openvino, by_numpy)


if __name__ == "__main__":
    import os

    cores = len(os.sched_getaffinity(0))
    print(
        f"{cores} threads: read {read_bandwidth(cores) / 1e9:.1f} GB/s, float32 products {gemm_rate(cores) / 1e9:.0f} GFLOPS"
    )
