# SPDX-License-Identifier: Apache-2.0
# Serves an engine of either target with NVIDIA's Triton; docs/deploy.md says how to use it.
#
#     docker build -t adaptive-k-moe .
#     docker build -t adaptive-k-moe --build-arg CUDA_ARCHITECTURES=90a .     # one kind of GPU: minutes less
#
# Both images are of one release of NVIDIA's, so Ubuntu (24.04), Python (3.12), CUDA and TensorRT (11.1) are the
# same in both: the first has the compiler and TensorRT's headers and Python package, the second the server.
ARG RELEASE=26.07
ARG BUILDER_IMAGE=nvcr.io/nvidia/tensorrt:${RELEASE}-py3
ARG RUNTIME_IMAGE=nvcr.io/nvidia/tritonserver:${RELEASE}-py3

FROM ${BUILDER_IMAGE} AS builder
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Ubuntu's archive keeps only the newest version of a package, so a pinned one would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src

# Two environments, before the sources, which change more often: what builds, and what the server runs on.
COPY docker/build-requirements.txt docker/requirements.txt docker/
RUN python3 -m venv /opt/build && /opt/build/bin/pip install --no-deps -r docker/build-requirements.txt
RUN python3 -m venv /opt/adaptive_k && /opt/adaptive_k/bin/pip install --no-deps -r docker/requirements.txt
# TensorRT's Python package as it comes with this image; its libraries are in the server's image too.
RUN package="$(python3 -c 'import importlib.util as u; print(*u.find_spec("tensorrt").submodule_search_locations)')" \
    && cp -a "${package}" "$(/opt/adaptive_k/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')"

# The TensorRT plugin with the CUDA kernels inside.
COPY CMakeLists.txt ./
COPY plugin plugin
ARG CUDA_ARCHITECTURES="80;86;89;90a;100a;120a;90-virtual"
RUN PATH=/opt/build/bin:${PATH} cmake -S . -B /build/cuda -G Ninja \
        -DADAPTIVE_K_OPENVINO=OFF -DADAPTIVE_K_PYTHON=OFF -DADAPTIVE_K_CUDA=ON -DADAPTIVE_K_TENSORRT=ON \
        -DADAPTIVE_K_CUDA_ARCHITECTURES="${CUDA_ARCHITECTURES}" -DPython_EXECUTABLE=/opt/build/bin/python \
    && /opt/build/bin/cmake --build /build/cuda --target adaptive_k_tensorrt \
    && install -D -m 644 --strip /build/cuda/libadaptive_k_tensorrt.so /opt/adaptive_k/lib/libadaptive_k_tensorrt.so

# The package: the CPU's operator and all of the Python.
COPY . .
RUN PATH=/opt/build/bin:${PATH} /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /build/wheel . \
    && /opt/adaptive_k/bin/pip install --no-deps /build/wheel/*.whl

FROM ${RUNTIME_IMAGE} AS runtime
COPY --from=builder /opt/adaptive_k /opt/adaptive_k
# Triton's Python backend takes its packages from the `bin` that leads PATH.
ENV PATH=/opt/adaptive_k/bin:${PATH} \
    ADAPTIVE_K_TENSORRT_LIBRARY=/opt/adaptive_k/lib/libadaptive_k_tensorrt.so \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# Fails here and not later if the two images' Pythons or libraries do not fit together. None of it needs a GPU: the
# last one only finds CUDA's runtime library.
RUN python3 -c "import adaptive_k_moe.plugin, numpy, openvino, tensorrt, tritonclient.grpc" \
    && python3 -c "from cuda.bindings import runtime; runtime.cudaGetDeviceCount()"
# NVIDIA's own user in this image, triton-server.
USER 1000:1000
WORKDIR /tmp
EXPOSE 8000 8001 8002
# A large engine takes minutes to read and check; until then a failed check does not count.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["curl", "--fail", "--silent", "--show-error", "--output", "/dev/null", "http://127.0.0.1:8000/v2/health/ready"]
ENTRYPOINT ["adaptive-k"]
CMD ["serve", "--engine_dir", "/engine", "--host", "0.0.0.0"]
