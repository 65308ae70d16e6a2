# SPDX-License-Identifier: Apache-2.0
"""Builds the TensorRT plugin for tests and drives it from Python through harness.cpp."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cuda_build import alone

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = REPOSITORY / "tests" / "tensorrt_plugin"
PLUGIN = REPOSITORY / "plugin"
BUILD = REPOSITORY / "build" / "tests" / "tensorrt"

PLUGIN_SOURCES = [
    *sorted((PLUGIN / "tensorrt").rglob("*.cpp")),
    *sorted((PLUGIN / "operator").rglob("*.cpp")),
]

# Values of TensorRT's enumerations.
FLOAT, HALF, INT8, INT32, BOOL, BF16, INT64 = 0, 1, 2, 3, 4, 7, 8
LINEAR, CHW32 = 0, 5
F_FLOAT16, F_FLOAT32, F_FLOAT64, F_INT8, F_INT16, F_INT32, F_CHAR, F_INT64 = 0, 1, 2, 3, 4, 5, 6, 10
BUILD_PHASE, RUNTIME_PHASE = 0, 1
ERROR, WARNING, VERBOSE = 1, 2, 4


@dataclass(frozen=True)
class Headers:
    """Which NvInfer.h a build takes, and the TensorRT major version whose layout it has."""

    name: str
    include: Path
    major: int
    ours: bool

    def flags(self) -> list[str]:
        if self.ours:
            # The stand-in for cudaStream_t makes CUDA's headers unnecessary too.
            return [
                "-DADAPTIVE_K_SIMT",
                f"-DNV_TENSORRT_MAJOR={self.major}",
                f"-I{self.include}",
                f"-I{PLUGIN}",
            ]
        return [f"-isystem{self.include}", f"-isystem{cuda_include()}"]


def own_headers(major: int) -> Headers:
    return Headers(f"own{major}", PLUGIN / "testing" / "nvinfer", major, ours=True)


def cuda_include() -> Path | None:
    """CUDA's headers, which TensorRT's own include."""
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parents[1]] if nvcc else []
    places += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places.append(Path("/usr/local/cuda"))
    for place in places:
        if (place / "include" / "cuda_runtime_api.h").exists():
            return place / "include"
    return None


def real_headers() -> Headers | str:
    """TensorRT's own headers, or why they are not used.

    TENSORRT_INCLUDE names a folder with its NvInfer.h, if there is one: the plugin is then built with it as well, and
    the same tests call that library through the stand-in header's interfaces.
    """
    folder = os.environ.get("TENSORRT_INCLUDE")
    if not folder:
        return "TENSORRT_INCLUDE does not name a folder with TensorRT's NvInfer.h"
    if not (Path(folder) / "NvInfer.h").exists():
        return f"TENSORRT_INCLUDE is {folder}, which has no NvInfer.h"
    if cuda_include() is None:
        return "TensorRT's headers include CUDA's, which are not here"
    text = (Path(folder) / "NvInferVersion.h").read_text()
    found = re.search(r"define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) (\d+)", text)
    assert found, f"no version in {folder}/NvInferVersion.h"
    return Headers(f"real{found[1]}", Path(folder), int(found[1]), ours=False)


REAL_HEADERS = real_headers()
HEADERS = {"own11": own_headers(11), "own10": own_headers(10)}
if isinstance(REAL_HEADERS, Headers):
    HEADERS["real"] = REAL_HEADERS


def compiled(
    name: str, sources: Sequence[Path], flags: Sequence[str], link: Sequence[str] = (), *, shared: bool = True
) -> Path:
    """Compile once per content: the sources, all of the plugin's headers, and the options."""
    compiler = os.environ.get("CXX", "g++")
    digest = hashlib.sha256(repr((compiler, flags, link)).encode())
    for path in sorted({*sources, *PLUGIN.rglob("*.h")}):
        digest.update(path.read_bytes())
    result = BUILD / f"{name}-{digest.hexdigest()[:16]}"
    if shared:
        result = result.with_suffix(".so")
    BUILD.mkdir(parents=True, exist_ok=True)
    with alone(BUILD / f"{name}.lock"):
        if result.exists():
            return result
        partial = result.with_name(f"{result.name}.{os.getpid()}")
        command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-fvisibility=hidden"]
        command += ["-shared", "-fPIC"] if shared else []
        command += [*flags, *map(str, sources), "-o", str(partial), *link, "-ldl", "-lpthread"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        partial.replace(result)
        for outdated in BUILD.glob(f"{name}-*"):
            if outdated.name.split(".")[0] != result.name.split(".")[0]:
                outdated.unlink(missing_ok=True)
    return result


def build_plugin(name: str, headers: Headers, launcher: Sequence[Path], link: Sequence[str] = ()) -> Path:
    """The plugin's library with a launcher: one to compile into it, or a library to link."""
    flags = ["-O0", *headers.flags(), f"-I{PLUGIN}"]
    return compiled(f"libadaptive_k_tensorrt_{name}_{headers.name}", [*PLUGIN_SOURCES, *launcher], flags, link)


def build_harness(major: int) -> Path:
    return compiled(f"harness{major}", [HERE / "harness.cpp"], ["-O0", *own_headers(major).flags()])


def build_all(jobs: Iterable[Any]) -> list[Path]:
    """Run build calls, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: job(), jobs))


class CField(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    ]


class CTensor(ctypes.Structure):
    _fields_ = [
        ("rank", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
        ("max", ctypes.c_int64 * 8),
    ]


@dataclass(frozen=True)
class Field:
    """A plugin field as raw bytes; `data=None` is a null pointer."""

    name: str | None
    type: int
    length: int
    data: bytes | None


def to_field(name: str, value: Any) -> Field:
    """A field as TensorRT's ONNX parser makes it from an attribute."""
    if isinstance(value, str):
        return Field(name, F_CHAR, len(value) + 1, value.encode() + b"\0")
    if isinstance(value, float):
        return Field(name, F_FLOAT32, 1, bytes(ctypes.c_float(value)))
    return Field(name, F_INT32, 1, bytes(ctypes.c_int32(value)))


@dataclass
class Tensor:
    """One input or output. -1 in `shape` is unknown until run time, with `max` as its bound."""

    type: int
    shape: tuple[int, ...]
    max: tuple[int, ...] | None = None
    format: int = LINEAR

    def c(self) -> CTensor:
        most = self.max or tuple(max(s, 0) for s in self.shape)
        pad = (ctypes.c_int64 * 8)(*self.shape[:8])
        return CTensor(len(self.shape), self.type, self.format, 0, pad, (ctypes.c_int64 * 8)(*most[:8]))


@dataclass(frozen=True)
class Creator:
    name: str
    version: str
    namespace: str
    interface: str
    fields: dict[str, int]


@dataclass
class Layer:
    """The tensors of one AdaptiveKMoe layer, as a network would have them."""

    tokens: int = -1
    max_tokens: int = 64
    hidden: int = 16
    intermediate: int = 8
    experts: int = 4
    policies: int = 2
    choices: int = 3
    element: int = HALF
    gated: bool = True
    bias: bool = False
    weights: str = ""  # a weight_format
    groups: tuple[int, int] = (1, 1)  # scales in a row of up and of down
    norms: bool = False
    given: int | None = None  # experts whose weights it has; None is all
    replaced: dict[int, Tensor] = field(default_factory=dict)

    def inputs(self) -> list[Tensor]:
        t, h, i, e = self.tokens, self.hidden, self.intermediate, self.experts
        here = e if self.given is None else self.given
        most = t if t >= 0 else self.max_tokens
        quantised = self.weights in ("int8", "int4")
        weight = INT8 if quantised else self.element
        pack = 2 if self.weights == "int4" else 1
        rows = 2 * i if self.gated else i
        tensors = [
            Tensor(self.element, (t, h), (most, h)),
            Tensor(FLOAT, (t, e), (most, e)),
            Tensor(INT32, (t,), (most,)),
            Tensor(INT32, (self.policies,)),
            Tensor(FLOAT, (self.policies, self.choices - 1)),
            Tensor(INT32, (self.policies, self.choices)),
            Tensor(weight, (here, rows, h // pack)),
            Tensor(weight, (here, h, i // pack)),
        ]
        if self.bias:
            tensors.append(Tensor(FLOAT, (e,)))
        if quantised:
            tensors.append(Tensor(self.element, (here, rows, self.groups[0])))
            tensors.append(Tensor(self.element, (here, h, self.groups[1])))
        if self.norms:
            tensors.append(Tensor(FLOAT, (e,)))
        for index, tensor in self.replaced.items():
            tensors[index] = tensor
        return tensors

    def outputs(self) -> list[Tensor]:
        most = self.tokens if self.tokens >= 0 else self.max_tokens
        return [
            Tensor(self.element, (self.tokens, self.hidden), (most, self.hidden)),
            Tensor(INT32, (self.tokens,), (most,)),
            Tensor(FLOAT, (self.tokens,), (most,)),
            Tensor(INT32, (self.experts,)),
        ]


@dataclass
class MambaTensors:
    """The tensors of one Mamba2 layer, as a network would have them; -1 is a size known at run time."""

    tokens: int = -1
    sequences: int = -1
    slots: int = -1
    max_tokens: int = 64
    heads: int = 4
    head_dim: int = 8
    state_size: int = 16
    groups: int = 2
    taps: int = 4
    element: int = HALF
    replaced: dict[int, Tensor] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim + 2 * self.groups * self.state_size

    def inputs(self) -> list[Tensor]:
        t, s, slots, c, h = self.tokens, self.sequences, self.slots, self.channels, self.heads
        tokens, begins = t if t >= 0 else self.max_tokens, s + 1 if s >= 0 else -1
        # The largest sequences and slots are of another step than the most tokens are.
        most, places = s if s >= 0 else 3, slots if slots >= 0 else 5
        tensors = [
            Tensor(self.element, (t, c), (tokens, c)),
            Tensor(self.element, (t, h), (tokens, h)),
            Tensor(INT32, (begins,), (most + 1,)),
            Tensor(INT32, (s,), (most + 1 if s < 0 else most,)),
            Tensor(INT32, (s,), (most,)),
            Tensor(FLOAT, (self.taps, c)),
            *(Tensor(FLOAT, (size,)) for size in (c, h, h, h)),
            Tensor(self.element, (slots, self.taps - 1, c), (places, self.taps - 1, c)),
            Tensor(FLOAT, (slots, h, self.state_size, self.head_dim), (places, h, self.state_size, self.head_dim)),
        ]
        for index, tensor in self.replaced.items():
            tensors[index] = tensor
        return tensors

    def outputs(self) -> list[Tensor]:
        conv, ssm = self.inputs()[10:]
        tokens, width = self.tokens if self.tokens >= 0 else self.max_tokens, self.heads * self.head_dim
        return [Tensor(self.element, (self.tokens, width), (tokens, width)), conv, ssm]


class Plugin:
    """A plugin object, called through its interfaces only."""

    def __init__(self, library: PluginLibrary, pointer: int) -> None:
        self.library = library
        self.pointer = pointer
        self.lib = library.lib

    def destroy(self) -> None:
        self.lib.plugin_destroy(self.pointer)
        self.pointer = 0

    def clone(self) -> Plugin:
        return Plugin(self.library, self.lib.plugin_clone(self.pointer))

    def attach(self) -> Plugin:
        return Plugin(self.library, self.lib.plugin_attach(self.pointer))

    def text(self) -> list[str]:
        return str(self.lib.plugin_text(self.pointer).decode()).split("\t")

    @property
    def cache_id(self) -> str:
        return self.text()[3]

    def serialized(self) -> list[Field]:
        fields = []
        for line in self.lib.plugin_fields(self.pointer).decode().splitlines():
            name, type_, length, data = line.split("\t")
            fields.append(Field(name, int(type_), int(length), bytes.fromhex(data)))
        return fields

    @property
    def num_outputs(self) -> int:
        return int(self.lib.plugin_num_outputs(self.pointer))

    def output_types(self, inputs: Sequence[int], num_outputs: int | None = None) -> list[int] | None:
        num_outputs = self.num_outputs if num_outputs is None else num_outputs
        out = (ctypes.c_int32 * max(num_outputs, 1))()
        given = (ctypes.c_int32 * len(inputs))(*inputs)
        status = self.lib.plugin_output_types(self.pointer, given, len(inputs), out, num_outputs)
        return None if status else list(out)[:num_outputs]

    def output_shapes(
        self, inputs: Sequence[Tensor], shape_inputs: int = 0, num_outputs: int | None = None
    ) -> str | None:
        num_outputs = self.num_outputs if num_outputs is None else num_outputs
        text = ctypes.c_char_p()
        status = self.lib.plugin_output_shapes(
            self.pointer, tensor_array(inputs), len(inputs), shape_inputs, num_outputs, ctypes.byref(text)
        )
        return None if status else (text.value or b"").decode()

    def supports(self, pos: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        tensors = tensor_array([*inputs, *outputs])
        return bool(self.lib.plugin_supports(self.pointer, pos, tensors, len(inputs), len(outputs)))

    def configure(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        tensors = tensor_array([*inputs, *outputs])
        return int(self.lib.plugin_configure(self.pointer, tensors, len(inputs), len(outputs)))

    def workspace(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        tensors = tensor_array([*inputs, *outputs])
        return int(self.lib.plugin_workspace(self.pointer, tensors, len(inputs), len(outputs)))

    def shape_change(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        tensors = tensor_array([*inputs, *outputs])
        return int(self.lib.plugin_shape_change(self.pointer, tensors, len(inputs), len(outputs)))

    def enqueue(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        input_pointers: Sequence[int],
        output_pointers: Sequence[int],
        workspace: int = 0,
        stream: int = 0,
    ) -> int:
        tensors = tensor_array([*inputs, *outputs])
        given = (ctypes.c_void_p * len(input_pointers))(*input_pointers)
        made = (ctypes.c_void_p * len(output_pointers))(*output_pointers)
        return int(
            self.lib.plugin_enqueue(self.pointer, tensors, len(inputs), len(outputs), given, made, workspace, stream)
        )


def tensor_array(tensors: Sequence[Tensor]) -> Any:
    return (CTensor * len(tensors))(*(t.c() for t in tensors))


class PluginLibrary:
    """A plugin library, loaded as TensorRT loads it."""

    def __init__(self, path: Path, harness: Path) -> None:
        self.path = path
        self.lib = ctypes.CDLL(str(harness))
        pointers = ("library_open", "plugin_create", "plugin_clone", "plugin_attach")
        for name in pointers:
            getattr(self.lib, name).restype = ctypes.c_void_p
        for name in ("take_log", "creator_text", "plugin_text", "plugin_fields"):
            getattr(self.lib, name).restype = ctypes.c_char_p
        self.lib.plugin_workspace.restype = ctypes.c_size_t
        p, i = ctypes.c_void_p, ctypes.c_int32
        self.lib.library_open.argtypes = [ctypes.c_char_p]
        self.lib.creator_count.argtypes = [p]
        self.lib.creator_text.argtypes = [p, i]
        self.lib.plugin_create.argtypes = [p, i, ctypes.c_char_p, p, i, i]
        for name in ("destroy", "clone", "attach", "text", "num_outputs", "num_tactics", "fields"):
            getattr(self.lib, f"plugin_{name}").argtypes = [p]
        self.lib.plugin_output_types.argtypes = [p, p, i, p, i]
        self.lib.plugin_output_shapes.argtypes = [p, p, i, i, i, p]
        self.lib.plugin_supports.argtypes = [p, i, p, i, i]
        for name in ("configure", "workspace", "shape_change"):
            getattr(self.lib, f"plugin_{name}").argtypes = [p, p, i, i]
        self.lib.plugin_enqueue.argtypes = [p, p, i, i, p, p, p, p]
        self.handle = self.lib.library_open(str(path).encode())
        assert self.handle, self.log()

    def log(self) -> list[tuple[int, str]]:
        """What was logged since the last call, as (severity, sentence)."""
        lines = self.lib.take_log().decode().splitlines()
        return [(int(line.split("\t")[0]), line.split("\t", 1)[1]) for line in lines]

    def errors(self) -> list[str]:
        return [sentence for severity, sentence in self.log() if severity <= ERROR]

    def creators(self) -> list[Creator]:
        found = []
        for i in range(self.lib.creator_count(self.handle)):
            name, version, namespace, interface, *fields = self.lib.creator_text(self.handle, i).decode().split("\t")
            types = {f.split(":")[0]: int(f.split(":")[1]) for f in fields}
            found.append(Creator(name, version, namespace, interface, types))
        return found

    def create(
        self,
        fields: Sequence[Field] | None = (),
        *,
        creator: int = 0,
        name: str | None = "layers.0.moe",
        phase: int = BUILD_PHASE,
        count: int | None = None,
        **attributes: Any,
    ) -> Plugin | None:
        """A plugin from fields and attributes; `fields=None` is a null collection."""
        given = [*(fields or ()), *(to_field(key, value) for key, value in attributes.items())]
        buffers = [
            ctypes.create_string_buffer(f.data, max(len(f.data), 1)) if f.data is not None else None for f in given
        ]
        array = (CField * max(len(given), 1))()
        for entry, f, buffer in zip(array, given, buffers, strict=False):
            entry.name = None if f.name is None else f.name.encode()
            entry.data = None if buffer is None else ctypes.addressof(buffer)
            entry.type, entry.length = f.type, f.length
        number = -1 if fields is None else len(given) if count is None else count
        pointer = self.lib.plugin_create(
            self.handle,
            creator,
            None if name is None else name.encode(),
            None if count is not None else array,
            number,
            phase,
        )
        return Plugin(self, pointer) if pointer else None

    def made(self, **attributes: Any) -> Plugin:
        """A plugin that must come into being."""
        plugin = self.create(**attributes)
        assert plugin is not None, self.log()
        self.log()
        return plugin


@dataclass(frozen=True)
class Recorded:
    """What the recording launcher was last given."""

    shape: dict[str, int]
    params: dict[str, float]
    pointers: dict[str, int | None]


class Recorder:
    """The launcher inside a library that was built with recording_launcher.cpp."""

    SHAPE = ("tokens", "hidden", "intermediate", "experts", "policies", "choices", "element", "group_size")
    PARAMS = ("activation", "scoring", "norm_topk_prob", "n_group", "topk_group", "max_k", "weight_format")
    POINTERS = (
        "hidden_states", "router_logits", "policy_index", "policy_kind", "thresholds", "k_values", "up", "down",
        "correction_bias", "up_scales", "down_scales", "expert_norms", "output", "k", "entropy", "expert_load",
        "workspace", "stream",
    )  # fmt: skip

    MAMBA_NUMBERS = (
        "tokens", "sequences", "slots", "heads", "head_dim", "state_size", "taps", "element", "n_groups",
    )  # fmt: skip
    MAMBA_POINTERS = (
        "conv_input", "dt", "subsequence_begins", "past_lens", "state_slots", "conv_weight", "conv_bias", "A", "D",
        "dt_bias", "conv_state", "ssm_state", "y", "present_conv_state", "present_ssm_state", "workspace", "stream",
    )  # fmt: skip

    def __init__(self, library: PluginLibrary) -> None:
        self.lib = ctypes.CDLL(str(library.path))
        self.lib.recorder_answer.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int]

    def answer(self, refusal: str | None = None, status: int = 0, throws: int = 0) -> None:
        self._refusal = None if refusal is None else refusal.encode()  # kept alive for the library
        self.lib.recorder_answer(self._refusal, status, throws)

    def launches(self) -> int:
        return int(self.lib.recorder_launches())

    def read(self) -> Recorded:
        numbers = (ctypes.c_int64 * (len(self.SHAPE) + len(self.PARAMS)))()
        factor = ctypes.c_float()
        pointers = (ctypes.c_void_p * len(self.POINTERS))()
        self.lib.recorder_read(numbers, ctypes.byref(factor), pointers)
        params: dict[str, float] = dict(zip(self.PARAMS, numbers[len(self.SHAPE) :], strict=True))
        params["routed_scaling_factor"] = factor.value
        shape = dict(zip(self.SHAPE, numbers, strict=False))
        return Recorded(shape, params, dict(zip(self.POINTERS, pointers, strict=True)))

    def read_mamba(self) -> Recorded:
        numbers = (ctypes.c_int64 * len(self.MAMBA_NUMBERS))()
        limits = (ctypes.c_float * 2)()
        pointers = (ctypes.c_void_p * len(self.MAMBA_POINTERS))()
        self.lib.recorder_read_mamba(numbers, limits, pointers)
        *sizes, groups = numbers
        params = {"n_groups": groups, "dt_min": limits[0], "dt_max": limits[1]}
        shape = dict(zip(self.MAMBA_NUMBERS, sizes, strict=False))
        return Recorded(shape, params, dict(zip(self.MAMBA_POINTERS, pointers, strict=True)))
