# SPDX-License-Identifier: Apache-2.0
"""tests/gpu/run.sh with a stand-in for the GPU: the script, its stages, what a fault costs, and the table."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import process
import psutil
import pytest
import run
from report import LONGEST, table
from rows import Rows

from waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "gpu" / "run.sh"


@dataclass
class Done:
    status: int
    printed: str
    rows: list[dict[str, Any]]

    def outcomes(self, stage: str) -> dict[str, str]:
        return {row["case"]: row["outcome"] for row in self.rows if row["stage"] == stage}

    def error(self, stage: str, case: str) -> str:
        return next(row["error"] for row in self.rows if row["stage"] == stage and case in row["case"])


def environment(stand_in: Path, faults: str = "", **more: str) -> dict[str, str]:
    libraries = {"ADAPTIVE_K_LIBCUDA": str(stand_in), "ADAPTIVE_K_CUDA_LIBRARY": str(stand_in)}
    # The rehearsed run is nobody's worker, whatever this process is.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**own, "PYTHON": sys.executable, **libraries, "STAND_IN_FAULTS": faults, **more}


def first_run(out: Path, env: dict[str, str], *options: str, **limits: int) -> Done:
    # This machine may be busy: what is to be killed says so by a limit of its own.
    patient = {"smoke": 300, "tests": 300, "sanitizer": 300, "benchmarks": 300, "case": 120, **limits}
    command = [SCRIPT, out, "--small", *(f"--limit={name}={seconds}" for name, seconds in patient.items()), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return Done(done.returncode, done.stdout, Rows(out).read())


def left_behind(out: Path) -> list[psutil.Process]:
    """Processes whose command names the run's folder."""
    return [found for found in psutil.process_iter() if str(out) in " ".join(found_command(found))]


def found_command(found: psutil.Process) -> list[str]:
    try:
        return found.cmdline()
    except psutil.Error:
        return []


@pytest.fixture
def sanitizer_path(tmp_path: Path) -> str:
    """A PATH with a compute-sanitizer that runs the program and watches nothing."""
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nshift 4\nexec "$@"\n')
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


def test_all_that_passes_is_status_0(stand_in: Path, tmp_path: Path, sanitizer_path: str) -> None:
    """The GPU tests' own harness too: the stand-in does nothing before somebody waits for it."""
    env = environment(stand_in, PATH=sanitizer_path)
    done = first_run(tmp_path / "out", env, "--stages", "smoke,sanitizer")
    assert [row for row in done.rows if row["outcome"] != "passed"] == []
    assert done.status == 0
    for stage, cases in {"library": 2, "smoke": 14, "sanitizer": 2}.items():
        assert len(done.outcomes(stage)) == cases, stage
    assert "decode int4 T=5" in (tmp_path / "out" / "log.txt").read_text()
    assert left_behind(tmp_path) == []


def test_a_fault_costs_its_own_row(stand_in: Path, tmp_path: Path, sanitizer_path: str) -> None:
    """A lost context, a process that crashes and one that hangs, in each stage that has such launches."""
    faults = "int8 decode=dead,int4 decode=crash,int4 prefill=hang"
    env = environment(stand_in, faults, PATH=sanitizer_path)
    done = first_run(tmp_path / "out", env, case=20, sanitizer=6)
    assert done.status == 1

    smoke = done.outcomes("smoke")
    assert {case for case, outcome in smoke.items() if outcome == "failed"} == {
        "decode int8 T=5", "decode int4 T=5", "prefill int4 T=5"
    }  # fmt: skip
    assert len(smoke) == 14
    assert "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in done.error("smoke", "decode int8")
    assert done.error("smoke", "decode int4") == "ended by SIGSEGV"
    assert done.error("smoke", "prefill int4") == "killed after its limit of 20 s"

    # The worker whose context was lost is replaced: the test after it, on the same worker, passes.
    kernels = {case: outcome for case, outcome in done.outcomes("tests").items() if "kernels" in case}
    tests = {case.split("[")[-1]: outcome for case, outcome in kernels.items()}
    assert {case for case, outcome in tests.items() if outcome == "failed"} == {"int8-decode]"}
    assert tests["int8-prefill]"] == "passed"

    assert set(done.outcomes("sanitizer").values()) == {"failed"}  # it launches int4 too
    benchmarks = done.outcomes("benchmarks")
    assert benchmarks["tiny element T=1 k=1/2"] == "passed"
    assert benchmarks["tiny int4"] == benchmarks["tiny int8"] == "failed"
    assert "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in done.error("benchmarks", "tiny int8")

    text = (tmp_path / "out" / "table.txt").read_text()
    assert done.printed.endswith(text)
    assert "FIRST FAILURE: smoke: " in text
    assert "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in text
    assert left_behind(tmp_path) == []


