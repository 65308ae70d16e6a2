# SPDX-License-Identifier: Apache-2.0
"""The module ``tensorrt`` of a process of its own, such as a Triton server's: lay it on its path under that name.

It brings CUDA's module, too. `fake_gpu` and `fake_tensorrt` have to lie beside it. ``FAKE_GPU_FAILURES`` names a
folder: a file in it that is named as a function of CUDA lets that function fail once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fake_gpu import Error, Gpu
from fake_tensorrt import make_tensorrt


class Failures(dict[str, Error]):
    def __contains__(self, name: object) -> bool:
        return (Path(os.environ["FAKE_GPU_FAILURES"]) / str(name)).exists()

    def pop(self, name: str, *default: object) -> Error | None:  # type: ignore[override]
        if name not in self:
            return None
        (Path(os.environ["FAKE_GPU_FAILURES"]) / name).unlink()
        return Error.cudaErrorInvalidValue


gpu = Gpu()
gpu.failures = Failures()
sys.modules["cuda.bindings.runtime"] = gpu.cudart
sys.modules[__name__] = make_tensorrt(gpu)
