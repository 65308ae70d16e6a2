# SPDX-License-Identifier: Apache-2.0
"""The stand-in for TensorRT's header has the binary layout of TensorRT's own.

header_probe.cpp prints that layout: positions and signatures of the virtual methods, lengths of their
tables, sizes and members of structures, values of enumerators, names of interfaces. layout/ holds what it
printed with the headers of TensorRT 10 (all releases from 10.0 to 10.16) and of TensorRT 11 (11.0 and 11.1).
"""

from __future__ import annotations

import subprocess
from functools import cache

import plugin_harness as h
import pytest


@cache
def layout(headers: h.Headers) -> list[str]:
    probe = h.compiled(
        f"header_probe_{headers.name}", [h.HERE / "header_probe.cpp"], ["-O0", "-w", *headers.flags()], shared=False
    )
    return subprocess.run([probe], capture_output=True, text=True, check=True).stdout.splitlines()


def measured(major: int) -> list[str]:
    return (h.HERE / "layout" / f"tensorrt{major}.txt").read_text().splitlines()


@pytest.mark.parametrize("major", [10, 11])
def test_the_stand_in_has_the_layout_that_was_measured(major: int) -> None:
    assert layout(h.own_headers(major)) == measured(major)


def test_the_layout_is_that_of_the_real_headers() -> None:
    if isinstance(h.REAL_HEADERS, str):
        pytest.skip(h.REAL_HEADERS)
    real = layout(h.REAL_HEADERS)
    assert real == measured(h.REAL_HEADERS.major)
    assert real == layout(h.own_headers(h.REAL_HEADERS.major))


def test_the_probe_sees_a_moved_method() -> None:
    """The two layouts differ where 11 gave the logger a base class, so a shift does show."""
    moved = set(layout(h.own_headers(10))) ^ set(layout(h.own_headers(11)))
    assert {line.split()[1] for line in moved} == {
        "ILogger::log",
        "ILoggerFinder::findLogger",
        "ILogger",
        "ILoggerFinder",
    }
