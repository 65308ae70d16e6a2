# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint may look like on disk, and how everything else is refused: one sentence, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from adaptive_k_moe.cli import main
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import read_engine_config
from adaptive_k_moe.errors import AdaptiveKError, BuildError, CheckpointError, PolicyError

from checkpoints import FAMILIES, PLAIN, Shape, make_checkpoint, make_mixtral


def weights_of(engine_dir: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(engine_dir / "model.onnx").graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights_of(one), weights_of(other)
    assert set(first) == set(second)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


# Layouts that are read. --------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])
@pytest.mark.parametrize("shape", PLAIN, ids=str)
def test_a_sharded_checkpoint_is_the_same_as_a_whole_one(shape: Shape, fused: bool, tmp_path: Path) -> None:
    for name, options in {"whole": {}, "sharded": {"max_shard_size": "30KB"}}.items():
        checkpoint = make_checkpoint(tmp_path / name, shape, fused=fused, **options)
        build(checkpoint, tmp_path / f"{name}-engine", target="onnx")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert_same_weights(tmp_path / "whole-engine", tmp_path / "sharded-engine")


@pytest.mark.parametrize(("dtype", "built"), [(torch.float16, "float32"), (torch.bfloat16, "bfloat16")])
@pytest.mark.parametrize("shape", PLAIN, ids=str)
def test_a_16_bit_checkpoint_keeps_its_values(shape: Shape, dtype: Any, built: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "float32", shape)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype)
    model.save_pretrained(tmp_path / "half", max_shard_size="30KB")
    model.float().save_pretrained(tmp_path / "widened")
    assert build(tmp_path / "half", tmp_path / "half-engine", target="onnx").pretrained_config.dtype == built
    build(tmp_path / "widened", tmp_path / "widened-engine", target="onnx")
    half, widened = weights_of(tmp_path / "half-engine"), weights_of(tmp_path / "widened-engine")
    assert set(half) == set(widened)
    for name, array in half.items():
        np.testing.assert_array_equal(array.astype(np.float32), widened[name])


