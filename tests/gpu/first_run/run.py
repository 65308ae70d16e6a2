# SPDX-License-Identifier: Apache-2.0
"""A GPU owner's first ten minutes: tests/gpu/run.sh OUT_DIR.

Stages, each in processes of its own and with a limit of time: `library` (the device; the library loads, or is
compiled), `smoke` (a launch of each path and weight format, each in its own process), `tests` (pytest), `sanitizer`
(compute-sanitizer), `benchmarks` (with torch's grouped products and a Triton kernel as peers) and `profile` (Nsight
Compute, where there is time). Each result is a line of OUT_DIR/results.jsonl as soon as it is known; the table at the
end is made from those lines alone.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]

import process  # noqa: E402
from report import LONGEST, table  # noqa: E402
from rows import FAILED, NOT_RUN, PASSED, Rows  # noqa: E402

try:
    from smoke import cases
except ModuleNotFoundError as lacking:
    raise SystemExit(
        f"run.sh: {lacking.name} is not installed for {sys.executable}: PYTHON=... names another"
    ) from None

LIMITS = {"library": 170.0, "smoke": 60.0, "tests": 150.0, "sanitizer": 70.0, "benchmarks": 200.0, "profile": 40.0}
WHOLE = 520.0  # seconds; what is left when a stage begins is its limit where that is less
WORKERS = max(2, min(8, (os.cpu_count() or 2) // 2))
ONE = {"case": 30.0, "part": 70.0}  # of the smoke tests, of the benchmarks
LAYERS = ("mixtral", "qwen3-30b", "nemotron")


class Run:
    """One run: where its results go, and how much time is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out.resolve()
        self.small: bool = options.small
        self.limits: dict[str, float] = {**LIMITS, **ONE, **options.limits}
        self.rows = Rows(self.out)
        self.log = self.out / "log.txt"
        self.env = {"ADAPTIVE_K_ROWS": str(self.out), "PYTHONUNBUFFERED": "1"}
        self.end = time.monotonic() + WHOLE
        self.stage_end = self.end

    def left(self) -> float:
        """Seconds until this stage must end."""
        return max(self.stage_end - time.monotonic(), 0.0)

    def python(self, arguments: list[str], limit: float = 1e9, log: Path | None = None) -> process.Ended:
        """Runs this interpreter, no longer than the stage may last."""
        return process.run([sys.executable, *arguments], min(limit, self.left()), log or self.log, self.env)

    def cases(self, stage: str) -> dict[str, str]:
        """The outcomes of a stage so far."""
        return {row["case"]: row["outcome"] for row in self.rows.read() if row["stage"] == stage}


def library(run: Run) -> None:
    """Stage 0. Leaves the library's path in the environment of the others."""
    ended = run.python([str(HERE / "library.py"), str(run.out)])
    rows = {row["case"]: row for row in run.rows.read() if row["stage"] == "library"}
    if "device" not in rows:
        run.rows.add("library", "device", FAILED, error=ended.error or "it ended without a result")
    if "library" not in rows and rows.get("device", {}).get("outcome") == PASSED:
        again = f"{ended.error}; where it was compiling, another run goes on from there"
        run.rows.add("library", "library", FAILED, error=again)
    found = rows.get("library", {}).get("path")
    if found:
        run.env["ADAPTIVE_K_CUDA_LIBRARY"] = found


def smoke(run: Run) -> None:
    """Stage 1: as many processes at once as half of the cores."""
    small = ["--small"] if run.small else []

    def one(case: str) -> None:
        if run.left() <= 0:
            run.rows.add("smoke", case, NOT_RUN, error="the stage's time was up")
            return
        ended = run.python([str(HERE / "smoke.py"), str(run.out), case, *small], limit=run.limits["case"])
        if case not in run.cases("smoke"):
            run.rows.add("smoke", case, FAILED, error=ended.error or "it ended without a result")

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(one, cases(run.small)))


