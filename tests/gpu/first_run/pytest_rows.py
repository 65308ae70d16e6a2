# SPDX-License-Identifier: Apache-2.0
"""A plugin of pytest's: each test's outcome as a row of OUT_DIR/results.jsonl, when it is known.

Reads the folder from ADAPTIVE_K_ROWS. With pytest-xdist the controller alone adds rows, those of workers that died
among them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rows import FAILED, NOT_RUN, PASSED, Rows

ROWS = None if "PYTEST_XDIST_WORKER" in os.environ else Rows(Path(os.environ["ADAPTIVE_K_ROWS"]))
STAGE = "tests"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if ROWS is None or (report.passed and report.when != "call"):
        return
    case = report.nodeid.removeprefix("tests/gpu/")
    if report.passed:
        ROWS.add(STAGE, case, PASSED, seconds=round(report.duration, 3))
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        ROWS.add(STAGE, case, NOT_RUN, error=reason.removeprefix("Skipped: "))
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash is not None else str(report.longrepr)
        ROWS.add(STAGE, case, FAILED, error=" ".join(text.split())[:400])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if ROWS is not None and report.failed:
        ROWS.add(STAGE, report.nodeid, FAILED, error=str(report.longrepr).strip().splitlines()[-1])
