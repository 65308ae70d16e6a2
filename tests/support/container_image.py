# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile as tests need it: parsed, its build context copied out, its commands with paths of this machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path

from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser

REPOSITORY = Path(__file__).resolve().parents[2]


def _structure() -> list[dict[str, str]]:
    structure: list[dict[str, str]] = DockerfileParser(path=str(REPOSITORY), cache_content=True).structure
    return structure


def instructions(name: str) -> list[str]:
    """What stands behind each instruction of this name, in order, continued lines joined."""
    return [part["value"] for part in _structure() if part["instruction"] == name]


def copied_before(start: str) -> list[str]:
    """Sources of the COPY instructions that stand before the RUN line that has this in it."""
    sources: list[str] = []
    for part in _structure():
        if part["instruction"] == "RUN" and start in part["value"]:
            return sources
        if part["instruction"] == "COPY" and not part["value"].startswith("--from"):
            sources += part["value"].split()[:-1]
    raise AssertionError(f"no RUN line has {start}")


def exec_form(name: str) -> list[str]:
    """The program and arguments of the last instruction of this name, which is in JSON."""
    found: list[str] = json.loads(instructions(name)[-1])
    return found


def run_line(start: str) -> str:
    """The one RUN line that has this in it."""
    (line,) = [line for line in instructions("RUN") if start in line]
    return line


def context_files() -> list[str]:
    """The build context's files as Docker's own client would send them."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    paths = exclude_paths(str(REPOSITORY), patterns)
    return sorted(path for path in paths if (REPOSITORY / path).is_file())


def copy_context(target: Path, *under: str) -> None:
    """Copy what of the build context lies under these paths to `target`."""
    for name in context_files():
        if any(path == "." or name == path or name.startswith(f"{path}/") for path in under):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target / name)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def as_in_the_image(**changes: str) -> dict[str, str]:
    """The environment of a process in the container: nothing of this shell's but where its programs are."""
    return {"PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"]), **changes}
