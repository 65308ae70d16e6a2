# SPDX-License-Identifier: Apache-2.0
"""Every kernel once, small, to be run under compute-sanitizer:

compute-sanitizer --tool memcheck python tests/support/sanitized_launches.py [--own]

With --own without CUTLASS's kernels, whose asynchronous copies racecheck and initcheck do not follow.
"""

from __future__ import annotations

import sys

from cuda_cases import check_all, make_decided, make_inputs
from cuda_launcher import Layer
from cuda_mamba import CASES, check, make
from gpu_device import Gpu
from gpu_mamba import run

LAYERS = [
    Layer(5, 40, 24, 5, path="decode"),
    Layer(5, 64, 64, 5, path="decode", element="bfloat16", weights="int8", group_size=32, activation="relu2"),
    Layer(5, 64, 64, 5, path="decode", weights="int4"),
    Layer(150, 72, 40, 130, path="prefill", max_k=3),
    Layer(300, 72, 40, 2, path="prefill", max_k=2),
    Layer(70, 96, 144, 3, path="prefill", weights="int8", activation="geglu"),
    Layer(70, 64, 64, 3, path="prefill", weights="int4", group_size=32, element="bfloat16"),
    Layer(9, 8, 8, 512, path="prefill", scoring="sigmoid", n_group=8, topk_group=3, max_k=8),
]

gpu = Gpu()
for seed, layer in enumerate(LAYERS):
    if "--own" in sys.argv and layer.path == "prefill" and layer.weights == "element":
        continue
    inputs, exact = make_inputs(layer, seed)
    check_all(layer, exact, gpu.run(layer, inputs))
for seed, (tokens, experts) in enumerate([(32, 128), (128, 64), (140, 64), (9, 512)]):  # for each sequence of launches
    layer = Layer(tokens, 8, 8, experts, element="float32", max_k=4)
    inputs, exact = make_decided(layer, seed)
    check_all(layer, exact, gpu.run(layer, inputs))
for seed, case in enumerate(CASES):
    element = ("float16", "bfloat16", "float32")[seed % 3]
    given, rounded = make(case, element, seed)
    check(case, rounded, element, run(gpu, case, given, element))
print("clean")
