# SPDX-License-Identifier: Apache-2.0
"""compose.yaml and what it mounts: valid by the Compose specification's schema, and whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from container_image import REPOSITORY, instructions

DOCKER = REPOSITORY / "docker"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return content


def test_it_fits_the_compose_specification() -> None:
    command = [str(Path(sys.executable).parent / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(DOCKER / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_images_are_pinned(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if "build" not in service:
            tag = service["image"].partition(":")[2]
            assert tag[:1] in {"v", *"0123456789"} and tag.count(".") == 2, name


def test_whatever_is_mounted_is_in_the_repository(compose: dict[str, Any]) -> None:
    named = set(compose["volumes"])
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.partition("}" if volume.startswith("$") else ":")[0]
            if source.startswith("."):
                assert (DOCKER / source).exists(), source
            else:
                assert source in named or source.startswith("${ENGINE_DIR:?")


def test_servers_have_a_gpu_each_and_one_name(compose: dict[str, Any]) -> None:
    servers = [service for service in compose["services"].values() if "build" in service]
    gpus, ports = [], []
    for server in servers:
        (device,) = server["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        gpus += device["device_ids"]
        ports += server["ports"]
        assert server["networks"]["default"]["aliases"] == ["servers"]
        assert server["read_only"] and server["tmpfs"] == ["/tmp"]
    assert len(set(gpus)) == len(gpus) == 2
    assert len({port.rpartition(":")[0] for port in ports}) == len(ports) == 6
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_build_arguments_are_the_dockerfiles(compose: dict[str, Any]) -> None:
    known = dict(line.replace('"', "").split("=", 1) for line in instructions("ARG"))
    for name, value in compose["x-triton"]["build"]["args"].items():
        assert value == f"${{{name}:-{known[name]}}}"


def test_prometheus_scrapes_every_server(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (names,) = job["dns_sd_configs"]
    assert names["names"] == compose["x-triton"]["networks"]["default"]["aliases"]
    assert str(names["port"]) in {port.partition("/")[0] for port in " ".join(instructions("EXPOSE")).split()}
    mounts = [volume.split(":")[1] for volume in compose["services"]["prometheus"]["volumes"]]
    assert set(config["rule_files"]) <= set(mounts)


def test_grafana_shows_the_dashboard_of_that_prometheus(compose: dict[str, Any]) -> None:
    mounts = dict(reversed(volume.split(":")[:2]) for volume in compose["services"]["grafana"]["volumes"])
    provider = yaml.safe_load((DOCKER / "grafana" / "dashboards" / "adaptive_k.yaml").read_text())
    (folder,) = [provider["options"]["path"] for provider in provider["providers"]]
    dashboards = list((DOCKER / mounts[folder]).glob("*.json"))
    assert dashboards
    source = yaml.safe_load((DOCKER / "grafana" / "datasources" / "prometheus.yaml").read_text())
    (server,) = source["datasources"]
    assert server["url"] == "http://prometheus:9090"
    assert {"prometheus", "grafana"} <= set(compose["services"])
