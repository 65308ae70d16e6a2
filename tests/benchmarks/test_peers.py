# SPDX-License-Identifier: Apache-2.0
"""The comparison with other engines: what it counts, what it refuses, and that its processes end with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peers
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from _peers import write_compressed_tensors
from _peers.checkpoints import SHAPES
from _peers.prepare import PrepareError, Workshop
from _peers.worker import Column, Worker, WorkerError, full_batch_rate

MIXTRAL = SHAPES["mixtral"]


def row(stack: str, *rates: float, settings: str = "") -> dict[str, Any]:
    cells = {
        name: {"tokens_per_second": rate, "runs": [rate], "settings": settings}
        for name, rate in zip(peers.columns(peers.DECODE), rates, strict=True)
    }
    return {"stack": stack, "versions": {stack: "1"}, "disk_bytes": 1, "columns": cells}


def test_ours_is_compared_with_the_fastest_peer_of_each_column() -> None:
    rows = [row("adaptive-k", 100, 20, 30, 40), row("vllm", 200, 10, 20, 30), row("llama.cpp", 50, 25, 10, 10)]
    found = peers.over_best_peer(rows)
    assert [(cell["peer"], cell["ratio"]) for cell in found.values()] == [
        ("vllm", 0.5),
        ("llama.cpp", 0.8),
        ("vllm", 1.5),
        ("vllm", pytest.approx(4 / 3)),
    ]


def test_no_ratio_without_a_peer() -> None:
    assert peers.over_best_peer([row("adaptive-k", 1, 1, 1, 1)]) == {}


def test_roofline_of_one_token_reads_its_experts_attention_and_head() -> None:
    # Two experts of 3 x 1024 x 3584, attention and router of each of 8 layers, and the head.
    weights = 8 * (2 * 3 * 1024 * 3584 + 1024 * (40 * 64 + 8)) + 32000 * 1024
    found = peers.roofline(MIXTRAL, "int8", bandwidth=1e9, products=1e15)
    assert found["decode, batch 1"] == pytest.approx(1e9 / weights)
    assert found["decode, batch 16"] < 16 * 1e9 / (8 * 7.8 * 3 * 1024 * 3584)  # nearly all of 8 experts are read
    assert peers.roofline(MIXTRAL, "int4", 1e9, 1e15)["decode, batch 1"] == pytest.approx(2e9 / weights)


def test_roofline_of_a_prefill_is_its_arithmetic_with_one_row_of_logits() -> None:
    operations = 2 * (512 * 8 * (2 * 3 * 1024 * 3584 + 1024 * (40 * 64 + 8)) + 32000 * 1024)
    found = peers.roofline(MIXTRAL, "bfloat16", bandwidth=1e15, products=1e12)
    assert found["prefill 512"] == pytest.approx(512 * 1e12 / operations)


def test_the_shapes_count_what_the_checkpoints_hold() -> None:
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_experts=128,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    assert SHAPES["qwen3_moe"].parameters == matrices


def test_decode_counts_the_steps_between_the_first_full_batch_and_the_last() -> None:
    assert full_batch_rate([10.0, 10.5, 11.0], 8) == 16.0
    with pytest.raises(RuntimeError, match="never decoded together"):
        full_batch_rate([10.0], 8)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_compressed_weights_say_what_the_weights_were(weights: str, tmp_path: Path) -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    router = torch.ones(4, 256, dtype=torch.bfloat16)
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "out"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    save_file({"a.w1.weight": weight, "a.gate.weight": router}, checkpoint / "model.safetensors")
    write_compressed_tensors.write(checkpoint, weights, output)
    found = load_file(output / "model.safetensors")
    scale = found["a.w1.weight_scale"].float()
    if weights == "int8":
        restored = found["a.w1.weight"].float() * scale
    else:
        nibbles = (found["a.w1.weight_packed"][:, :, None] >> torch.arange(0, 32, 4)) & 15  # as vLLM unpacks them
        values = nibbles.reshape(32, 2, 128) - 8
        restored = (values * scale[:, :, None]).reshape(32, 256)
    largest = weight.float().abs().max()
    steps = {"int8": 127, "int4": 7}[weights]
    assert (restored - weight.float()).abs().max() < 0.6 * largest / steps
    assert torch.equal(found["a.gate.weight"], router)
    assert json.loads((output / "config.json").read_text())["quantization_config"]["quant_method"] == (
        "compressed-tensors"
    )


def test_a_process_measures_the_engine_and_ends_when_it_is_closed(engine_dir: Path, tmp_path: Path) -> None:
    settings = {"model": str(engine_dir), "threads": 2, "vocab_size": 1000}
    script = "serve_adaptive_k.py"
    worker = Worker(Path(sys.executable), script, settings, tmp_path / "log", environment={})
    process = worker._process.pid
    try:
        assert "adaptive-k-moe" in worker.versions
        assert worker.measure(Column("prefill", 1, 0, 64)) > 0
        assert worker.measure(Column("decode", 3, 16, 4)) > 0
    finally:
        worker.close()
    assert not psutil.pid_exists(process)


def test_a_process_whose_benchmark_is_killed_ends(engine_dir: Path, tmp_path: Path) -> None:
    settings = json.dumps({"model": str(engine_dir), "threads": 2, "vocab_size": 1000})
    program = (
        "import json, os, signal, sys; from pathlib import Path; from _peers.worker import Worker\n"
        f"log = Path({str(tmp_path)!r}, 'l')\n"
        f"w = Worker(Path(sys.executable), 'serve_adaptive_k.py', json.loads({settings!r}), log, environment={{}})\n"
        "print(w._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    benchmarks = Path(peers.__file__).parent
    done = subprocess.run([sys.executable, "-c", program], cwd=benchmarks, stdout=subprocess.PIPE, text=True)
    try:
        psutil.Process(int(done.stdout)).wait(20)
    except psutil.NoSuchProcess:
        pass


def test_a_model_that_cannot_be_loaded_is_a_sentence(tmp_path: Path) -> None:
    settings = {"model": str(tmp_path), "threads": 1, "vocab_size": 1000}
    with pytest.raises(WorkerError, match="adaptive-k build"):
        Worker(Path(sys.executable), "serve_adaptive_k.py", settings, tmp_path / "log", environment={})


def test_what_is_made_is_made_once_until_its_source_changes(tmp_path: Path) -> None:
    said: list[str] = []
    workshop = Workshop(tmp_path, said.append)

    def make(content: str) -> None:
        workshop.once(tmp_path / "a", [content], lambda _: (tmp_path / "a").write_text(content) and None)

    for content in ("1", "1", "2"):
        make(content)
    assert len(said) == 2
    with pytest.raises(PrepareError, match="false failed"):
        workshop.once(tmp_path / "a", ["3"], lambda log: workshop.command(log, "false"))
    make("2")  # the failed attempt left no stamp
    assert len(said) == 4


def test_a_busy_machine_is_refused_and_a_forced_one_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            monkeypatch.setattr(peers, "IDLE_CPUS", 0.02)  # the loop has a part of a CPU, however many share it
            with pytest.raises(SystemExit, match=r"CPUs are busy .* --force"):
                peers.check_idle(force=False)
            assert peers.check_idle(force=True) > 0.02
        finally:
            busy.kill()
    assert "WARNING" in capsys.readouterr().err


def test_a_peer_that_cannot_be_had_is_named_under_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "peers.json"
    argv = ["peers.py", "--models", "mixtral", "--weights", "int4", "--stacks", "transformers", "--force", "--quick"]
    monkeypatch.setattr(sys, "argv", [*argv, "--directory", str(tmp_path), "--output", str(output)])
    peers.main()
    [table] = json.loads(output.read_text())["tables"]
    assert table["rows"] == []
    assert "transformers is left out: transformers has no integer weights" in peers.markdown(table)


def test_a_table_replaces_its_own_and_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "peers.json"
    for weights in ("int4", "int8", "int4"):
        argv = [
            "peers.py",
            "--models",
            "mixtral",
            "--weights",
            weights,
            "--stacks",
            "transformers",
            "--force",
            "--quick",
        ]
        monkeypatch.setattr(sys, "argv", [*argv, "--directory", str(tmp_path), "--output", str(output)])
        peers.main()
    assert [table["weights"] for table in json.loads(output.read_text())["tables"]] == ["int8", "int4"]


def test_each_column_names_the_settings_that_won_it() -> None:
    rows = [row("adaptive-k", 100, 20, 30, 40), row("openvino", 200, 10, 20, 30, settings="bf16 compute")]
    rows[1]["columns"]["decode, batch 16"]["settings"] = "f32 compute"
    table = {
        "title": "T",
        "weights": "int8",
        "cpu": "C",
        "threads": 2,
        "date": "D",
        "repeats": 3,
        "busy_cpus": [0.0, 0.1],
        "rates": {"read_bandwidth": 2.9e10, "products": 1e12},
        "rows": rows,
        "roofline": peers.roofline(MIXTRAL, "int8", 2.9e10, 1e12),
        "ours_over_best_peer": peers.over_best_peer(rows),
        "missing": {"vllm": "because."},
    }
    shown = peers.markdown(table)
    assert "f32 compute: decode, batch 16" in shown
    assert "vllm is left out: because." in shown
    assert "**0.50** (openvino)" in shown
    assert len({line.count("|") for line in shown.splitlines() if line.startswith("|")}) == 1
