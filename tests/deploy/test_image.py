# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile without Docker: linted, its sources there, its versions those that the package asks for, and its
commands run as far as they need no GPU and none of NVIDIA's images."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib
from container_image import (
    REPOSITORY,
    context_files,
    copied_before,
    copy_context,
    exec_form,
    instructions,
    run_line,
)
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# The image's Python; markers of requirements are read for it.
IMAGE = {"python_version": "3.12", "python_full_version": "3.12.3", "platform_machine": "x86_64", "extra": ""}
# NVIDIA's images bring it.
FROM_THE_IMAGE = {"tensorrt"}


def test_hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert program is not None
    done = subprocess.run([program, "--failure-threshold", "style", "Dockerfile"], cwd=REPOSITORY, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")


def test_images_are_pinned_to_one_release() -> None:
    release, *images = instructions("ARG")[:3]
    name, _, version = release.partition("=")
    assert name == "RELEASE"
    assert version.replace(".", "").isdigit()
    assert all(image.endswith(":${RELEASE}-py3") for image in images)
    assert instructions("FROM") == ["${BUILDER_IMAGE} AS builder", "${RUNTIME_IMAGE} AS runtime"]


def test_whatever_is_copied_is_in_the_build_context() -> None:
    files = context_files()
    for line in instructions("COPY"):
        *sources, _ = shlex.split(line)
        if sources[0].startswith("--from="):
            continue
        for source in sources:
            wanted = source.rstrip("/")
            assert wanted == "." or any(name == wanted or name.startswith(f"{wanted}/") for name in files), source


def test_the_build_context_has_the_package_and_nothing_that_is_made() -> None:
    files = context_files()
    packages = _pyproject()["tool"]["scikit-build"]["wheel"]["packages"].values()
    for package in packages:
        assert any(name.startswith(f"{package}/") for name in files), package
    tops = {name.split("/")[0] for name in files}
    assert not tops & {"build", ".venv", ".git", "tests", "demo_output", "examples"}
    assert not [name for name in files if name.endswith((".so", ".pyc"))]


def test_the_server_runs_without_rights_and_says_how_it_is() -> None:
    assert instructions("USER") == ["1000:1000"]
    (check,) = instructions("HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert command[-1] == "http://127.0.0.1:8000/v2/health/ready"
    assert "--fail" in command
    assert exec_form("ENTRYPOINT") == ["adaptive-k"]
    assert {word.split("/")[0] for word in " ".join(instructions("EXPOSE")).split()} == {"8000", "8001", "8002"}


def test_pins_are_what_the_package_asks_for() -> None:
    pins = _pins("requirements.txt")
    for requirement in _asked("engine", "observability", "tensorrt"):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_pins_are_complete_and_no_more() -> None:
    """Packages are installed with --no-deps, so what the pinned ones need must be pinned, too."""
    pins = _pins("requirements.txt")
    todo = [(canonicalize_name(r.name), frozenset(r.extras)) for r in _asked("engine", "observability", "tensorrt")]
    needed: set[str] = set()
    while todo:
        name, extras = todo.pop()
        assert name in pins, f"{name} is needed and not pinned"
        needed.add(name)
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if not _applies(requirement, extras):
                continue
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin is not None, f"{name} needs {requirement}"
            # What another release than the pinned one asks for says nothing about the pinned one.
            if importlib.metadata.version(name) == pins[name]:
                assert requirement.specifier.contains(pin), f"{name} needs {requirement}"
            if canonicalize_name(requirement.name) not in needed:
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    assert needed == set(pins)


def test_what_builds_is_what_the_package_asks_for() -> None:
    pins = _pins("build-requirements.txt")
    for text in _pyproject()["build-system"]["requires"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    assert pins["openvino"] == _pins("requirements.txt")["openvino"]
    assert f"nvidia-cutlass=={pins['nvidia-cutlass']}" in (REPOSITORY / "Makefile").read_text()


def test_what_the_image_imports_is_what_it_has() -> None:
    """The image checks itself as it is built; all but TensorRT is here, too."""
    (line,) = [line for line in instructions("RUN") if "import adaptive_k_moe" in line]
    program, option, code = shlex.split(line.partition(" && ")[0])
    assert (program, option) == ("python3", "-c")
    assert " tensorrt," in code
    subprocess.run([sys.executable, option, code.replace(" tensorrt,", "")], check=True)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: the CUDA toolkit is not here")
@pytest.mark.skipif(
    not os.environ.get("ADAPTIVE_K_REQUIRE_CUDA") and importlib.util.find_spec("cutlass_library") is None,
    reason="no CUTLASS: `make cuda` installs it",
)
def test_the_plugin_configures_from_what_was_copied(tmp_path: Path) -> None:
    """CMake stops at a source or a folder that is missing; NvInfer.h is that of the tests."""
    source = tmp_path / "src"
    copy_context(source, *copied_before("--target adaptive_k_tensorrt"))
    configure, _, build = run_line("--target adaptive_k_tensorrt").partition(" && ")
    line = _here(configure, tmp_path).replace('"${CUDA_ARCHITECTURES}"', "90a")
    headers = REPOSITORY / "plugin" / "testing" / "nvinfer"
    done = subprocess.run(
        ["bash", "-euc", f"{line} -DTENSORRT_ROOT={headers}"], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    commands = json.loads((tmp_path / "build" / "cuda" / "compile_commands.json").read_text())
    assert {"launcher.cu", "library.cpp"} <= {Path(command["file"]).name for command in commands}
    assert all(Path(command["file"]).is_relative_to(source) for command in commands)
    # The target that the next command builds, and the file that it installs, are CMake's.
    ninja = (tmp_path / "build" / "cuda" / "build.ninja").read_text()
    assert "\nbuild libadaptive_k_tensorrt.so:" in ninja
    assert "/build/cuda/libadaptive_k_tensorrt.so /opt/adaptive_k/lib/libadaptive_k_tensorrt.so" in build
    (variable,) = [line for line in instructions("ENV") if "ADAPTIVE_K_TENSORRT_LIBRARY" in line]
    assert "ADAPTIVE_K_TENSORRT_LIBRARY=/opt/adaptive_k/lib/libadaptive_k_tensorrt.so" in variable


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel of the builder's own command, but for the C++, which takes a minute."""
    directory = tmp_path_factory.mktemp("image")
    copy_context(directory / "src", *copied_before("pip wheel"))
    line, _, _ = run_line("pip wheel").partition(" && ")
    # Debian's pip does not know the short form -C.
    python_only = "--config-settings=cmake.define.ADAPTIVE_K_OPENVINO=OFF"
    python_only += " --config-settings=cmake.define.ADAPTIVE_K_PYTHON=OFF"
    line = _here(line, directory).replace("pip wheel", f"pip wheel --quiet {python_only}")
    subprocess.run(["bash", "-euc", line], cwd=directory / "src", check=True, capture_output=True, text=True)
    (path,) = (directory / "build" / "wheel").glob("*.whl")
    with zipfile.ZipFile(path) as content:
        yield content


def test_the_wheel_has_every_file_of_every_folder(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package, folder in _pyproject()["tool"]["scikit-build"]["wheel"]["packages"].items():
        for path in context_files():
            if path.startswith(f"{folder}/"):
                assert f"{package}/{path.removeprefix(f'{folder}/')}" in names


def _pyproject() -> dict[str, dict]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def _pins(name: str) -> dict[str, str]:
    lines = (REPOSITORY / "docker" / name).read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") and "*" not in str(pin.specifier) for pin in pins)
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def _asked(*extras: str) -> list[Requirement]:
    """The package's own requirements, with these extras."""
    project = _pyproject()["project"]
    texts = [*project["dependencies"]]
    for extra in extras:
        texts += project["optional-dependencies"].get(extra, [])
    requirements = [Requirement(text) for text in texts]
    ours = canonicalize_name(project["name"])
    return [r for r in requirements if _applies(r) and canonicalize_name(r.name) not in {*FROM_THE_IMAGE, ours}]


def _applies(requirement: Requirement, extras: frozenset[str] = frozenset()) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**IMAGE, "extra": extra}) for extra in ["", *extras])


def _here(line: str, directory: Path) -> str:
    """A builder's command with its environment and folders replaced by this one's."""
    binaries = Path(sys.executable).parent
    return line.replace("/opt/build/bin", os.fspath(binaries)).replace("/build/", f"{directory}/build/")
