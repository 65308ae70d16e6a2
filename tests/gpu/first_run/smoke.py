# SPDX-License-Identifier: Apache-2.0
"""One launch of one path and weight format, against NumPy.

    PYTHONPATH=tests/support python tests/gpu/first_run/smoke.py OUT_DIR CASE [--small]

Adds the case's row to OUT_DIR/results.jsonl, `error_of_norm` in it: ||output - reference|| / ||reference||.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gpu_mamba
import numpy as np
from gpu_device import Gpu
from rows import FAILED, PASSED, Rows

import oracle  # isort: skip
from cuda_cases import Array, Inputs, check_plan, check_routing, expected_routing, make_inputs  # isort: skip
from cuda_launcher import Layer  # isort: skip
from cuda_mamba import check, make  # isort: skip
from mamba_oracle import Case as Scan  # isort: skip

STAGE = "smoke"
# Of the norm of the error, by element type; what lies between the products is rounded to it too.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
FORMATS: dict[str, dict[str, Any]] = {
    "float16": {"element": "float16"},
    "bfloat16": {"element": "bfloat16"},
    "int8": {"element": "bfloat16", "weights": "int8", "group_size": 64},
    "int4": {"element": "bfloat16", "weights": "int4", "group_size": 64},
}
EXPERTS = 24
EMPTY = [0, 5, *range(16, EXPERTS)]  # nobody chooses these
SCANS = {"decode": (1, 1, 1), "prefill": (200,), "mixed": (1, 70, 1, 3)}

Case = Layer | tuple[int, ...]


def cases(small: bool) -> dict[str, Case]:
    """The cases by name; small ones are for the interpreter of CUDA kernels on a CPU."""
    hidden, intermediate = (64, 64) if small else (512, 384)
    several = (5,) if small else (129, 1, 4096)

    def layer(tokens: int, path: str, **more: Any) -> Layer:
        return Layer(tokens, hidden, intermediate, EXPERTS, path=path, max_k=4, **more)

    found: dict[str, Case] = {}
    for path in ("decode", "prefill"):
        for name, options in FORMATS.items():
            for tokens in several:
                found[f"{path} {name} T={tokens}"] = layer(tokens, path, **options)
    found[f"decode float32 T={several[0]}"] = layer(several[0], "decode", element="float32")
    for name in ("float16", "bfloat16"):  # the activation in the epilogue of CUTLASS's product
        found[f"prefill {name} relu2 T={several[0]}"] = layer(several[0], "prefill", element=name, activation="relu2")
    for name, lengths in SCANS.items():
        found[f"mamba2 {name}"] = tuple(min(length, 40) for length in lengths) if small else lengths
    return found


def reference(layer: Layer, exact: Inputs) -> Array:
    """The operator's output in float32, all tokens of an expert in one product."""
    routing = expected_routing(layer, exact)
    names = ("hidden_states", "up", "down")
    given = {name: array.astype(np.float32) for name in names if (array := exact[name]) is not None}
    output = np.zeros((layer.tokens, layer.hidden), np.float32)
    for expert in range(layer.experts):
        tokens = [t for t, token in enumerate(routing) if expert in token.experts]
        weights = [routing[t].weights[routing[t].experts.index(expert)] for t in tokens]
        hidden = oracle.activate(layer.activation, given["up"][expert] @ given["hidden_states"][tokens].T)
        output[tokens] += np.array(weights, np.float32)[:, None] * (given["down"][expert] @ hidden).T
    return output


def run_layer(gpu: Gpu, layer: Layer) -> dict[str, float]:
    """The error's norm, after the routing and the plan have been checked."""
    inputs, exact = make_inputs(layer, 1)
    logits = inputs["router_logits"]
    assert logits is not None
    logits[:, EMPTY] = -60
    result = gpu.run(layer, inputs)
    check_routing(layer, exact, result)
    check_plan(layer, exact, result)
    expected = reference(layer, exact)
    error = float(np.linalg.norm(result.output.astype(np.float32) - expected) / np.linalg.norm(expected))
    if not error <= TOLERANCE[layer.element]:  # also NaN
        raise AssertionError(f"the output is off by {error:.1e} of its norm; {TOLERANCE[layer.element]:.1e} is allowed")
    return {"error_of_norm": error}


def run_scan(gpu: Gpu, lengths: tuple[int, ...]) -> dict[str, float]:
    """Output and states against the oracle."""
    case = Scan(lengths, tuple(range(len(lengths))), heads=8, head_dim=64, state_size=128, n_groups=2)
    given, exact = make(case, "bfloat16", slow=True)
    check(case, exact, "bfloat16", gpu_mamba.run(gpu, case, given, "bfloat16"))
    return {}


def main() -> None:
    rows, name = Rows(Path(sys.argv[1])), sys.argv[2]
    case = cases(small="--small" in sys.argv)[name]
    try:
        gpu = Gpu()
        found = run_layer(gpu, case) if isinstance(case, Layer) else run_scan(gpu, case)
    except Exception as wrong:
        rows.add(STAGE, name, FAILED, error=f"{type(wrong).__name__}: {' '.join(str(wrong).split())[:400]}")
        raise
    rows.add(STAGE, name, PASSED, **found)
    print(f"{name}: passed")


if __name__ == "__main__":
    main()
