# SPDX-License-Identifier: Apache-2.0
"""Mamba2's CUDA launcher through its C interface, and the cases that its kernels are held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda_launcher import DTYPES, Interpreter, Library

from adaptive_k_moe.plugin.c_api import ELEMENTS, Interface
from adaptive_k_moe.plugin.description import MAMBA

from mamba_oracle import Case, make_inputs, oracle

Array = npt.NDArray[Any]

# Largest error of an output or a state, relative to the largest of its kind. The oracle sees the inputs in
# the element type; what lies between the convolution and the sums is rounded to it once more.
TOLERANCE = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.6e-2}

# All sizes are multiples of 8. Sequences of more than 4 tokens are taken in chunks of 32.
SMALL: dict[str, Any] = {"heads": 4, "head_dim": 8, "state_size": 16, "n_groups": 2}
CASES = [
    Case((1,), (0,), **SMALL),
    Case((1,), (9,), **SMALL),
    Case((2,), (0,), **SMALL),  # a prompt shorter than the convolution
    Case((2,), (1,), **SMALL),
    Case((3, 1), (0, 2), **{**SMALL, "taps": 9}),
    Case((37,), (0,), **SMALL),
    Case((97,), (5,), **SMALL),  # three chunks and one token
    Case((1, 5, 1, 0, 12, 3), (4, 0, 1, 3, 7, 2), **SMALL),  # decode and prefill in one step
    Case((33, 1, 40), (0, 8, 11), heads=2, head_dim=40, state_size=72, n_groups=1),
    Case((1, 1, 1), (5, 0, 2), heads=4, head_dim=80, state_size=128, n_groups=2),
    Case((6, 1), (0, 3), heads=8, head_dim=8, state_size=136, n_groups=8, taps=2),
    Case((36,), (2,), heads=1, head_dim=64, state_size=256, n_groups=1, taps=7),
    Case((40, 2), (1, 0), **SMALL, dt_min=0.4, dt_max=0.9),
    Case((5, 0, 0, 0, 0, 0), (1, 2, 0, 0, 1, 1), **SMALL),  # more sequences than tokens
]

OUTPUTS = MAMBA.output_names()
POINTERS = [*(tensor.name.lower() for tensor in MAMBA.inputs), *OUTPUTS]
_IN_ELEMENT = ("conv_input", "dt", "conv_state")


@dataclass(frozen=True)
class MambaLayer:
    """A layer's shape and attributes, named as the operator's."""

    tokens: int
    sequences: int
    slots: int
    heads: int
    head_dim: int
    state_size: int
    taps: int = 4
    element: str = "float16"
    n_groups: int = 1
    dt_min: float = 0.0
    dt_max: float = float("inf")

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim + 2 * self.n_groups * self.state_size


def layer_of(case: Case, inputs: dict[str, Array], element: str) -> MambaLayer:
    return MambaLayer(
        tokens=sum(case.lengths),
        sequences=len(case.lengths),
        slots=len(inputs["ssm_state"]),
        heads=case.heads,
        head_dim=case.head_dim,
        state_size=case.state_size,
        taps=case.taps,
        element=element,
        n_groups=case.n_groups,
        dt_min=case.dt_min,
        dt_max=case.dt_max,
    )


class MambaLibrary:
    """The C interface of a loaded library."""

    def __init__(self, library: Library) -> None:
        self.mamba = Interface(library.lib, MAMBA)

    def c(self, layer: MambaLayer) -> Any:
        return self.mamba.layer({**vars(layer), "element": ELEMENTS[layer.element]}, vars(layer))

    def check(self, layer: MambaLayer) -> str | None:
        return self.mamba.check(self.c(layer))

    def workspace_size(self, layer: MambaLayer) -> int:
        return self.mamba.workspace_size(self.c(layer))

    def launch(
        self, layer: MambaLayer, pointers: dict[str, int | None], workspace: int | None, stream: int | None = None
    ) -> int:
        return self.mamba.launch(self.c(layer), pointers, workspace, stream)


def typed(inputs: dict[str, Array], element: str) -> tuple[dict[str, Array], dict[str, Array]]:
    """The inputs as the kernels take them, and in float32 with the same values for the oracle."""
    given = {name: x.astype(DTYPES[element]) if name in _IN_ELEMENT else x.copy() for name, x in inputs.items()}
    return given, {name: x.astype(np.float32) if name in _IN_ELEMENT else x.copy() for name, x in given.items()}


def run(
    interpreter: Interpreter,
    case: Case,
    inputs: dict[str, Array],
    element: str,
    *,
    in_place: bool = True,
    seed: int = 0,
    fault: int = 0,
    garbage: int = 0xC5,
) -> tuple[Array, Array, Array]:
    """One launch in the interpreter on inputs as `typed` makes them: y, convolution and scan states.

    Raises:
        RuntimeError: a kernel failed; the message is the interpreter's sentence.
    """
    library, lib = MambaLibrary(interpreter), interpreter.lib
    lib.simt_clear_error()
    lib.simt_set_seed(seed)
    lib.simt_set_fault(fault)
    lib.simt_set_garbage(garbage)
    layer = layer_of(case, inputs, element)
    arrays = {name: x.copy() for name, x in inputs.items()}
    y = np.full((layer.tokens, layer.heads * layer.head_dim), 77, DTYPES[element])
    states = [arrays[name] if in_place else np.full_like(arrays[name], 55) for name in ("conv_state", "ssm_state")]
    size = library.workspace_size(layer)
    memory = np.full(size + 256, garbage, np.uint8)
    skip = -memory.ctypes.data % 256
    guard = memory[skip + size :].copy()
    pointers = {name: x.ctypes.data for name, x in (*arrays.items(), *zip(OUTPUTS, (y, *states), strict=True))}
    status = library.launch(layer, pointers, memory.ctypes.data + skip)
    lib.simt_set_fault(0)
    if status != 0:
        raise RuntimeError(f"launch returned {status}: {lib.simt_last_error().decode()}")
    if not (memory[skip + size :] == guard).all():
        raise RuntimeError("the workspace was written past its end")
    for name in inputs:
        if not (in_place and name.endswith("_state")) and arrays[name].tobytes() != inputs[name].tobytes():
            raise RuntimeError(f"the input {name} was written")
    return y, *states


def expected_of(case: Case, exact: dict[str, Array]) -> tuple[Array, Array, Array]:
    """The oracle, for sequences without a slot (or with one that is not there) too."""
    there = [i for i, slot in enumerate(exact["state_slots"]) if 0 <= slot < len(exact["ssm_state"])]
    begins = exact["subsequence_begins"]
    rows = np.concatenate([np.arange(begins[i], begins[i + 1]) for i in there]) if there else np.zeros(0, int)
    lengths = [int(begins[i + 1] - begins[i]) for i in there]
    part = {
        **exact,
        "conv_input": exact["conv_input"][rows],
        "dt": exact["dt"][rows],
        "subsequence_begins": np.cumsum([0, *lengths]).astype(np.int32),
        "past_lens": exact["past_lens"][there],
        "state_slots": exact["state_slots"][there],
    }
    found, conv_state, ssm_state = oracle(case, part)
    y = np.zeros((len(exact["conv_input"]), case.heads * case.head_dim))
    y[rows] = found
    return y, conv_state, ssm_state


def check(case: Case, exact: dict[str, Array], element: str, found: tuple[Array, Array, Array]) -> None:
    """Output and states against the oracle; the convolution's state and unused slots to the bit."""
    y, conv_state, ssm_state = expected_of(case, exact)
    for value, expected in ((found[0], y), (found[2], ssm_state)):
        value = value.astype(np.float64)
        np.testing.assert_array_equal(np.isnan(value), np.isnan(expected))
        largest = np.nanmax(np.abs(expected), initial=1e-30)
        error = np.nanmax(np.abs(value - expected), initial=0.0)
        assert error <= TOLERANCE[element] * largest, (error / largest, TOLERANCE[element])
    np.testing.assert_array_equal(found[1].astype(np.float64), conv_state)
    used = {int(slot) for slot, n in zip(exact["state_slots"], np.diff(exact["subsequence_begins"]), strict=True) if n}
    unused = [slot for slot in range(len(ssm_state)) if slot not in used]
    np.testing.assert_array_equal(found[2][unused], exact["ssm_state"][unused])


def make(case: Case, element: str, seed: int = 0, *, slow: bool = False) -> tuple[dict[str, Array], dict[str, Array]]:
    """A case's inputs for the kernels, and for the oracle.

    Args:
        slow: states that remember hundreds of tokens, so that what an earlier chunk left counts.
    """
    inputs = make_inputs(case, seed)
    if slow:
        inputs["a"] = inputs["a"] / 40
        inputs["dt_bias"] = inputs["dt_bias"] - 2
    return typed(inputs, element)
