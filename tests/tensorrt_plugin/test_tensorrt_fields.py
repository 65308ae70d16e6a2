# SPDX-License-Identifier: Apache-2.0
"""Plugin fields: what a creator announces, takes, refuses, and writes into an engine."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from typing import Any

import plugin_harness as h
import pytest
from plugin_harness import Field, PluginLibrary

from checkpoints import SUPPORT

ATTRIBUTES: dict[str, Any] = {
    "activation": "relu2",
    "scoring": "sigmoid",
    "norm_topk_prob": 0,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "max_k": 6,
    "weight_format": "bfloat16",
    "activation_format": "",
    "first_expert": 3,
    "has_expert_norms": 1,
}


def test_the_creators_are_found_under_the_name_of_the_onnx_node(library: PluginLibrary) -> None:
    creators = library.creators()
    assert [(c.name, c.version, c.namespace) for c in creators] == [
        ("AdaptiveKMoe", "1", ""),
        ("AdaptiveKMoe", "1", "adaptive_k"),
        ("Mamba2", "1", ""),
        ("Mamba2", "1", "adaptive_k"),
    ]
    assert {c.interface for c in creators} == {"PLUGIN CREATOR_V3ONE 1.0 C++"}


def test_the_announced_fields_are_the_onnx_attributes(library: PluginLibrary) -> None:
    from adaptive_k_moe.engine_builder.graph.moe_function import moe_attributes
    from adaptive_k_moe.model_config import MoeConfig

    config = MoeConfig.model_construct(
        activation="swiglu", scoring="softmax", norm_topk_prob=True, routed_scaling_factor=1.0, n_group=1, topk_group=1
    )
    attributes = moe_attributes(config, max_k=2, weight_format="float16")
    types = {str: h.F_CHAR, int: h.F_INT32, float: h.F_FLOAT32}
    expected = {name: types[type(value)] for name, value in attributes.items()}
    for creator in library.creators()[:2]:
        assert creator.fields == expected


def test_a_plugin_carries_its_creators_namespace(library: PluginLibrary) -> None:
    for index, creator in enumerate(library.creators()[:2]):
        plugin = library.made(creator=index, **ATTRIBUTES)
        assert plugin.text()[:3] == [creator.name, creator.version, creator.namespace]
        plugin.destroy()


def test_the_plugin_answers_as_the_interfaces_that_it_has(library: PluginLibrary) -> None:
    plugin = library.made()
    assert plugin.text()[5:] == [
        "PLUGIN 1.0 C++",
        "PLUGIN_V3ONE_CORE 1.0 C++",
        "PLUGIN_V3ONE_BUILD 1.0 C++",
        "PLUGIN_V3ONE_RUNTIME 1.0 C++",
        "none",
    ]
    plugin.destroy()


def test_absent_fields_have_the_operators_defaults(library: PluginLibrary) -> None:
    plugin = library.made()
    values = {f.name: f.data for f in plugin.serialized()}
    assert values == {
        "activation": b"swiglu\0",
        "scoring": b"softmax\0",
        "norm_topk_prob": struct.pack("i", 1),
        "routed_scaling_factor": struct.pack("f", 1.0),
        "n_group": struct.pack("i", 1),
        "topk_group": struct.pack("i", 1),
        "max_k": struct.pack("i", 0),
        "weight_format": b"\0",
        "activation_format": b"\0",
        "first_expert": struct.pack("i", -1),
        "has_expert_norms": struct.pack("i", 0),
    }
    plugin.destroy()


def test_serialized_fields_make_the_same_plugin_again(library: PluginLibrary) -> None:
    plugin = library.made(**ATTRIBUTES)
    fields = plugin.serialized()
    assert {f.name: f for f in fields} == {name: h.to_field(name, value) for name, value in ATTRIBUTES.items()}
    identity = plugin.cache_id
    plugin.destroy()  # an engine outlives the plugin that it was built from

    again = library.create(fields, phase=h.RUNTIME_PHASE)
    assert again is not None
    assert again.cache_id == identity
    assert again.serialized() == fields
    again.destroy()


def test_serializing_twice_gives_the_same_fields(library: PluginLibrary) -> None:
    plugin = library.made(**ATTRIBUTES)
    assert plugin.serialized() == plugin.serialized()
    plugin.destroy()


@pytest.mark.parametrize("word", ["swiglu", "geglu", "silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_every_activation_of_the_operator_is_a_field_value(library: PluginLibrary, word: str) -> None:
    plugin = library.made(activation=word)
    assert f"activation={word} " in plugin.cache_id
    plugin.destroy()


@pytest.mark.parametrize("word", ["float32", "float16", "bfloat16", "int8", "int4", ""])
def test_every_weight_format_is_a_field_value(library: PluginLibrary, word: str) -> None:
    plugin = library.made(weight_format=word)
    assert f" weight_format={word} " in plugin.cache_id
    plugin.destroy()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation", "geglu"),
        ("scoring", "sigmoid"),
        ("norm_topk_prob", 0),
        ("routed_scaling_factor", 1.0000001),
        ("n_group", 2),
        ("topk_group", 2),
        ("max_k", 3),
        ("weight_format", "int8"),
    ],
)
def test_the_timing_cache_tells_plugins_apart(library: PluginLibrary, name: str, value: Any) -> None:
    common = {} if name == "n_group" else {"n_group": 2}
    plain, other = library.made(**common), library.made(**common, **{name: value})
    assert plain.cache_id != other.cache_id
    plain.destroy()
    other.destroy()


@pytest.mark.parametrize("text", [b"sigmoid", b"sigmoid\0", b"sigmoid\0\0\0rest"])
def test_text_may_come_with_or_without_its_closing_nul(library: PluginLibrary, text: bytes) -> None:
    plugin = library.made(fields=[Field("scoring", h.F_CHAR, len(text), text)])
    assert "scoring=sigmoid" in plugin.cache_id
    plugin.destroy()


def test_numbers_may_come_in_64_bits(library: PluginLibrary) -> None:
    fields = [
        Field("max_k", h.F_INT64, 1, struct.pack("q", 6)),
        Field("routed_scaling_factor", h.F_FLOAT64, 1, struct.pack("d", 2.5)),
    ]
    plugin = library.made(fields=fields)
    assert "routed_scaling_factor=2.5 " in plugin.cache_id
    assert "max_k=6 " in plugin.cache_id
    plugin.destroy()


def test_a_made_plugin_leaves_one_verbose_line(library: PluginLibrary) -> None:
    plugin = library.create(**ATTRIBUTES)
    assert plugin is not None
    [(severity, sentence)] = library.log()
    assert severity == h.VERBOSE
    assert sentence == f"AdaptiveKMoe: layer layers.0.moe: {plugin.cache_id}"
    plugin.destroy()


INT = struct.pack("i", 1)
WRONG: list[tuple[list[Field], str]] = [
    (
        [h.to_field("activation", "swish")],
        "field activation is 'swish' but must be one of swiglu, geglu, silu, gelu, gelu_tanh, relu, relu2",
    ),
    ([h.to_field("activation", "")], "field activation is '' but must be one of swiglu, geglu"),
    ([h.to_field("activation", "SWIGLU")], "field activation is 'SWIGLU' but must be one of"),
    ([h.to_field("scoring", "linear")], "field scoring is 'linear' but must be one of softmax, sigmoid"),
    (
        [h.to_field("weight_format", "int2")],
        "field weight_format is 'int2' but must be one of float32, float16, bfloat16, int8, int4",
    ),
    ([h.to_field("activation", 1)], "field activation has type INT32 and length 1 but must be CHAR text"),
    ([Field("scoring", h.F_CHAR, -1, b"x")], "field scoring has type CHAR and length -1 but must be CHAR text"),
    ([h.to_field("max_k", "2")], "field max_k has type CHAR and length 2 but must be one INT32 or INT64"),
    ([h.to_field("max_k", 2.0)], "field max_k has type FLOAT32 and length 1 but must be one INT32 or INT64"),
    ([Field("max_k", h.F_INT32, 2, INT * 2)], "field max_k has type INT32 and length 2 but must be one"),
    ([Field("max_k", h.F_INT32, 0, INT)], "field max_k has type INT32 and length 0 but must be one"),
    ([Field("n_group", 99, 1, INT)], "field n_group has type an unknown type and length 1 but must be one"),
    (
        [Field("max_k", h.F_INT64, 1, struct.pack("q", 2**40))],
        "field max_k is 1099511627776, which does not fit in 32 bits",
    ),
    (
        [h.to_field("routed_scaling_factor", 1)],
        "field routed_scaling_factor has type INT32 and length 1 but must be one FLOAT32 or FLOAT64",
    ),
    ([h.to_field("routed_scaling_factor", float("nan"))], "field routed_scaling_factor is not a finite number"),
    ([h.to_field("routed_scaling_factor", float("inf"))], "field routed_scaling_factor is not a finite number"),
    ([h.to_field("max_k", -1)], "field max_k must be 0 (the default) or positive"),
    ([h.to_field("max_k", 1025)], "field max_k must be at most 1024"),
    ([h.to_field("n_group", 0)], "field n_group must be at least 1"),
    ([h.to_field("topk_group", 2)], "field topk_group must be between 1 and n_group"),
    ([h.to_field("top_k", 2)], "field top_k is not known; the fields are activation, scoring, norm_topk_prob"),
    ([h.to_field("max_k", 2)] * 2, "field max_k is given twice"),
    ([Field(None, h.F_INT32, 1, INT)], "field number 0 has no name"),
    ([h.to_field("max_k", 2), Field("n_group", h.F_INT32, 1, None)], "field n_group has no data"),
]


@pytest.mark.parametrize(("fields", "sentence"), WRONG)
@pytest.mark.parametrize("phase", [h.BUILD_PHASE, h.RUNTIME_PHASE])
def test_a_wrong_field_is_one_sentence_and_no_plugin(
    library: PluginLibrary, fields: list[Field], sentence: str, phase: int
) -> None:
    for creator in (0, 1):
        assert library.create(fields, creator=creator, phase=phase) is None
        [(severity, logged)] = library.log()
        assert severity == h.ERROR
        assert logged.startswith(f"AdaptiveKMoe: layer layers.0.moe: {sentence}")


def test_a_collection_that_is_not_there_is_one_sentence(library: PluginLibrary) -> None:
    assert library.create(None) is None
    assert library.errors() == ["AdaptiveKMoe: layer layers.0.moe: the collection of fields is null"]
    for count in (3, -2):
        assert library.create([], count=count) is None
        assert library.errors() == [
            f"AdaptiveKMoe: layer layers.0.moe: the collection of fields says it has {count} but carries none"
        ]


@pytest.mark.parametrize("name", [None, ""])
def test_a_layer_without_a_name_is_no_error(library: PluginLibrary, name: str | None) -> None:
    assert library.create([], name=name, activation="swish") is None
    [sentence] = library.errors()
    assert sentence.startswith("AdaptiveKMoe: field activation is 'swish'")
    plugin = library.create([], name=name)
    assert plugin is not None
    plugin.destroy()


def test_without_a_logger_errors_go_to_stderr(library: PluginLibrary, capfd: pytest.CaptureFixture[str]) -> None:
    library.lib.set_has_logger(0)
    try:
        assert library.create(activation="swish") is None
        plugin = library.create()
    finally:
        library.lib.set_has_logger(1)
    assert library.log() == []
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("AdaptiveKMoe: layer layers.0.moe: field activation is 'swish'")
    assert plugin is not None
    plugin.destroy()


OTHER_MAJOR = """
import sys

import plugin_harness as h

library = h.PluginLibrary(*map(h.Path, sys.argv[1:]))
assert library.create(activation="swish") is None
assert library.create(activation="geglu") is not None
assert library.log() == []
"""


@pytest.mark.parametrize(("built_for", "loaded_by"), [(11, 10), (10, 11)])
def test_the_other_major_version_gets_its_errors_on_stderr(
    recording_libraries: dict[str, PluginLibrary], built_for: int, loaded_by: int
) -> None:
    """The logger's layout differs between 10 and 11; a call into the wrong one would end the process."""
    plugin = recording_libraries[f"own{built_for}"].path
    arguments = [str(plugin), str(h.build_harness(loaded_by))]
    done = subprocess.run(
        [sys.executable, "-c", OTHER_MAJOR, *arguments], env={**os.environ, "PYTHONPATH": str(SUPPORT)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [sentence] = done.stderr.splitlines()
    assert sentence.startswith("AdaptiveKMoe: layer layers.0.moe: field activation is 'swish'")
