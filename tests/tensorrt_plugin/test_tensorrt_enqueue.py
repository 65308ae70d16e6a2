# SPDX-License-Identifier: Apache-2.0
"""The plugin computes: enqueue runs the kernels, in the interpreter, on layers that an oracle checks.

The kernels have their own tests; these are about the plugin's way to them: every type, weight storage and
attribute arrives as what it is.
"""

from __future__ import annotations

import numpy as np
import plugin_harness as h
import pytest
from layer_cases import CASES, DTYPES, ROWS, SOFTMAX, Array, Case, aligned, check, make_case
from plugin_harness import Layer, Plugin, PluginLibrary


def run(plugin: Plugin, case: Case) -> tuple[Array, Array, Array]:
    layer = case.layer
    tensors, outputs = layer.inputs(), layer.outputs()
    assert [a.shape for a in case.inputs] == [t.shape for t in tensors]
    made = [
        aligned(np.full((layer.tokens, layer.hidden), -7, DTYPES[layer.element])),
        aligned(np.full(layer.tokens, -7, np.int32)),
        aligned(np.full(layer.tokens, -7, np.float32)),
        aligned(np.full(layer.experts, -7, np.int32)),
    ]
    assert plugin.configure(tensors, outputs) == 0, plugin.library.log()
    workspace = aligned(np.full(max(plugin.workspace(tensors, outputs), 1), 255, np.uint8))
    assert plugin.shape_change(tensors, outputs) == 0, plugin.library.log()
    pointers = [a.ctypes.data for a in case.inputs]
    status = plugin.enqueue(tensors, outputs, pointers, [m.ctypes.data for m in made], workspace.ctypes.data)
    assert status == 0, plugin.library.log()
    assert made[3].min() >= 0 and made[3].sum() == made[1].sum()
    return made[0], made[1], made[2]


@pytest.mark.parametrize("name", CASES)
def test_the_plugin_computes_the_operator(computing: PluginLibrary, name: str) -> None:
    layer, attributes = CASES[name]
    case = make_case(sorted(CASES).index(name), layer, **attributes)
    plugin = computing.made(**case.attributes)
    check(case, run(plugin, case))
    plugin.destroy()


@pytest.mark.parametrize("name", ["float16-5", "sigmoid-groups-bias", "int4-groups", "three-of-six"])
def test_an_engines_plugin_computes_the_same_bits(computing: PluginLibrary, name: str) -> None:
    layer, attributes = CASES[name]
    case = make_case(3, layer, **attributes)
    original = computing.made(**case.attributes)
    fields = original.serialized()
    before = [a.tobytes() for a in run(original, case)]
    original.destroy()
    engine = computing.create(fields, phase=h.RUNTIME_PHASE)
    assert engine is not None
    context = engine.attach()
    assert [a.tobytes() for a in run(context, case)] == before
    context.destroy()
    engine.destroy()


def test_steps_of_different_sizes_run_in_the_workspace_of_the_largest(computing: PluginLibrary) -> None:
    attributes = SOFTMAX
    plugin = computing.made(**attributes)
    most = Layer(40, hidden=32, intermediate=16, experts=6, **ROWS)
    workspace = aligned(np.zeros(plugin.workspace(most.inputs(), most.outputs()), np.uint8))
    for tokens in (40, 1, 17, 0, 2):
        layer = Layer(tokens, hidden=32, intermediate=16, experts=6, **ROWS)
        assert plugin.workspace(layer.inputs(), layer.outputs()) <= workspace.size
        if tokens == 0:
            assert plugin.shape_change(layer.inputs(), layer.outputs()) == 0
            assert plugin.enqueue(layer.inputs(), layer.outputs(), [0] * 8, [0] * 4) == 0
        else:
            case = make_case(tokens, layer, **attributes)
            check(case, run(plugin, case))
    plugin.destroy()


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (Layer(2, experts=513), "there may be at most 512 experts"),
        (Layer(2, hidden=12), "hidden and intermediate size must be multiples of 8, for 16-byte loads"),
        (Layer(2, choices=0), "input k_values"),
    ],
)
def test_what_the_kernels_cannot_run_is_refused_when_the_engine_is_built(
    computing: PluginLibrary, layer: Layer, sentence: str
) -> None:
    plugin = computing.made()
    assert plugin.configure(layer.inputs(), layer.outputs()) != 0
    [error] = computing.errors()
    assert sentence in error
    plugin.destroy()


def test_a_missing_pointer_is_a_status_and_a_sentence(computing: PluginLibrary) -> None:
    layer, attributes = CASES["float32-1"]
    plugin = computing.made(**attributes)
    assert plugin.shape_change(layer.inputs(), layer.outputs()) == 0
    assert plugin.enqueue(layer.inputs(), layer.outputs(), [0] * 8, [0] * 4) != 0
    assert computing.errors() == ["AdaptiveKMoe: its kernels were not launched (CUDA error 1)"]
    plugin.destroy()