def test_a_driver_that_refuses_is_told_in_a_second(stand_in: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    done = first_run(tmp_path / "out", environment(stand_in, "no_device"))
    assert time.monotonic() - began < 10
    assert done.status == 1
    assert "FIRST FAILURE: library: device: cuInit returned CUDA_ERROR_NO_DEVICE (100)" in done.printed
    assert {row["outcome"] for row in done.rows} == {"failed", "not run"}
    assert {row["stage"] for row in done.rows} == {"library", "smoke", "tests", "sanitizer", "benchmarks"}


def test_without_a_library_it_says_what_is_missing(stand_in: Path, tmp_path: Path) -> None:
    """And goes on with the peers, which need none."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "dirname").symlink_to("/usr/bin/dirname")  # no cmake
    env = environment(stand_in, PATH=str(tools), ADAPTIVE_K_CUDA_LIBRARY=str(tmp_path / "library.so"))
    done = first_run(tmp_path / "out", env)
    error = done.error("library", "library")
    assert error.startswith(f"{tmp_path / 'library.so'} is not there, and it cannot be compiled here without ")
    assert "cmake" in error
    assert done.outcomes("smoke") == {"all": "not run"}
    assert list(done.outcomes("benchmarks")) == ["tiny peers"]


def test_a_library_of_another_machine_is_told_apart(stand_in: Path, tmp_path: Path) -> None:
    broken = tmp_path / "library.so"
    broken.write_bytes(b"\x7fELF")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "dirname").symlink_to("/usr/bin/dirname")
    env = environment(stand_in, PATH=str(tools), ADAPTIVE_K_CUDA_LIBRARY=str(broken))
    done = first_run(tmp_path / "out", env, "--stages", "library")
    assert f"{broken} does not load (" in done.error("library", "library")


def test_a_signal_ends_everything_and_the_table_is_printed(stand_in: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    env = environment(stand_in, "element decode=hang,int8 decode=hang,int4 decode=hang")
    command = [SCRIPT, out, "--small", "--stages", "smoke"]
    program = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert eventually(lambda: any("smoke.py" in " ".join(found_command(found)) for found in left_behind(out)), 120)
    program.send_signal(signal.SIGTERM)
    printed, _ = program.communicate(timeout=120)
    assert program.returncode == 1
    assert "run: all stages: stopped before its end" in printed
    assert left_behind(out) == []


def test_a_folder_with_results_is_refused(stand_in: Path, tmp_path: Path) -> None:
    Rows(tmp_path).add("smoke", "a", "passed")
    done = subprocess.run([SCRIPT, tmp_path], env=environment(stand_in), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "name another folder" in done.stderr


def test_what_a_program_started_ends_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ended = process.run(["sh", "-c", "sleep 1000 & echo $!; wait"], 1.0, log)
    assert ended.error == "killed after its limit of 1 s"
    pid = int(ended.output)
    assert eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    assert process.run(["sh", "-c", "exit 3"], 5, log).error == "ended with status 3"
    assert process.run(["sh", "-c", "exit 0"], 5, log).error is None


def test_a_line_cut_off_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    rows.add("smoke", "a", "passed")
    with rows.path.open("a") as file:
        file.write('{"stage": "smo')
    assert [row["case"] for row in rows.read()] == ["a"]


NCU = """==PROF== Connected to process 7
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","python","host","decode_product","1","13","(256, 1, 1)","(64, 2, 1)","0","9.0","Command line profiler metrics",\
"dram__throughput.avg.pct_of_peak_sustained_elapsed","%","81.5"
"0","7","python","host","decode_product","1","13","(256, 1, 1)","(64, 2, 1)","0","9.0","Command line profiler metrics",\
"gpu__time_duration.sum","ns","164,032"
"""


def test_a_profile_is_read_by_its_columns() -> None:
    found = run.kernels_of(NCU)
    assert found == {"0 decode_product": {"dram_percent": 81.5, "ns": 164032.0}}
    text = table([{"stage": "profile", "case": case, "outcome": "passed", **row} for case, row in found.items()])
    assert "164.0 us  memory  82 %" in text


def all_rows() -> list[dict[str, Any]]:
    """A run of every benchmark, with figures as wide as they get."""
    rows: list[dict[str, Any]] = [
        {"stage": "benchmarks", "case": "copy", "outcome": "passed", "gb_s": 4300.0},
        {"stage": "benchmarks", "case": "product", "outcome": "passed", "tflop_s": 790.0},
    ]
    for layer, ks in (
        ("mixtral", ("2", "1", "1/2")),
        ("qwen3-30b", ("8", "4", "4/8")),
        ("nemotron", ("6", "3", "3/6")),
    ):
        for tokens in (1, 4, 16, 64, 256, 1024, 4096):
            for k in ks:
                common = {"stage": "benchmarks", "outcome": "passed", "layer": layer, "tokens": tokens, "k": k}
                for weights in ("element", "int4", "int8"):
                    case = {"case": f"{layer} {weights} {tokens} {k}", "weights": weights, "path": "prefill"}
                    rows.append({**common, **case, "us": 29123.4, "bytes": 29123.4 * 4299e3, "flop": 29123.4 * 789e6})
                if "/" not in k:
                    peers = {peer: f"{layer} {peer} {tokens} {k}" for peer in ("torch", "triton")}
                    rows += [{**common, "case": case, "peer": peer, "us": 32123.4} for peer, case in peers.items()]
    return rows


def test_the_whole_table_fits_the_end_of_a_log() -> None:
    rows = all_rows()
    rows += [{"stage": "smoke", "case": f"case {i}", "outcome": "failed", "error": "e" * 500} for i in range(30)]
    rows += [{"stage": "tests", "case": f"case {i}", "outcome": "not run", "error": "e" * 500} for i in range(30)]
    text = table(rows)
    assert len(text) < 12_000
    assert LONGEST < 12_000
    assert text.count("29123.4 4299 100 789 100") == 3 * 63  # none was left out
    assert "FIRST FAILURE: smoke: case 0: eee" in text
    many = [*rows, *({**row, "layer": row["layer"] + "-2"} for row in rows if "layer" in row)]
    assert len(table(many)) < 12_000
    assert "more lines" in table(many)


def test_the_table_divides_what_was_measured() -> None:
    common = {"stage": "benchmarks", "outcome": "passed", "layer": "mixtral", "tokens": 64}
    ours = {**common, "weights": "element", "path": "decode", "bytes": 2e9, "flop": 1e12}
    rows = [
        {"stage": "benchmarks", "case": "copy", "outcome": "passed", "gb_s": 4000.0},
        {"stage": "benchmarks", "case": "product", "outcome": "passed", "tflop_s": 800.0},
        {**ours, "case": "a", "k": "2", "us": 1000.0},
        {**ours, "case": "b", "k": "1/2", "us": 750.0},
        {**common, "case": "c", "k": "2", "peer": "torch", "us": 1500.0},
    ]
    line = next(line for line in table(rows).splitlines() if line.startswith("  64"))
    # 2 GB in 1 ms are 2000 GB/s, half of the copy's; 1 TFLOP in 1 ms are 1000 TFLOP/s.
    assert line.split(" |") == [
        "  64 D", " 1000.0 2000  50 1000 125", "  750.0 2667  67 1333 167", "1500.0      -", "0.75"
    ]  # fmt: skip
