# SPDX-License-Identifier: Apache-2.0
"""The plugin's library in a real TensorRT: its registry, its bindings and its ONNX parser.

TensorRT for RTX runs these parts on any CPU. It does not let a plugin into a network (the process ends
there), so a node is followed up to the parser's word that its plugin was created.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import plugin_harness as h
import pytest
from plugin_harness import PluginLibrary

from checkpoints import SUPPORT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT for RTX is not installed"
)

ATTRIBUTES: dict[str, Any] = {
    "activation": "swiglu",
    "scoring": "softmax",
    "norm_topk_prob": 1,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "max_k": 2,
    "weight_format": "float16",
    "activation_format": "",
    "first_expert": -1,
    "has_expert_norms": 1,
}
DESCRIPTION = (
    "activation=swiglu scoring=softmax norm_topk_prob=1 routed_scaling_factor=1 n_group=1 topk_group=1 max_k=2 "
    "weight_format=float16 activation_format= first_expert=-1 has_expert_norms=1"
)
CREATED = ["INFO", "Successfully created plugin: AdaptiveKMoe"]
ENDS = (CREATED, ["INFO", "Successfully created plugin: Mamba2"])  # the process, when the network gets the plugin


def encounter(library: PluginLibrary | None, **task: Any) -> list[list[Any]]:
    """What rtx_probe.py told, in order."""
    path = str(library.path) if library else ""
    argument = json.dumps({"library": path, "loads": 1 if library else 0, **task})
    done = subprocess.run(
        [sys.executable, SUPPORT / "rtx_probe.py", argument], capture_output=True, text=True, timeout=120, check=False
    )
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    ended_at_the_network = any(end in told for end in ENDS) and "terminate called" in done.stderr
    assert done.returncode == 0 or ended_at_the_network, done.stdout + done.stderr
    return told


def all_of(told: list[list[Any]], what: str) -> list[Any]:
    return [value for key, value in told if key == what]


@pytest.fixture(params=[name for name, headers in h.HEADERS.items() if headers.major == 11])
def eleven(request: pytest.FixtureRequest, recording_libraries: dict[str, PluginLibrary]) -> PluginLibrary:
    """A library with the layout of TensorRT 11, which this TensorRT for RTX has."""
    return recording_libraries[request.param]


def test_the_registry_lists_the_creators_and_makes_a_plugin(eleven: PluginLibrary) -> None:
    for namespace in ("", "adaptive_k"):
        told = encounter(eleven, namespace=namespace, create=ATTRIBUTES)
        [creators] = all_of(told, "creators")
        assert ["AdaptiveKMoe", "1", ""] in creators
        assert ["AdaptiveKMoe", "1", "adaptive_k"] in creators
        assert all_of(told, "field names") == [list(ATTRIBUTES)]
        assert all_of(told, "plugin") == [["AdaptiveKMoe", "1", namespace]] * 2
        assert all_of(told, "build") == [[4, DESCRIPTION, DESCRIPTION]] * 2
        assert all_of(told, "ERROR") == []


def test_wrong_fields_are_a_sentence_in_tensorrts_log_and_no_plugin(eleven: PluginLibrary) -> None:
    told = encounter(eleven, namespace="", create={**ATTRIBUTES, "scoring": "linear"})
    assert all_of(told, "plugin") == [None, None]
    sentence = "AdaptiveKMoe: layer layers.0.moe: field scoring is 'linear' but must be one of softmax, sigmoid"
    assert all_of(told, "ERROR") == [sentence] * 2


def test_loading_twice_leaves_the_first(eleven: PluginLibrary) -> None:
    told = encounter(eleven, loads=2, namespace="adaptive_k", create=ATTRIBUTES)
    first, second = all_of(told, "creators")
    assert first == second
    assert any("exists already" in sentence for sentence in all_of(told, "ERROR"))
    assert all_of(told, "plugin") == [["AdaptiveKMoe", "1", "adaptive_k"]] * 2


@pytest.mark.parametrize(
    "extra",
    [{}, {"plugin_namespace": ""}, {"plugin_namespace": "adaptive_k", "plugin_version": "1"}],
    ids=["domain-only", "empty-namespace", "named-namespace"],
)
def test_the_onnx_parser_resolves_the_node_to_the_plugin(eleven: PluginLibrary, extra: dict[str, str]) -> None:
    told = encounter(eleven, node={**ATTRIBUTES, **extra})
    assert CREATED in told
    # The plugin's own line shows that every attribute arrived as it was written.
    assert f"AdaptiveKMoe: layer layers.0.moe: {DESCRIPTION}" in all_of(told, "VERBOSE")
    assert all_of(told, "ERROR") == []


def test_a_named_namespace_prefers_the_plugin_to_a_function_body(eleven: PluginLibrary) -> None:
    told = encounter(eleven, node={**ATTRIBUTES, "plugin_namespace": "adaptive_k"}, function=True)
    assert CREATED in told
    # Without it, the parser expands the function that the file carries.
    told = encounter(eleven, node=ATTRIBUTES, function=True)
    assert CREATED not in told
    assert all_of(told, "parsed") == [True]


def test_the_onnx_parser_reports_a_wrong_attribute(eleven: PluginLibrary) -> None:
    told = encounter(eleven, node={**ATTRIBUTES, "activation": "swish"})
    assert all_of(told, "parsed") == [False]
    sentence = "AdaptiveKMoe: layer layers.0.moe: field activation is 'swish' but must be one of swiglu"
    assert any(logged.startswith(sentence) for logged in all_of(told, "ERROR"))
    assert "layers.0.moe" in str(all_of(told, "errors"))


def test_without_the_library_the_node_is_not_known() -> None:
    told = encounter(None, node=ATTRIBUTES)
    assert all_of(told, "parsed") == [False]
    assert "Plugin not found" in str(all_of(told, "errors"))