def test_tensors_of_several_dtypes_keep_their_values(originals: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = shutil.copytree(originals["mixtral"], tmp_path / "checkpoint")
    wider = [np.float64, np.float32]
    edit_tensors(
        lambda tensors: tensors.update({n: t.astype(wider[i % 2]) for i, (n, t) in enumerate(tensors.items())})
    )(checkpoint)
    build(checkpoint, tmp_path / "mixed", target="onnx")
    build(originals["mixtral"], tmp_path / "plain", target="onnx")
    assert_same_weights(tmp_path / "mixed", tmp_path / "plain")


def test_the_links_of_a_download_cache_are_followed(tmp_path: Path, checkpoint_dir: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "0", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(checkpoint_dir, blobs)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    config = build(snapshot, tmp_path / "engine", target="onnx")
    assert config.files.keys() >= {"tokenizer.json", "tokenizer_config.json"}
    assert not any(path.is_symlink() for path in (tmp_path / "engine").iterdir())
    assert config == build(checkpoint_dir, tmp_path / "plain", target="onnx")


def test_an_explicit_dtype_converts(tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint")
    config = build(checkpoint, tmp_path / "engine", target="onnx", dtype="bfloat16")
    assert config.pretrained_config.dtype == "bfloat16"


def test_a_config_that_transformers_4_wrote_says_the_same(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape("plain", {}, "qwen3_moe"))
    new = build(checkpoint, tmp_path / "new", target="onnx").pretrained_config
    content = json.loads((checkpoint / "config.json").read_text())
    content["num_experts"] = content.pop("num_local_experts")
    content["torch_dtype"] = content.pop("dtype")
    content["rope_theta"] = content.pop("rope_parameters")["rope_theta"]
    content["rope_scaling"] = None
    # As the hub's: a window that is switched off.
    content |= {"sliding_window": 32768, "max_window_layers": 28}
    (checkpoint / "config.json").write_text(json.dumps(content))
    assert build(checkpoint, tmp_path / "old", target="onnx").pretrained_config == new


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_assumes(family: str, tmp_path: Path) -> None:
    from adaptive_k_moe.engine_builder.checkpoint import HfConfig
    from adaptive_k_moe.engine_builder.models import architecture_of

    name = FAMILIES[family][0]
    source = tmp_path / "config.json"
    silent = HfConfig({"architectures": [f"{name}ForCausalLM"]}, source)
    own = getattr(transformers, f"{name}Config")()
    # What it assumes about tokens is not the architecture's.
    spoken = HfConfig({**own.to_dict(), "architectures": [f"{name}ForCausalLM"], "eos_token_id": None}, source)
    read = [architecture_of(config).read_config(config, "float32") for config in (silent, spoken)]
    ignored = {"bos_token_id": None, "pad_token_id": None}
    assert read[0].model_copy(update=ignored) == read[1].model_copy(update=ignored)


def test_fields_that_change_nothing_are_taken(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape("plain", {}, "qwen3_moe"))
    # Qwen3-Coder-480B-A35B's config says these of things that its architecture has not.
    edit_config(qkv_bias=False, shared_expert_intermediate_size=0, use_qk_norm=True)(checkpoint)
    build(checkpoint, tmp_path / "engine", target="onnx")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_of_a_field_gets_past_the_errors(family: str, originals: dict[str, Path]) -> None:
    from adaptive_k_moe.engine_builder.checkpoint import HfConfig
    from adaptive_k_moe.engine_builder.models import architecture_of

    path = originals[family] / "config.json"
    content = json.loads(path.read_text())
    extra = ["rope_scaling", "rope_theta", "layer_types", "mlp_only_layers", "num_experts", "clip_qkv", "head_dim"]
    values = [None, "x", -1, 0, 1.5, [], [1, "a"], {}, {"rope_type": "yarn", "factor": 0}, True, 99999, float("nan")]
    for name in [*content, *extra]:
        for value in values:
            config = HfConfig({**content, name: value}, path)
            with contextlib.suppress(AdaptiveKError):
                architecture_of(config).read_config(config, "float32")


# Checkpoints that are refused. -------------------------------------------------------------------

Damage = Callable[[Path], Any]


@dataclass(frozen=True)
class Refusal:
    """A way to spoil a checkpoint, and what the sentence about it must name."""

    name: str
    damage: Damage
    names: str
    family: str = "mixtral"

    def __str__(self) -> str:
        return self.name


def edit_config(**fields: Any) -> Damage:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def edit_tensors(edit: Callable[[dict[str, np.ndarray]], Any]) -> Damage:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def write(name: str, text: str) -> Damage:
    return lambda checkpoint: (checkpoint / name).write_text(text)


def shards(damage: Callable[[Path, dict[str, Any]], Any]) -> Damage:
    """Split into shards first; `damage` may change the index."""

    def split(checkpoint: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        (checkpoint / "model.safetensors").unlink()
        model.save_pretrained(checkpoint, max_shard_size="30KB")
        index = checkpoint / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        damage(checkpoint, content)
        index.write_text(json.dumps(content))

    return split


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


NORM, DOWN = "model.layers.1.input_layernorm.weight", "model.layers.1.block_sparse_moe.experts.4.w2.weight"
SECOND = "model-00002-of-"

CONFIGS = [
    Refusal("no config", lambda checkpoint: (checkpoint / "config.json").unlink(), "no config.json"),
    Refusal("no directory", shutil.rmtree, "no checkpoint directory"),
    Refusal("config not JSON", write("config.json", "{"), "config.json is not JSON"),
    Refusal("config nested without end", write("config.json", "[" * 100_000), "config.json is not JSON"),
    Refusal("config not an object", write("config.json", "[1]"), "config.json is not a JSON object"),
    Refusal("no architecture", edit_config(architectures=None), "architectures"),
    Refusal("unknown architecture", edit_config(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM"),
    Refusal("unknown activation", edit_config(hidden_act="relu6"), "hidden_act is 'relu6'"),
    Refusal("unknown rope", edit_config(rope_parameters={"rope_type": "longrope"}), "rope_parameters.rope_type"),
    Refusal("unknown rope field", edit_config(rope_parameters={"mrope_section": [1]}), "rope_parameters.mrope_section"),
    Refusal("rope without its factor", edit_config(rope_parameters={"rope_type": "linear"}), "rope_parameters.factor"),
    Refusal("partial rope", edit_config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    Refusal("quantised", edit_config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    Refusal("k above the experts", edit_config(num_experts_per_tok=6), r"num_experts_per_tok is 6.*num_local_experts"),
    Refusal(
        "k above the operator's limit",
        edit_config(num_local_experts=50, num_experts_per_tok=40),
        "num_experts_per_tok is 40.*at most 32",
    ),
    Refusal("KV heads that do not divide", edit_config(num_key_value_heads=3), "num_key_value_heads"),
    Refusal("odd head_dim", edit_config(head_dim=11), "head_dim"),
    Refusal("more heads than hidden", edit_config(num_attention_heads=64), "head_dim"),
    Refusal("a string for a number", edit_config(hidden_size="48"), "hidden_size is '48'"),
    Refusal("no layers", edit_config(num_hidden_layers=0), "num_hidden_layers"),
    Refusal("a negative window", edit_config(sliding_window=-1), "sliding_window"),
    Refusal("an unknown layer kind", edit_config(layer_types=["full_attention", "mamba"]), "layer_types is 'mamba'"),
    Refusal("a kind of attention with no window", edit_config(layer_types=["sliding_attention"] * 2), "layer_types"),
    Refusal("a bias Mixtral has not", edit_config(attention_bias=True), "attention_bias"),
    Refusal("clipping Mixtral has not", edit_config(clip_qkv=8.0), "clip_qkv"),
    Refusal("scores Mixtral has not", edit_config(scoring_func="sigmoid"), "scoring_func"),
    Refusal("weights Mixtral always renormalises", edit_config(norm_topk_prob=False), "norm_topk_prob"),
    Refusal("a window OLMoE has not", edit_config(sliding_window=64), "sliding_window", "olmoe"),
    Refusal("clipping everything", edit_config(clip_qkv=-1), "clip_qkv", "olmoe"),
    Refusal("clip_qkv not a number", edit_config(clip_qkv="8"), "clip_qkv", "olmoe"),
    Refusal("a shared expert Qwen3 has not", edit_config(n_shared_experts=1), "n_shared_experts", "qwen3_moe"),
    Refusal("only dense layers named", edit_config(mlp_only_layers=[0, 1]), "mlp_only_layers", "qwen2_moe"),
    Refusal("only dense layers by step", edit_config(decoder_sparse_step=5), "decoder_sparse_step", "qwen3_moe"),
    Refusal("no shared expert size", edit_config(shared_expert_intermediate_size=0), "shared_expert", "qwen2_moe"),
    Refusal("a bias that is missing", edit_config(attention_bias=True), "q_proj.bias", "qwen3_moe"),
    Refusal("a bias that is left over", edit_config(qkv_bias=False), "6 tensors.*k_proj.bias", "qwen2_moe"),
]

TENSORS = [
    Refusal("no weights", lambda checkpoint: (checkpoint / "model.safetensors").unlink(), "model.safetensors"),
    Refusal(
        "only pickled weights",
        lambda checkpoint: (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin"),
        "save it again with safetensors",
    ),
    Refusal("missing tensor", edit_tensors(lambda tensors: tensors.pop(NORM)), NORM),
    Refusal("missing expert", edit_tensors(lambda tensors: tensors.pop(DOWN)), DOWN),
    Refusal(
        "wrong shape",
        edit_tensors(lambda tensors: tensors.update({DOWN: np.zeros((56, 48), np.float32)})),
        rf"{DOWN}.*\(56, 48\).*\(48, 56\)",
    ),
    Refusal("config of another size", edit_config(intermediate_size=57), r"w1.weight.*\(56, 48\).*\(57, 48\)"),
    Refusal("config of fewer experts", edit_config(num_local_experts=4), r"gate.weight.*\(5, 48\).*\(4, 48\)"),
    Refusal("config of fewer layers", edit_config(num_hidden_layers=1), "model.layers.1"),
    Refusal(
        "integers",
        edit_tensors(lambda tensors: tensors.update({DOWN: np.zeros((48, 56), np.int8)})),
        f"{DOWN}.*I8.*unquantised",
    ),
    Refusal(
        "left over tensor",
        edit_tensors(lambda tensors: tensors.update({"model.extra.weight": np.zeros(3, np.float32)})),
        "1 tensor that.*model.extra.weight",
    ),
    Refusal("truncated", lambda checkpoint: truncate(checkpoint / "model.safetensors"), "model.safetensors is damaged"),
    Refusal(
        "git's pointer to a large file",
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234567\n"),
        "model.safetensors is only git's pointer.*git lfs pull",
    ),
    Refusal(
        "a link that leads to nothing",
        lambda checkpoint: (
            (checkpoint / "model.safetensors").unlink(),
            (checkpoint / "model.safetensors").symlink_to("../../blobs/0"),
        ),
        "shard .*model.safetensors is missing",
    ),
    Refusal(
        "shards without their index",
        lambda checkpoint: (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors"),
        "takes model.safetensors.index.json to find them",
    ),
    Refusal("empty file", write("model.safetensors", ""), "model.safetensors is damaged"),
    Refusal("a web page instead", write("model.safetensors", "<html>" * 20), "model.safetensors is damaged"),
    Refusal(
        "truncated shard",
        shards(lambda checkpoint, _: truncate(next(checkpoint.glob(f"{SECOND}*")))),
        f"{SECOND}.*damaged",
    ),
    Refusal(
        "missing shard",
        shards(lambda checkpoint, _: next(checkpoint.glob(f"{SECOND}*")).unlink()),
        f"{SECOND}.*is missing",
    ),
    Refusal(
        "a shard outside",
        shards(lambda _, index: index["weight_map"].update({NORM: "../other.safetensors"})),
        "outside the checkpoint: '../other.safetensors'",
    ),
    Refusal(
        "a tensor that no shard has",
        shards(lambda _, index: index["weight_map"].update({"ghost": index["weight_map"][NORM]})),
        "ghost",
    ),
    Refusal(
        "an index without a tensor",
        shards(lambda _, index: index["weight_map"].pop(NORM)),
        NORM,
    ),
    Refusal(
        "an index nested without end", write("model.safetensors.index.json", "[" * 100_000), "index.json is damaged"
    ),
    Refusal("an index of nothing", shards(lambda _, index: index.clear()), "index.json is damaged"),
    Refusal(
        "an index that is cut off",
        write("model.safetensors.index.json", '{"weight_map": {'),
        "index.json is damaged",
    ),
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("checkpoints")
    return {shape.family: make_checkpoint(directory / shape.family, shape) for shape in PLAIN}


def assert_refused(
    checkpoint: Path,
    output: Path,
    error: type[AdaptiveKError],
    names: str,
    capsys: pytest.CaptureFixture[str],
    *flags: str,
    **options: Any,
) -> None:
    """The function raises one sentence, the command prints it, and both leave the output's folder as it was."""
    before = sorted(output.parent.rglob("*")) if output.parent.is_dir() else None
    with pytest.raises(error, match=names) as caught:
        build(checkpoint, output, target="onnx", **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    capsys.readouterr()
    arguments = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(output), "--target", "onnx", *flags]
    assert main(["build", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.err.strip("\n") == f"adaptive-k: error: {sentence}"
    assert printed.out == ""
    assert (sorted(output.parent.rglob("*")) if output.parent.is_dir() else None) == before


@pytest.mark.parametrize("refusal", CONFIGS + TENSORS, ids=str)
def test_a_checkpoint_is_refused_by_name(
    refusal: Refusal, originals: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = shutil.copytree(originals[refusal.family], tmp_path / "checkpoint")
    refusal.damage(checkpoint)
    (tmp_path / "engines").mkdir()
    assert_refused(checkpoint, tmp_path / "engines" / "engine", CheckpointError, refusal.names, capsys)


# Sizes and policies that are refused. ------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "names"),
    [
        ("max_batch_size", 0, "max_batch_size is 0"),
        ("max_seq_len", -3, "max_seq_len is -3"),
        ("max_seq_len", 257, "max_seq_len 257.*max_position_embeddings 256"),
        ("max_num_tokens", 15, "max_num_tokens 15.*max_batch_size 16"),
    ],
)
def test_sizes_that_cannot_be(
    option: str,
    value: int,
    names: str,
    originals: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = (f"--{option}", str(value))
    assert_refused(originals["olmoe"], tmp_path / "engine", BuildError, names, capsys, *flags, **{option: value})


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"policies": {"fast": {"kind": "fixed", "k": 0}}}, "policies.fast.fixed.k"),
        ({"policies": {"full": {"kind": "fixed", "k": 1}}}, "full"),
        ({"policies": {"x": {"kind": "entropy", "layers": {"1": {"thresholds": [], "k": [1]}}}}}, "names layer 1"),
        ({"default": "none such"}, "none such"),
    ],
)
def test_policies_that_do_not_fit(content: Any, names: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Of its two layers one is sparse, so there is no MoE layer 1.
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape("one", {"decoder_sparse_step": 2}, "qwen2_moe"))
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps(content))
    flags = ("--policy", str(policy))
    assert_refused(checkpoint, tmp_path / "engine", PolicyError, names, capsys, *flags, policy=policy)


# The output directory. ---------------------------------------------------------------------------


def test_an_output_that_is_no_engine_is_left_alone(
    originals: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    for name in ("file", "folder"):
        for flags, options in (((), {}), (("--force",), {"force": True})):
            output = tmp_path / name
            names = f"{name} exists and is no engine directory"
            assert_refused(originals["mixtral"], output, BuildError, names, capsys, *flags, **options)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "thesis.txt").read_text() == "mine"


def test_an_engine_is_replaced_only_with_force(
    originals: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "engine"
    output.mkdir()
    build(originals["mixtral"], output, target="onnx")  # an empty directory is free to take
    assert_refused(originals["olmoe"], output, BuildError, "holds an engine already.*--force", capsys)
    assert read_engine_config(output).pretrained_config.architecture == "MixtralForCausalLM"
    arguments = ["--checkpoint_dir", str(originals["olmoe"]), "--output_dir", str(output), "--target", "onnx"]
    assert main(["build", *arguments, "--force"]) == 0
    assert "OlmoeForCausalLM" in capsys.readouterr().out
    assert read_engine_config(output).pretrained_config.architecture == "OlmoeForCausalLM"
    assert list(tmp_path.iterdir()) == [output]


def test_a_failed_build_with_force_keeps_the_old_engine(originals: dict[str, Path], tmp_path: Path) -> None:
    build(originals["mixtral"], tmp_path / "engine", target="onnx")
    broken = shutil.copytree(originals["mixtral"], tmp_path / "broken")
    edit_tensors(lambda tensors: tensors.pop(DOWN))(broken)
    with pytest.raises(CheckpointError):
        build(broken, tmp_path / "engine", target="onnx", force=True)
    read_engine_config(tmp_path / "engine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "engine"]


def test_a_parent_that_is_a_file(
    originals: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert_refused(originals["mixtral"], tmp_path / "file" / "engine", BuildError, "cannot write beside", capsys)


def test_an_interrupted_build_leaves_nothing(originals: dict[str, Path], tmp_path: Path) -> None:
    def interrupt(part: str, done: int, total: int) -> None:
        if part == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(originals["mixtral"], tmp_path / "engine", target="onnx", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def run_command(*arguments: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """``python -m adaptive_k_moe``; `limit` is the most bytes that it may write to a file."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit or resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "adaptive_k_moe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limited)


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_a_disk_that_takes_no_more(target: str, originals: dict[str, Path], tmp_path: Path) -> None:
    # The weights fill 200 kB, so writing fails in the middle of a layer.
    output = tmp_path / "engine"
    arguments = ["--checkpoint_dir", str(originals["mixtral"]), "--output_dir", str(output), "--target", target]
    result = run_command("build", *arguments, limit=100_000)
    assert result.returncode == 1
    assert result.stderr.strip("\n") == f"adaptive-k: error: cannot write the engine to {output}: File too large."
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_command_itself(originals: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "engine"
    arguments = ["--checkpoint_dir", str(originals["qwen3_moe"]), "--output_dir", str(output), "--target", "onnx"]
    result = run_command("build", *arguments)
    assert result.returncode == 0
    assert result.stdout.startswith(f"built {output}: Qwen3MoeForCausalLM, onnx, float32, ")
    (warning,) = result.stderr.strip("\n").splitlines()
    assert "has no tokenizer.json, so the engine takes token ids and no text" in warning
    result = run_command("build", *arguments)
    assert result.returncode == 1
    (line,) = result.stderr.strip("\n").splitlines()
    assert line.startswith(f"adaptive-k: error: {output} holds an engine already")
