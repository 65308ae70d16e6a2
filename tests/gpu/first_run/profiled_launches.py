# SPDX-License-Identifier: Apache-2.0
"""A few launches for Nsight Compute, which is to profile what runs between its start and its stop alone."""

from __future__ import annotations

import ctypes

from moe_gpu import Bench
from moe_layers import LAYERS

from gpu_device import DRIVER, Gpu  # isort: skip


def main() -> None:
    gpu, driver = Gpu(), ctypes.CDLL(DRIVER)
    for name, weights in (("mixtral", "element"), ("qwen3-30b", "int4")):
        bench = Bench(gpu, LAYERS[name], weights)
        for tokens in (1, 1024):
            case = bench.case(tokens, [bench.model.top_k], routings=1)
            for profiled in (False, True):
                if profiled:
                    driver.cuProfilerStart()
                case.launch(0, gpu.stream)
                gpu.driver.synchronize(gpu.stream)
            driver.cuProfilerStop()
            case.free()
        bench.free()


if __name__ == "__main__":
    main()