def tests(run: Run) -> None:
    """Stage 2: the kernels' tests, those that take much memory alone; through torch too, where it is."""
    if importlib.util.find_spec("pytest") is None:
        run.rows.add("tests", "pytest", NOT_RUN, error="pytest is not installed")
        return
    installed = {name: importlib.util.find_spec(name) is not None for name in ("xdist", "pytest_timeout")}
    common = [
        *("-m", "pytest", "-q", "-p", "pytest_rows", "-p", "no:cacheprovider", f"--rootdir={ROOT}"),
        *(str(HERE.parent / f"test_gpu_{part}.py") for part in ("kernels", "mamba", "torch")),
        # Its thread ends a process that hangs in the driver, where no signal is handled.
        *(("--timeout=60", "--timeout-method=thread") if installed["pytest_timeout"] else ()),
    ]
    workers = ["-n", "1" if run.small else str(WORKERS)] if installed["xdist"] else []
    sessions = {
        "most": [*workers, "-k", "not sanitizer and not beyond and not real_model"],
        "large": ["-k", "beyond or real_model"],
    }
    if run.small:
        # In one process, so that what a lost context costs the next test is seen.
        sessions = {"most": [*workers, "-k", "captured_graph and int8"]}
    for name, more in sessions.items():
        ended = run.python([*common, *more])
        # pytest's last line, which a process that was killed has not written.
        if not re.search(r"\b\d+ \w+.* in [\d.]+s", ended.output):
            run.rows.add(
                "tests", f"pytest, {name}", FAILED, error=f"pytest did not get to its end: {ended.error}; see log.txt"
            )
        elif not re.search(r"\b\d+ (passed|failed|error)", ended.output):
            run.rows.add("tests", f"pytest, {name}", FAILED, error="no test ran; see log.txt")


def sanitizer(run: Run) -> None:
    """Stage 3: memory and races, on every kernel once."""
    program = shutil.which("compute-sanitizer") or next(
        (str(path) for path in sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None
    )
    tools = {"memcheck": [], "racecheck": ["--own"]}
    if program is None:
        for tool in tools:
            run.rows.add("sanitizer", tool, NOT_RUN, error="compute-sanitizer is not installed")
        return

    def one(tool: str) -> None:
        log = run.out / f"{tool}.txt"
        script = [sys.executable, str(ROOT / "tests" / "support" / "sanitized_launches.py"), *tools[tool]]
        command = [program, "--tool", tool, "--error-exitcode", "9", *script]
        ended = process.run(command, run.left(), log, run.env)
        if ended.error is None and "clean" in ended.output:
            run.rows.add("sanitizer", tool, PASSED, seconds=round(ended.seconds, 1))
        else:
            marked = [line.strip("= ") for line in ended.output.splitlines() if line.startswith("====")]
            first = next((line for line in marked if not line.startswith("COMPUTE-SANITIZER")), "")
            last = ended.output.strip().splitlines()[-1:] or [""]
            run.rows.add("sanitizer", tool, FAILED, error=f"{ended.error}: {first or last[0]}"[:400])
        with run.log.open("a") as whole:
            whole.write(log.read_text(errors="replace"))
        log.unlink()

    with ThreadPoolExecutor(len(tools)) as pool:
        list(pool.map(one, tools))


def benchmarks(run: Run) -> None:
    """Stage 4: a process for each layer and weight format, and one for each layer's peers."""
    folder = ROOT / "benchmarks" / "gpu"
    layers, tokens = (LAYERS, []) if not run.small else (("tiny",), ["--tokens", "1"])
    routings = ["--routings", "2"] if run.small else []
    parts = {}
    for weights in ("element", "int4", "int8"):
        for layer in layers:
            options = ["--out", str(run.out), "--layers", layer, *tokens]
            if "ADAPTIVE_K_CUDA_LIBRARY" in run.env:
                parts[f"{layer} {weights}"] = [str(folder / "moe_gpu.py"), *options, "--weights", weights, *routings]
            if weights == "element":
                parts[f"{layer} peers"] = [str(folder / "moe_peers.py"), *options]
    for part, command in parts.items():
        if "peers" in part and importlib.util.find_spec("torch") is None:
            run.rows.add("benchmarks", part, NOT_RUN, error="torch is not installed")
        elif run.left() <= 0:
            run.rows.add("benchmarks", part, NOT_RUN, error="the stage's time was up")
        else:
            ended = run.python(command, limit=run.limits["part"])
            if ended.error:
                words = ended.output.strip().splitlines()[-1:] or [""]
                run.rows.add("benchmarks", part, FAILED, error=f"{ended.error}: {words[0][:300]}")


METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
}


