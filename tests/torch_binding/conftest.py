# SPDX-License-Identifier: Apache-2.0
"""Where `torch.ops.adaptive_k` runs: its kernels for CPUs, or those for GPUs in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from cuda_build import ROOT, build


@pytest.fixture(scope="session")
def interpreter_library() -> str:
    """The CUDA library's C interface over the interpreter of its kernels, whose memory is the host's."""
    build(ROOT / "plugin" / "testing" / "simt", ROOT / "build" / "simt", "-DCMAKE_BUILD_TYPE=Release")
    return str(ROOT / "build" / "simt" / "libadaptive_k_simt.so")


@pytest.fixture(params=["cpu", "interpreter"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """With "interpreter", calls on the host's tensors take the way of those on a GPU's, but for device and stream."""
    if request.param == "cpu":
        yield request.param
        return
    from adaptive_k_moe.torch import ops
    from adaptive_k_moe.torch.cuda_library import CudaLibrary

    library = CudaLibrary(request.getfixturevalue("interpreter_library"))
    registry = torch.library.Library("adaptive_k", "IMPL")
    for op in (ops.MOE_OP, ops.ROUTE_OP, ops.MAMBA_OP):
        kernel = partial(getattr(library, op.name), stream=None)
        registry.impl(op.name, ops.kernel_of(op, kernel), "CPU", allow_override=True)
    yield request.param
    registry._destroy()
