# SPDX-License-Identifier: Apache-2.0
"""Processes that share out the experts of a model, by torchrun and gloo, against one process with all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expert_parallel_rank import Told, answers, expert_bytes, torchrun
from safetensors.torch import load_file, save_file

from adaptive_k_moe.engine_builder.checkpoint import HfConfig
from adaptive_k_moe.engine_builder.models import architecture_of
from adaptive_k_moe.torch import adapt

from checkpoints import PLAIN, Shape, make_checkpoint
from nemotron_models import NEMOTRONS, Nemotron, make_nemotron
from reference import reference_model

MODELS = [*PLAIN, NEMOTRONS[0], NEMOTRONS[5], NEMOTRONS[6]]  # 5, 7, 7, 9, 10, 12 and 10 experts
POLICIES: dict[str, Any] = {
    "policies": {
        "mixed": {"kind": "entropy", "thresholds": [0.9, 1.3], "k": [1, 2, 3]},
        "shared": {"kind": "shared", "experts": 1, "k_min": 1},
    }
}
NAMES = ["full", "mixed", "shared"]
PROMPT = np.random.default_rng(0).integers(3, 60, (2, 7)).tolist()
NEW_TOKENS = 6

GIVEN = {"prompt": PROMPT, "policies": POLICIES, "names": NAMES, "new_tokens": NEW_TOKENS, "load": "whole"}


def make(shape: Shape | Nemotron, directory: Path, **options: Any) -> Path:
    return (make_nemotron if isinstance(shape, Nemotron) else make_checkpoint)(directory, shape, **options)  # type: ignore[arg-type]


def without_others_experts(checkpoint: Path, directory: Path, first: int, end: int) -> Path:
    """The checkpoint without the experts outside of the range: no tensors of them, or NaN where all are in one."""
    directory.mkdir()
    (directory / "config.json").write_text((checkpoint / "config.json").read_text())
    kept = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        number = name.partition(".experts.")[2].partition(".")[0]
        if number.isdigit() and not first <= int(number) < end:
            continue
        if number.endswith("_proj"):
            tensor[:first] = tensor[end:] = torch.nan
        kept[name] = tensor
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


class Runs:
    """What was told for each number of ranks: every model whole and then divided, and its part alone loaded."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._told: dict[int, dict[str, Told]] = {}

    def checkpoint(self, shape: Shape | Nemotron, *, fused: bool = False) -> Path:
        directory = self.root / f"model {MODELS.index(shape)}{' fused' * fused}"
        return directory if directory.exists() else make(shape, directory, fused=fused)

    def of(self, ranks: int) -> dict[str, Told]:
        if ranks not in self._told:
            directory = self.root / f"ranks {ranks}"
            directory.mkdir()
            tasks: dict[str, dict[str, Any]] = {}
            for number, shape in enumerate(MODELS):
                tasks[str(shape)] = {"checkpoint": str(self.checkpoint(shape)), "refusals": number == 0}
                if ranks == 3 or number not in (1, 4):
                    continue
                for fused in (False, True):
                    config = HfConfig.read(self.checkpoint(shape))
                    total = architecture_of(config).read_config(config, "float32").num_experts
                    for rank in range(ranks):
                        edges = (total * rank // ranks, total * (rank + 1) // ranks)
                        part = directory / f"{number} {rank}{' fused' * fused}"
                        without_others_experts(self.checkpoint(shape, fused=fused), part, *edges)
                    name = str(directory / (f"{number} {{rank}}" + " fused" * fused))
                    tasks[f"{shape}, {'fused' if fused else 'separate'}"] = {"checkpoint": name, "load": "part"}
            if ranks == 2:
                one = make_checkpoint(
                    directory / "one", Shape("one", {"num_local_experts": 1, "num_experts_per_tok": 1})
                )
                tasks["one expert"] = {"checkpoint": str(one)}
                tasks["one expert, part"] = {"checkpoint": str(one), "load": "part"}
                tasks["bfloat16"] = {
                    "checkpoint": str(self.checkpoint(MODELS[1])),
                    "dtype": "bfloat16",
                    "names": ["full"],
                }
            told = torchrun(directory, ranks, [GIVEN | task for task in tasks.values()])
            self._told[ranks] = dict(zip(tasks, told, strict=True))
        return self._told[ranks]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(runs: Runs) -> Callable[[Shape | Nemotron], dict[str, Any]]:
    """What one process with all experts finds."""
    found: dict[str, dict[str, Any]] = {}

    def of(shape: Shape | Nemotron) -> dict[str, Any]:
        if str(shape) not in found:
            model = reference_model(runs.checkpoint(shape))
            with adapt(model, POLICIES, history=None) as adapted:
                found[str(shape)] = answers(model, adapted, NAMES, torch.tensor(PROMPT), NEW_TOKENS)
            found[str(shape)]["bytes"] = expert_bytes(model)
            found[str(shape)]["experts"] = adapted.config.num_experts
        return found[str(shape)]

    return of


def assert_same(told: Told, expected: dict[str, Any], names: list[str] = NAMES) -> None:
    """Tokens, k and loads as one process has them on every rank, entropies and logits to rounding."""
    for rank in told:
        for name in names:
            found, one = rank[name], expected[name]
            assert torch.equal(found["tokens"], one["tokens"]), name
            assert torch.equal(found["load"], one["load"]), name
            for left, right in zip(found["k"], one["k"], strict=True):
                assert torch.equal(left, right), name
            for left, right in zip(found["entropy"], one["entropy"], strict=True):
                torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
            assert (found["logits"] - one["logits"]).abs().max() <= 1e-5 * one["logits"].abs().max(), name
            # All ranks get the sum's same bits: what they decide next is the same.
            assert torch.equal(found["logits"], told[0][name]["logits"]), name


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("shape", MODELS, ids=str)
def test_ranks_give_the_tokens_of_one_process(
    runs: Runs, alone: Callable[..., dict[str, Any]], shape: Shape | Nemotron, ranks: int
) -> None:
    expected = alone(shape)
    assert len({str(expected[name]["load"]) for name in NAMES}) == len(NAMES)  # else every policy could have been one
    assert_same(runs.of(ranks)[str(shape)], expected)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("shape", MODELS, ids=str)
def test_each_holds_its_own_experts_alone(
    runs: Runs, alone: Callable[..., dict[str, Any]], shape: Shape | Nemotron, ranks: int
) -> None:
    """Ranges follow each other, differ by one expert at most, and others' memory is free."""
    told, whole, experts = runs.of(ranks)[str(shape)], alone(shape)["bytes"], alone(shape)["experts"]
    edges = [rank["range"] for rank in told]
    assert edges[0][0] == 0 and edges[-1][1] == experts
    assert all(left[1] == right[0] for left, right in itertools.pairwise(edges))
    counts = [end - first for first, end in edges]
    assert max(counts) - min(counts) <= 1
    for rank, count in zip(told, counts, strict=True):
        assert rank["bytes before"] == whole
        assert rank["bytes"] * experts == whole * count


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("layout", ["separate", "fused"])
@pytest.mark.parametrize("shape", [MODELS[1], MODELS[4]], ids=str)
def test_loaded_in_parts_it_never_reads_others_experts(
    runs: Runs, alone: Callable[..., dict[str, Any]], shape: Shape | Nemotron, layout: str, ranks: int
) -> None:
    """Each rank's checkpoint has its own experts alone: a tensor of another would be missing, or NaN."""
    expected = alone(shape)
    told = runs.of(ranks)[f"{shape}, {layout}"]
    assert_same(told, expected)
    for rank in told:
        first, end = rank["range"]
        assert rank["bytes before"] == rank["bytes"]
        assert rank["bytes"] * expected["experts"] == expected["bytes"] * (end - first)


def test_bfloat16_sums_are_near(runs: Runs) -> None:
    model = reference_model(runs.checkpoint(MODELS[1]), torch.bfloat16)
    with adapt(model), torch.no_grad():
        expected = model(torch.tensor(PROMPT), use_cache=False).logits.float()
    for rank in runs.of(2)["bfloat16"]:
        assert rank["full"]["logits"].dtype == torch.bfloat16
        off = (rank["full"]["logits"].float() - expected).square().mean() ** 0.5
        assert off <= 0.05 * expected.square().mean() ** 0.5


def test_more_ranks_than_experts_are_refused(runs: Runs) -> None:
    sentence = "BuildError: expert_parallel_group has 2 processes but a layer has 1 experts: use at most as many."
    for task in ("one expert", "one expert, part"):
        assert [rank["refused"] for rank in runs.of(2)[task]] == [sentence] * 2


def test_what_would_give_wrong_sums_is_a_sentence(runs: Runs) -> None:
    told = runs.of(2)[str(MODELS[0])]
    for rank in told:
        first, end = rank["range"]
        held = f"this process holds the experts {first} to {end - 1} alone"
        assert rank["other tokens"].startswith(
            "DeviceError: the processes that share out the experts did not run the same"
        )
        assert rank["removed"].startswith(f"BuildError: {held}: put the operator into the model")
        assert rank["without a group"].startswith(f"BuildError: MoE layer 0: {held}: give the expert_parallel_group")


def test_once_more_with_the_same_group_is_the_same(runs: Runs) -> None:
    for rank in runs.of(2)[str(MODELS[0])]:
        assert torch.equal(rank["again"]["full"]["logits"], rank["full"]["logits"])
