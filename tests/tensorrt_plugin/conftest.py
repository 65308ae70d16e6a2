# SPDX-License-Identifier: Apache-2.0
"""The plugin's libraries, built once for all tests of this folder."""

from __future__ import annotations

from functools import partial

import plugin_harness as h
import pytest
from cuda_build import build_interpreter


@pytest.fixture(scope="session")
def recording_libraries() -> dict[str, h.PluginLibrary]:
    """The plugin with the recording launcher, by the headers that it was built with."""
    recorder = [h.HERE / "recording_launcher.cpp"]
    jobs = [partial(h.build_plugin, "recording", chosen, recorder) for chosen in h.HEADERS.values()]
    jobs += [partial(h.build_harness, major) for major in (11, 10)]
    *plugins, eleven, ten = h.build_all(jobs)
    return {
        name: h.PluginLibrary(path, eleven if chosen.major == 11 else ten)
        for (name, chosen), path in zip(h.HEADERS.items(), plugins, strict=True)
    }


@pytest.fixture(params=list(h.HEADERS))
def library(request: pytest.FixtureRequest, recording_libraries: dict[str, h.PluginLibrary]) -> h.PluginLibrary:
    """The plugin with the recording launcher, its log empty and the launcher agreeable."""
    library = recording_libraries[request.param]
    h.Recorder(library).answer()
    library.log()
    return library


@pytest.fixture
def recorder(library: h.PluginLibrary) -> h.Recorder:
    return h.Recorder(library)


@pytest.fixture(scope="session")
def computing_library() -> h.PluginLibrary:
    """The plugin over the real launcher and kernels, in the interpreter's library."""
    folder = build_interpreter().parent
    link = [f"-L{folder}", "-ladaptive_k_simt", f"-Wl,-rpath,{folder}"]
    jobs = [
        partial(h.build_plugin, "computing", h.own_headers(11), [], link),
        partial(h.build_harness, 11),
    ]
    plugin, harness = h.build_all(jobs)
    return h.PluginLibrary(plugin, harness)


@pytest.fixture
def computing(computing_library: h.PluginLibrary) -> h.PluginLibrary:
    computing_library.log()
    return computing_library