def kernels_of(csv_text: str) -> dict[str, dict[str, float]]:
    """What Nsight Compute measured, by the number and name of a kernel; its other output is passed over."""
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(line for line in csv_text.splitlines() if line.startswith('"')):
        if row["Metric Name"] in METRICS:
            value = float(row["Metric Value"].replace(",", ""))
            found.setdefault(f"{row['ID']} {row['Kernel Name']}"[:80], {})[METRICS[row["Metric Name"]]] = value
    return found


def profile(run: Run) -> None:
    """Stage 5, where ncu is: what share of the memory's and the schedulers' peak the kernels of a launch reach."""
    program = shutil.which("ncu")
    if program is None or run.small or run.left() < 20:
        return
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--print-units", "base"]
    script = [sys.executable, str(HERE / "profiled_launches.py")]
    command = [program, *options, "--metrics", ",".join(METRICS), *script]
    ended = process.run(command, run.left(), run.log, run.env)
    found = kernels_of(ended.output)
    for kernel, values in found.items():
        run.rows.add("profile", kernel, PASSED, **values)
    if ended.error or not found:
        run.rows.add("profile", "ncu", NOT_RUN, error=f"{ended.error or 'no kernel was profiled'}; see log.txt")


STAGES = {
    "library": library, "smoke": smoke, "tests": tests, "sanitizer": sanitizer, "benchmarks": benchmarks,
    "profile": profile,
}  # fmt: skip


def run_stages(run: Run, stages: list[str]) -> None:
    """All stages, one after the other; those that nothing can come of are put down as not run."""
    for stage in stages:
        began = time.monotonic()
        run.stage_end = min(began + run.limits[stage], run.end)
        device = run.cases("library").get("device") != FAILED
        built = "ADAPTIVE_K_CUDA_LIBRARY" in run.env
        if stage == "library" or (device and (built or stage == "benchmarks")):
            STAGES[stage](run)
        elif stage != "profile":
            run.rows.add(stage, "all", NOT_RUN, error="there is no library" if device else "there is no device")
        outcomes = list(run.cases(stage).values())
        counts = ", ".join(f"{outcomes.count(name)} {name}" for name in (PASSED, FAILED, NOT_RUN) if name in outcomes)
        print(f"{stage:10} {time.monotonic() - began:6.1f} s  {counts}", flush=True)


def limit(text: str) -> tuple[str, float]:
    """STAGE=SECONDS."""
    stage, _, seconds = text.partition("=")
    if stage not in (*LIMITS, *ONE):
        raise argparse.ArgumentTypeError(f"{stage!r} has no limit: {', '.join((*LIMITS, *ONE))} have")
    return stage, float(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.sh", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="must not have results of another run")
    parser.add_argument("--stages", default=",".join(STAGES), help="those to run (default: all)")
    parser.add_argument("--limit", type=limit, action="append", default=[], metavar="STAGE=SECONDS", dest="limits")
    parser.add_argument("--small", action="store_true", help="sizes for the kernels' interpreter on a CPU")
    options = parser.parse_args()
    options.limits = dict(options.limits)
    stages = options.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"{unknown.pop()!r} is no stage: {', '.join(STAGES)}")
    run = Run(options)
    if run.rows.path.exists():
        parser.error(f"{run.rows.path} is there already: name another folder")

    def stop(*_: object) -> None:
        run.end = run.stage_end = 0.0
        process.kill_all()
        raise SystemExit("run.sh: stopped by a signal")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    finished = False
    try:
        run_stages(run, ["library", *(stage for stage in stages if stage != "library")])
        finished = True
    finally:
        if not finished:
            run.rows.add("run", "all stages", FAILED, error="stopped before its end")
        text = table(run.rows.read(), LONGEST)
        (run.out / "table.txt").write_text(text)
        print("\n" + text, end="", flush=True)
    return 0 if all(row["outcome"] == PASSED for row in run.rows.read() if row["stage"] != "profile") else 1


if __name__ == "__main__":
    sys.exit(main())
