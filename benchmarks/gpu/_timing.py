# SPDX-License-Identifier: Apache-2.0
"""How everything on a GPU is timed here: CUDA graphs of several calls, replayed; and the device's own two rates."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))  # the device and its layers are the tests' own

REPEATS, LEAST_REPEATS = 20, 3
MOST_SECONDS = 0.3  # for the replays of one graph


def repeated(once: Callable[[], float]) -> float:
    """The median of `once`, called REPEATS times or, where that takes too long, less often."""
    times: list[float] = []
    end = time.monotonic() + MOST_SECONDS
    while len(times) < LEAST_REPEATS or (len(times) < REPEATS and time.monotonic() < end):
        times.append(once())
    return statistics.median(times)


def milliseconds(gpu: Any, launches: Sequence[Callable[[int], None]]) -> float:
    """Median time of one of the launches, which take a stream, from replays of a graph of all of them."""
    driver, stream = gpu.driver, gpu.stream
    for launch in launches:
        launch(stream)
    driver.synchronize(stream)
    driver.begin_capture(stream)
    for launch in launches:
        launch(stream)
    graph = driver.end_capture(stream)
    begin, end = driver.event(), driver.event()

    def once() -> float:
        driver.record(begin, stream)
        driver.launch_graph(graph, stream)
        driver.record(end, stream)
        return float(driver.milliseconds(begin, end)) / len(launches)

    once()
    median = repeated(once)
    driver.free_graph(graph)
    return median


def torch_milliseconds(torch: Any, calls: Sequence[Callable[[], Any]]) -> float:
    """The same for calls of torch's on the GPU."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / len(calls)

    once()
    return repeated(once)


def copy_bandwidth(gpu: Any) -> float:
    """GB/s read and written by a copy on the device, of 1 GiB where there is room: what streaming is compared with."""
    driver = gpu.driver
    size = min(1 << 30, driver.free_memory() // 8)
    a, b = driver.allocate(size), driver.allocate(size)
    driver.fill(a, 0x5A, size)
    time_of_copy = milliseconds(gpu, [lambda stream: driver.copy(b, a, size, stream)])
    driver.free(a)
    driver.free(b)
    return float(2 * size / time_of_copy / 1e6)


def matmul_rate(torch: Any, size: int = 8192) -> float:
    """TFLOP/s of torch's product of two random bfloat16 matrices: what matrix products are compared with."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / torch_milliseconds(torch, [lambda: torch.matmul(a, b)] * 3) / 1e9


def numbers(text: str) -> list[int]:
    """The numbers of a list with commas."""
    return [int(word) for word in text.split(",")]
