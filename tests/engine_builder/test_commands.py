# SPDX-License-Identifier: Apache-2.0
"""`adaptive-k inspect` and `adaptive-k policy`, as a user runs them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import pytest

from adaptive_k_moe.cli import main
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import read_engine_config, read_policy_tables
from adaptive_k_moe.policy import PolicySet

from checkpoints import Shape, make_checkpoint

POLICIES = {
    "default": "balanced",
    "policies": {"balanced": {"kind": "entropy", "thresholds": [1.0], "k": [1, 3]}, "one": {"kind": "fixed", "k": 1}},
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engine")
    shape = Shape("sparse", {"decoder_sparse_step": 2, "num_hidden_layers": 4}, "qwen2_moe")
    checkpoint = make_checkpoint(directory / "checkpoint", shape)
    build(checkpoint, directory / "engine", target="onnx", policy=PolicySet.model_validate(POLICIES))
    return directory / "engine"


@pytest.fixture
def engine(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "engine")


Run = Callable[..., str]


@pytest.fixture
def run(engine: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command on the engine; its output, or its one line on stderr where `fails`."""

    def command(*arguments: str, fails: bool = False) -> str:
        status = main([*arguments, "--engine_dir", str(engine)])
        printed = capsys.readouterr()
        assert status == (1 if fails else 0), printed.err
        if not fails:
            return printed.out
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert printed.err.startswith("adaptive-k: error: ")
        assert printed.err.endswith(".\n")
        return printed.err

    return command


def test_inspect_prints_the_model_its_policies_and_its_files(run: Run) -> None:
    output = run("inspect")
    for word in ("Qwen2MoeForCausalLM", "shared_expert", "dense_mlp", "balanced (default)", "full", "model.onnx.data"):
        assert word in output


def test_inspect_as_json_is_the_config(run: Run, engine: Path) -> None:
    content = json.loads(run("inspect", "--json"))
    assert content == json.loads((engine / "config.json").read_text())
    assert content["pretrained_config"]["moe"]["layers"] == [1, 3]


def spoil_data(engine: Path) -> None:
    path = engine / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(**fields: Any) -> Callable[[Path], object]:
    def change(engine: Path) -> None:
        path = engine / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (spoil_data, r"model.onnx.data was altered"),
        (lambda engine: (engine / "model.onnx").unlink(), r"model.onnx is missing"),
        (lambda engine: (engine / "model.onnx").write_bytes(b""), r"model.onnx has 0 bytes instead of"),
        (lambda engine: (engine / "config.json").unlink(), r"no engine directory"),
        (lambda engine: (engine / "config.json").write_text("{"), r"config.json is not JSON"),
        (lambda engine: (engine / "config.json").write_text("[" * 100_000), r"config.json is not JSON"),
        (shutil.rmtree, r"there is no engine directory"),
        (edit(version="0"), r"format '0'"),
        (edit(pretrained_config={}), r"pretrained_config.architecture"),
        (edit(surprise=1), r"surprise"),
        (edit(files={"model.onnx": {"size": 1}}), r"files.model.onnx: give one of blake3 and sha256"),
    ],
    ids=[
        "altered",
        "missing",
        "truncated",
        "no config",
        "no JSON",
        "nested",
        "no directory",
        "old",
        "incomplete",
        "unknown",
        "no hash",
    ],
)
def test_inspect_refuses_a_damaged_engine(damage: Callable[[Path], object], names: str, engine: Path, run: Run) -> None:
    damage(engine)
    assert names in run("inspect", fails=True)


def test_an_engine_of_format_1_opens_and_is_checked_by_its_sha256(run: Run, engine: Path) -> None:
    path = engine / "config.json"
    content = json.loads(path.read_text())
    files = {
        name: {"size": entry["size"], "sha256": hashlib.sha256((engine / name).read_bytes()).hexdigest()}
        for name, entry in content["files"].items()
    }
    path.write_text(json.dumps(content | {"version": "1", "files": files}))
    assert "sha256 " + files["model.onnx.data"]["sha256"][:16] in run("inspect")
    run("policy", "set", "--name", "one", "--kind", "fixed", "--k", "1")
    assert json.loads(path.read_text())["files"] == files
    spoil_data(engine)
    assert "model.onnx.data was altered" in run("inspect", fails=True)


def test_hashes_are_blake3_of_the_whole_file(engine: Path) -> None:
    for name, entry in json.loads((engine / "config.json").read_text())["files"].items():
        data = (engine / name).read_bytes()
        assert entry == {"size": len(data), "blake3": blake3.blake3(data).hexdigest()}


