# SPDX-License-Identifier: Apache-2.0
"""What the container runs, run here: the image's command and its health check, with no capabilities, and by another
user than root where that one may run this Python at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from container_image import as_in_the_image, exec_form, free_ports, instructions

from adaptive_k_moe.client import Client

NOBODY = 65534


@pytest.fixture(scope="module")
def public_engine_dir(engine_dir: Path) -> Iterator[Path]:
    """The engine where another user can read it, as a volume is mounted: not to be written."""
    with tempfile.TemporaryDirectory(prefix="adaptive_k_image_") as directory:
        os.chmod(directory, 0o755)
        shutil.copytree(engine_dir, Path(directory, "engine"))
        subprocess.run(["chmod", "-R", "a=rX", directory], check=True)
        yield Path(directory, "engine")


def _without_rights() -> tuple[list[str], dict[str, Any]]:
    """What makes a command run as in the compose file: a prefix, and arguments of Popen."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return [], {}
    prefix = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
    other: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    try:
        subprocess.run([sys.executable, "-c", ""], check=True, **other)
    except PermissionError:
        return prefix, {}
    return ["setpriv", "--no-new-privs"], other


def _health(port: int) -> int:
    """Status of the image's own health check."""
    command = json.loads(instructions("HEALTHCHECK")[-1].partition("CMD ")[2])
    command[-1] = command[-1].replace(":8000/", f":{port}/")
    return subprocess.run(command, capture_output=True).returncode


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here; NVIDIA's image has it")
def test_the_images_command_serves_an_engine(public_engine_dir: Path, tmp_path: Path) -> None:
    http, grpc, metrics = free_ports(3)
    command = [*exec_form("ENTRYPOINT"), *exec_form("CMD")]
    command = [str(public_engine_dir) if word == "/engine" else word for word in command]
    ports = ["--http_port", str(http), "--grpc_port", str(grpc), "--metrics_port", str(metrics)]
    prefix, rights = _without_rights()
    environment = as_in_the_image(PYTHONDONTWRITEBYTECODE="1", PYTHONUNBUFFERED="1", OMP_NUM_THREADS="2")
    command[0] = str(Path(sys.executable).parent / command[0])  # Popen looks for it on this process's own PATH
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*prefix, *command, *ports],
            cwd="/tmp",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            **rights,
        )
    try:
        assert _health(http) != 0
        line = process.stdout.readline()
        assert line.startswith("adaptive-k: serving"), (tmp_path / "log").read_text()[-2000:]
        assert _health(http) == 0
        with Client(f"127.0.0.1:{grpc}", timeout=60) as client:
            assert client.generate("import os", max_tokens=8).num_output_tokens == 8
        process.send_signal(signal.SIGTERM)  # what `docker stop` sends
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 60
    while _health(http) == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _health(http) != 0
