# SPDX-License-Identifier: Apache-2.0
"""Runs small layers through the library that is named; the sanitizers end the process when they see an error.

AddressSanitizer replaces malloc under NumPy too, so an access past any input, output or workspace shows.
"""

from __future__ import annotations

import sys

from cuda_cases import check_all, make_decided, make_inputs
from cuda_launcher import Interpreter, Layer
from cuda_mamba import CASES, check, make, run

LAYERS = [
    Layer(1, 8, 8, 1, element="float32"),
    Layer(5, 40, 24, 5, path="decode"),
    Layer(5, 24, 264, 3, element="bfloat16", path="decode", activation="relu2"),
    Layer(3, 64, 32, 4, weights="int8", group_size=32, path="decode"),
    Layer(3, 64, 32, 4, weights="int4", group_size=32, path="decode", element="float32"),
    Layer(5, 96, 144, 3, weights="int8", path="prefill"),
    Layer(70, 32, 32, 2, weights="int4", group_size=32, path="prefill", element="bfloat16", activation="gelu"),
    Layer(140, 8, 16, 130, path="prefill", max_k=3),
    Layer(6, 8, 8, 512, element="float32", path="prefill", scoring="sigmoid", n_group=8, topk_group=3, max_k=8),
    Layer(9, 8, 8, 64, path="prefill", scoring="sigmoid", n_group=64, topk_group=12, max_k=8, activation="geglu"),
]

# Tokens and experts of steps with sharing tokens, for each sequence of launches.
SHARING = [(32, 128), (128, 64), (140, 64), (9, 512)]

interpreter = Interpreter(sys.argv[1])
for seed, layer in enumerate(LAYERS):
    inputs, exact = make_inputs(layer, seed, logits=("plain", "ties", "special")[seed % 3], bias=seed % 2 == 0)
    check_all(layer, exact, interpreter.run(layer, inputs, seed=seed))
for seed, (tokens, experts) in enumerate(SHARING):
    layer = Layer(tokens, 8, 8, experts, element="float32", max_k=4)
    inputs, exact = make_decided(layer, seed)
    check_all(layer, exact, interpreter.run(layer, inputs, seed=seed))
for seed, case in enumerate(CASES):
    element = ("float16", "bfloat16", "float32")[seed % 3]
    given, rounded = make(case, element, seed)
    check(case, rounded, element, run(interpreter, case, given, element, seed=seed, in_place=seed % 2 == 0))
print("clean")