def test_policy_show_prints_a_policy_file(run: Run, tmp_path: Path, engine: Path) -> None:
    shown = run("policy", "show")
    content = json.loads(shown)
    assert content["default"] == "balanced"
    assert content["policies"]["full"] == {"kind": "fixed", "k": 3}
    # What was shown can be set again, and changes nothing.
    (tmp_path / "policy.json").write_text(shown)
    before = (engine / "config.json").read_text()
    run("policy", "set", "--file", str(tmp_path / "policy.json"))
    assert (engine / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("flags", "definition"),
    [
        (
            ["--thresholds", "0.5", "1.5", "--k", "1", "2", "3"],
            {"kind": "entropy", "thresholds": [0.5, 1.5], "k": [1, 2, 3]},
        ),
        (["--k", "2"], {"kind": "entropy", "thresholds": [], "k": [2]}),
        (["--kind", "fixed", "--k", "2"], {"kind": "fixed", "k": 2}),
        (["--kind", "top_p", "--p", "0.8"], {"kind": "top_p", "p": 0.8, "k_min": 1, "k_max": 3}),
        (
            ["--kind", "ratio", "--ratio", "0.3", "--k_min", "1", "--k_max", "2"],
            {"kind": "ratio", "ratio": 0.3, "k_min": 1, "k_max": 2},
        ),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_policy_set_adds_a_policy(flags: list[str], definition: dict[str, Any], run: Run, engine: Path) -> None:
    files = {path.name: path.stat().st_mtime_ns for path in engine.iterdir() if path.name != "config.json"}
    assert run("policy", "set", "--name", "new", *flags).endswith("full, balanced, one, new\n")
    assert json.loads(run("policy", "show"))["policies"]["new"] == definition
    assert json.loads(run("policy", "show"))["default"] == "balanced"
    assert read_policy_tables(engine).names == ["full", "balanced", "one", "new"]
    # Nothing was rebuilt, and nothing lies about.
    assert files == {path.name: path.stat().st_mtime_ns for path in engine.iterdir() if path.name != "config.json"}
    read_engine_config(engine)


def test_policy_set_replaces_and_makes_the_default(run: Run, engine: Path) -> None:
    run("policy", "set", "--name", "one", "--kind", "fixed", "--k", "2", "--default")
    config = read_engine_config(engine)
    assert config.adaptive_k.default == "one"
    assert json.loads(run("policy", "show"))["policies"]["one"] == {"kind": "fixed", "k": 2}


def test_policy_set_from_a_file_replaces_all(run: Run, engine: Path, tmp_path: Path) -> None:
    layers = {"1": {"thresholds": [0.4], "k": [1, 2]}}
    content = {"unit": "bits", "default": "tuned", "policies": {"tuned": {"kind": "entropy", "layers": layers}}}
    (tmp_path / "policy.json").write_text(json.dumps(content))
    run("policy", "set", "--file", str(tmp_path / "policy.json"))
    assert read_policy_tables(engine).names == ["full", "tuned"]


def test_a_k_above_the_trained_top_k_is_capped_with_a_warning(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--name", "more", "--kind", "fixed", "--k", "5"]
    assert main(["policy", "set", "--engine_dir", str(engine), *arguments]) == 0
    assert "adaptive-k: warning: policy 'more': k = 5 is above the trained top-k" in capsys.readouterr().err
    policies = read_engine_config(engine).adaptive_k.to_json()["policies"]
    assert policies["more"] == {"kind": "fixed", "k": 3}


def test_policy_remove(run: Run, engine: Path) -> None:
    assert run("policy", "remove", "--name", "balanced").endswith(": full, one\n")
    # It was the default, so the trained top-k is now.
    assert read_engine_config(engine).adaptive_k.default == "full"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["remove", "--name", "full"], "'full' cannot be removed"),
        (["remove", "--name", "none"], "'none' cannot be removed"),
        (["set"], "--name NAME"),
        (["set", "--name", "x", "--thresholds", "1.5", "0.5", "--k", "1", "2", "3"], "thresholds must rise"),
        (["set", "--name", "x", "--thresholds", "0.5", "--k", "1"], "1 thresholds need 2 values of k"),
        (["set", "--name", "x", "--kind", "top_p", "--p", "1.5"], "policies.x.top_p.p"),
        (["set", "--name", "x", "--kind", "top_p"], "policies.x.top_p: give p, or layers"),
        (["set", "--name", "x", "--kind", "fixed", "--k", "1", "--p", "0.5"], "policies.x.fixed.p"),
        (["set", "--name", "full", "--kind", "fixed", "--k", "1"], "'full' is the trained top-k"),
        (["set", "--file", "/no/such/policy.json"], "cannot read the policy file /no/such/policy.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_policy_that_cannot_be_changes_nothing(arguments: list[str], names: str, run: Run, engine: Path) -> None:
    before = (engine / "config.json").read_text()
    assert names in run("policy", *arguments, fails=True)
    assert (engine / "config.json").read_text() == before
    assert not list(engine.glob(".config-*"))


def test_policies_of_the_kind_contribution_need_norms(run: Run, engine: Path, tmp_path: Path) -> None:
    set_it = ("policy", "set", "--name", "weighed", "--kind", "contribution", "--p", "0.8")
    before = (engine / "config.json").read_bytes()
    assert "there are no expert_norms: `adaptive-k calibrate` measures them" in run(*set_it, fails=True)
    assert (engine / "config.json").read_bytes() == before

    norms = [[1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 1.0], [0.5] * 7]
    content = {"policies": {"weighed": {"kind": "contribution", "p": 0.9}}, "expert_norms": norms}
    (tmp_path / "with.json").write_text(json.dumps(content))
    run("policy", "set", "--file", str(tmp_path / "with.json"))
    run(*set_it, "--k_min", "2", "--default")
    shown = json.loads(run("policy", "show"))
    assert shown["policies"]["weighed"] == {"kind": "contribution", "p": 0.8, "k_min": 2, "k_max": 3}
    assert shown["expert_norms"] == norms
    tables = read_policy_tables(engine)
    assert tables.expert_norms.tolist() == [[0.5, 1.0, 1.5, 2.0, 0.5, 1.0, 0.5], [1.0] * 7]
    assert tables.policy_kind[tables.default] == 3

    # A file without norms keeps those that the engine has; a file with another model's is refused.
    (tmp_path / "without.json").write_text(json.dumps({"policies": {"other": {"kind": "contribution", "p": 0.7}}}))
    run("policy", "set", "--file", str(tmp_path / "without.json"))
    assert json.loads(run("policy", "show"))["expert_norms"] == norms
    (tmp_path / "foreign.json").write_text(json.dumps({**content, "expert_norms": [[1.0] * 8] * 3}))
    sentence = run("policy", "set", "--file", str(tmp_path / "foreign.json"), fails=True)
    assert "expert_norms are of 3 layers of 8 experts, but the model has 2 MoE layers of 7" in sentence
