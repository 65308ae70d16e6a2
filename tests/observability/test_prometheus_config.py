# SPDX-License-Identifier: Apache-2.0
"""The Prometheus of docker/compose.yaml: its configuration and the rules that are mounted into it, by promtool."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml


def test_promtool_takes_the_configuration(repository: Path, promtool: str, tmp_path: Path) -> None:
    mounts = yaml.safe_load((repository / "docker" / "compose.yaml").read_text())["services"]["prometheus"]["volumes"]
    source_of = {target: source for source, target, *_ in (mount.split(":") for mount in mounts)}
    config = yaml.safe_load((repository / "docker" / "prometheus.yml").read_text())
    config["rule_files"] = [str(repository / "docker" / source_of[path]) for path in config["rule_files"]]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    done = subprocess.run([promtool, "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rule files found" in done.stdout
