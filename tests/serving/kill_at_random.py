# SPDX-License-Identifier: Apache-2.0
"""Ends `adaptive-k serve`, the demo and the playground at random moments, and counts what is left.

    python tests/serving/kill_at_random.py --times 200

Each time one of the three starts with a folder of its own for temporary files, and is ended by SIGTERM, by SIGINT (to
its group, as Ctrl-C), by SIGKILL, or by its terminal, which closes. Half of the moments lie in the first second and a
half. Then it counts processes that descend from it, entries of its temporary folder, and shared memory; what is still
there after ten seconds is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import random
import signal
import subprocess
import sys
import tempfile
import termios
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
MARK = "ADAPTIVE_K_KILLED_AT_RANDOM"
WAYS = ("serve", "demo", "playground")
ENDS = ("SIGTERM", "SIGINT", "SIGKILL", "terminal")
# How long each runs until it only waits, or has ended.
SECONDS = {"serve": 6.0, "demo": 12.0, "playground": 3.0}
_EARLY_SECONDS = 1.5
_EXIT_SECONDS = 30.0
_SETTLE_SECONDS = 10.0


class Killed(NamedTuple):
    """One that was ended.

    Attributes:
        way: what ran.
        end: what ended it.
        moment: after how many seconds.
        status: its exit status, negative for a signal; None if it did not end and had to be killed.
        left: what was still there, in words.
        seconds: how long it took until nothing was left.
    """

    way: str
    end: str
    moment: float
    status: int | None
    left: list[str]
    seconds: float


def command(way: str, engine_dir: Path, directory: Path) -> list[str]:
    """The command of a way.

    Args:
        way: one of `WAYS`.
        engine_dir: the engine to serve.
        directory: for the demo's output.
    """
    ours = [sys.executable, "-m", "adaptive_k_moe"]
    ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}_port", "0")]
    return {
        "serve": [*ours, "serve", "--engine_dir", str(engine_dir), *ports],
        "demo": [
            *(sys.executable, str(REPOSITORY / "examples" / "demo.py"), "--output_dir", str(directory)),
            *("--max_tokens", "8", "--heldout_tokens", "512"),
        ],
        "playground": [*ours, "playground", "--port", "0", "--url", "127.0.0.1:9", "--metrics_url", "127.0.0.1:9"],
    }[way]


def kill_at(way: str, end: str, moment: float, engine_dir: Path) -> Killed:
    """Start a way, end it after `moment` seconds, and see what is left."""
    with tempfile.TemporaryDirectory(prefix="k_", dir="/tmp") as temporary, tempfile.TemporaryDirectory() as output:
        mark = uuid.uuid4().hex
        environment = {**os.environ, MARK: mark, "TMPDIR": temporary}
        names: set[str] = set()
        with _terminal() as (terminal, ours):
            process = subprocess.Popen(
                command(way, engine_dir, Path(output, "demo")),
                env=environment,
                stdin=terminal,
                stdout=terminal,
                stderr=terminal,
                start_new_session=True,
                preexec_fn=_sit_at_terminal,
            )
            os.close(terminal)
            os.set_blocking(ours, False)
            until = time.monotonic() + moment
            while time.monotonic() < until:
                _watch(Path(temporary), names, ours)
            if end == "SIGINT":
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGINT)
            elif end != "terminal":
                process.send_signal(signal.Signals[end])
            else:
                os.close(ours)
            ended = time.monotonic()
            while process.poll() is None and time.monotonic() - ended < _EXIT_SECONDS:
                _watch(Path(temporary), names, None if end == "terminal" else ours)
            status = process.returncode
            if status is None:
                process.kill()
                process.wait()
        ended = time.monotonic()
        while (left := _left(mark, Path(temporary), names)) and time.monotonic() - ended < _SETTLE_SECONDS:
            time.sleep(0.05)
        seconds = time.monotonic() - ended
        for pid in _processes(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for name in names:
            for region in Path("/dev/shm").glob(f"{name}_*"):
                region.unlink(missing_ok=True)
        return Killed(way, end, moment, status, left, seconds)


def _sit_at_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored where this runs in the background
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _terminal() -> Iterator[tuple[int, int]]:
    """A pseudo-terminal: the end that a command sits at, and ours."""
    ours, terminal = os.openpty()
    try:
        yield terminal, ours
    finally:
        for descriptor in (ours, terminal):
            with contextlib.suppress(OSError):  # closed before
                os.close(descriptor)


def _watch(temporary: Path, names: set[str], ours: int | None) -> None:
    """Note the servers' folders, by which their shared memory is named, and read what the command writes."""
    names.update(path.name for path in temporary.glob("adaptive_k_server_*"))
    if ours is not None:
        with contextlib.suppress(OSError):  # nothing there, or its end of the terminal is closed
            os.read(ours, 1 << 16)
    time.sleep(0.005)


def _processes(mark: str) -> list[int]:
    """Processes that descend from the command that bears this mark."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it went, or is another user's
            if f"{MARK}={mark}".encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
    return found


def _left(mark: str, temporary: Path, names: set[str]) -> list[str]:
    left = []
    for pid in _processes(mark):
        with contextlib.suppress(OSError):
            left.append(f"process {Path(f'/proc/{pid}/comm').read_text().strip()}")
    left += [str(path) for path in temporary.iterdir()]
    left += [str(path) for name in names for path in Path("/dev/shm").glob(f"{name}_*")]
    return left


def kill_many(times: int, seed: int, engine_dir: Path) -> Iterator[Killed]:
    """End all ways in all manners in turn, at moments drawn from `seed`."""
    draw = random.Random(seed)
    for number in range(times):
        way, end = WAYS[number % len(WAYS)], ENDS[number // len(WAYS) % len(ENDS)]
        early = draw.random() < 0.5
        yield kill_at(way, end, draw.uniform(0.0, _EARLY_SECONDS if early else SECONDS[way]), engine_dir)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200, help="how many to end (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments (default: %(default)s)")
    args = parser.parse_args()
    from adaptive_k_moe.engine_builder import build

    counts: Counter[tuple[str, str]] = Counter()
    bad = 0
    slowest = 0.0
    with tempfile.TemporaryDirectory() as directory:
        engine_dir = Path(directory, "engine")
        build(REPOSITORY / "examples" / "models" / "mixtral-small", engine_dir, max_seq_len=128)
        for number, killed in enumerate(kill_many(args.times, args.seed, engine_dir), 1):
            counts[killed.way, killed.end] += 1
            slowest = max(slowest, killed.seconds)
            if killed.left or killed.status is None:
                bad += 1
                what = ", ".join(killed.left) or "it did not end"
                print(f"{number}: {killed.way}, {killed.end} after {killed.moment:.3f} s left {what}", flush=True)
    for way in WAYS:
        print(f"{way}: " + ", ".join(f"{counts[way, end]} {end}" for end in ENDS))
    print(f"{args.times} ended, {bad} left something; the slowest left nothing {slowest:.1f} s after its end")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
