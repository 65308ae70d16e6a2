# SPDX-License-Identifier: Apache-2.0
"""The operator in models of `transformers`, against the models themselves and against engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.errors import BuildError, CheckpointError, PolicyError
from adaptive_k_moe.policy import read_policy_file
from adaptive_k_moe.runtime import LLM, SamplingParams
from adaptive_k_moe.torch import Adapted, adapt
from adaptive_k_moe.torch.adapt import moe_blocks

from checkpoints import BUNDLED_MODELS, MIXTRAL_SMALL, PLAIN, REPOSITORY, SHAPES, Shape, make_checkpoint
from nemotron_models import NEMOTRONS, Nemotron, make_nemotron
from reference import reference_model

MODELS = [
    *PLAIN,
    *NEMOTRONS,
    *(shape for shape in SHAPES if shape.name in ("gelu", "renormalised", "dense layers named", "33 experts top-8")),
]
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(3, 60, (2, 13)))
POLICIES: dict[str, Any] = {
    "policies": {
        "one": {"kind": "fixed", "k": 1},
        "mixed": {"kind": "entropy", "thresholds": [0.8, 1.2], "k": [1, 2, 2]},
        "by_layer": {"kind": "entropy", "layers": {"2": {"thresholds": [], "k": [1]}}},
        "by_phase": {"kind": "phases", "prefill": {"kind": "fixed", "k": 2}, "decode": {"kind": "fixed", "k": 1}},
        "shared": {"kind": "shared", "experts": 0, "k_min": 1},
    }
}


def make(shape: Shape | Nemotron, directory: Path) -> Path:
    return (make_nemotron if isinstance(shape, Nemotron) else make_checkpoint)(directory, shape)  # type: ignore[arg-type]


def logits_of(model: Any, tokens: Any = TOKENS) -> Any:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def assert_near(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(scope="module")
def mixtral() -> Any:
    return reference_model(MIXTRAL_SMALL)


@pytest.mark.parametrize("shape", MODELS, ids=str)
def test_at_the_trained_top_k_it_is_the_model(shape: Shape | Nemotron, tmp_path: Path) -> None:
    """Logits, k, entropies, and the experts that each layer reads."""
    model = reference_model(make(shape, tmp_path))
    chosen: list[tuple[Any, Any]] = []
    hooks = [block.gate.register_forward_hook(lambda *call: chosen.append(call[2])) for block in moe_blocks(model)]
    expected = logits_of(model)
    for hook in hooks:
        hook.remove()
    with adapt(model) as adapted:
        assert_near(logits_of(model), expected)
    step = adapted.steps[-1]
    top_k = adapted.config.num_experts_per_tok
    assert step.k.shape == (*TOKENS.shape, len(chosen)) and (step.k == top_k).all()
    for layer, (logits, _, experts) in enumerate(chosen):
        entropy = torch.distributions.Categorical(logits=logits.float()).entropy().view(TOKENS.shape)
        torch.testing.assert_close(step.entropy[..., layer], entropy, rtol=1e-3, atol=1e-4)
        assert step.reads[layer] == len(experts.unique())
        assert step.expert_load[layer].sum() == TOKENS.numel() * top_k


@pytest.mark.parametrize("shape", [*PLAIN, NEMOTRONS[0], NEMOTRONS[5]], ids=str)
def test_a_fixed_k_is_the_model_at_that_top_k(shape: Shape | Nemotron, tmp_path: Path) -> None:
    checkpoint = make(shape, tmp_path)
    expected = logits_of(reference_model(checkpoint, num_experts_per_tok=2))
    model = reference_model(checkpoint)
    with adapt(model, {"policies": {"two": {"kind": "fixed", "k": 2}}}, policy_index="two") as adapted:
        assert_near(logits_of(model), expected)
    assert (adapted.steps[-1].k == 2).all()


@pytest.mark.parametrize("checkpoint", BUNDLED_MODELS, ids=lambda path: path.name)
def test_generate_gives_the_engines_tokens(checkpoint: Path, tmp_path: Path) -> None:
    """Under policies of the model's file, each token's k and entropy too."""
    policies = read_policy_file(REPOSITORY / "examples" / "policies" / f"{checkpoint.name}.json")
    build(checkpoint, tmp_path / "engine", policy=policies, dtype="float32", max_seq_len=128)
    model = reference_model(checkpoint)
    # With a cache, Nemotron's step of a single token forgets the limit of the step sizes.
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": "nemotron" not in checkpoint.name}
    varied = 0
    with LLM(tmp_path / "engine") as llm, adapt(model, policies, history=None) as adapted:
        for name in ("full", "balanced", "fast"):
            answer = llm.generate(
                "And it came to pass", SamplingParams(max_tokens=12, end_id=-1, adaptive_k_policy=name)
            )
            prompt = torch.tensor([answer.prompt_token_ids])
            adapted.policy_index = name
            adapted.steps.clear()
            tokens = model.generate(prompt, eos_token_id=None, pad_token_id=0, **options)[0, prompt.shape[1] :]
            assert tokens.tolist() == answer.outputs[0].token_ids, name
            np.testing.assert_array_equal(adapted.steps[0].k[0], answer.prompt_k)
            k, entropy = (np.stack([getattr(step, part)[0, -1] for step in adapted.steps]) for part in ("k", "entropy"))
            np.testing.assert_array_equal(k, answer.outputs[0].k)
            np.testing.assert_allclose(entropy, answer.outputs[0].entropy, atol=1e-4)
            varied += len(np.unique(answer.outputs[0].k)) > 1
    assert varied  # else every policy could have been one


def test_sequences_and_tokens_follow_their_own_policies(mixtral: Any) -> None:
    with adapt(mixtral, POLICIES) as adapted:
        alone = {}
        for name in ("full", "one", "mixed", "by_layer"):
            adapted.policy_index = name
            alone[name] = logits_of(mixtral), adapted.steps[-1].k
        names = adapted.policies.names
        adapted.policy_index = torch.tensor([names.index("one"), names.index("mixed")])
        logits = logits_of(mixtral)
        assert_near(logits[0], alone["one"][0][0])
        assert_near(logits[1], alone["mixed"][0][1])
        assert not torch.allclose(alone["mixed"][0], alone["full"][0])
        # By token: the last ones alone, so that the first are as under the trained top-k.
        rows = torch.full(TOKENS.shape, names.index("full"))
        rows[:, 6:] = names.index("one")
        adapted.policy_index = rows
        logits_of(mixtral)
        k = adapted.steps[-1].k
        assert (k[:, :6] == 2).all() and (k[:, 6:] == 1).all()
        by_layer = alone["by_layer"][1]
        assert (by_layer[..., 2] == 1).all() and (by_layer[..., [0, 1, 3, 4, 5]] == 2).all()


def test_prompts_and_generated_tokens_follow_their_phase(mixtral: Any) -> None:
    with adapt(mixtral, POLICIES, policy_index="by_phase", history=None) as adapted:
        mixtral.generate(TOKENS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert [step.k.unique().tolist() for step in adapted.steps] == [[2], [1], [1], [1]]
        adapted.steps.clear()
        # A prompt of one token is a prompt.
        mixtral.generate(TOKENS[:, :1], max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert [step.k.unique().tolist() for step in adapted.steps] == [[2], [1]]


def test_sharing_tokens_see_the_whole_step(mixtral: Any) -> None:
    with adapt(mixtral, POLICIES, policy_index="shared") as adapted:
        logits_of(mixtral)
        step = adapted.steps[-1]
        own = [
            len({int(layer[0]) for layer in torch.ops.adaptive_k.route(*call)[2]}) for call in _first_choices(mixtral)
        ]
        assert step.reads.tolist()[:1] == own  # of the first layer, whose input no policy has changed


def _first_choices(model: Any) -> list[tuple[Any, ...]]:
    """The arguments of `route` for the first layer at k = 1."""
    caught: list[Any] = []
    handle = moe_blocks(model)[0].gate.register_forward_hook(lambda *call: caught.append(call[2][0]))
    logits_of(model)
    handle.remove()
    logits = caught[0]
    table = (torch.zeros(1, dtype=torch.int32), torch.empty(1, 0), torch.ones(1, 1, dtype=torch.int32))
    return [(logits, torch.zeros(len(logits), dtype=torch.int32), *table)]


def _state(model: Any) -> dict[str, Any]:
    """Everything that an adapter could leave behind."""
    modules = {
        f"{name} {slot}": dict(vars(module)[slot])
        for name, module in model.named_modules()
        for slot in ("_forward_hooks", "_forward_pre_hooks")
    }
    own = {name: "forward" in vars(module) for name, module in model.named_modules()}
    return {**modules, **own}


def test_removed_it_leaves_the_model_as_it_was() -> None:
    model = reference_model(MIXTRAL_SMALL)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before, state = logits_of(model), _state(model)
    adapted = adapt(model, POLICIES, policy_index="one")
    assert not torch.equal(logits_of(model), before)
    assert _state(model) != state
    adapted.remove()
    adapted.remove()  # once more is nothing
    with pytest.raises(ZeroDivisionError), adapt(model, POLICIES, policy_index="one"):
        raise ZeroDivisionError
    assert _state(model) == state
    assert torch.equal(logits_of(model), before)
    assert list(weights) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())


def test_a_device_map_goes_on_moving_weights(tmp_path: Path) -> None:
    """Half of the layers lie on a disk, from where a hook of accelerate's brings them for each forward."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install '.[test]'")
    expected = logits_of(reference_model(MIXTRAL_SMALL))
    parts = {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(6)}
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", **parts}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        MIXTRAL_SMALL, dtype=torch.float32, device_map=places, offload_folder=tmp_path
    ).eval()
    experts = moe_blocks(model)[1].experts
    assert experts.gate_up_proj.is_meta
    own = experts._old_forward
    with adapt(model):
        assert_near(logits_of(model), expected)
        assert experts._old_forward is not own
    assert experts._old_forward == own
    assert_near(logits_of(model), expected)
    assert experts.gate_up_proj.is_meta


@pytest.mark.parametrize("checkpoint", BUNDLED_MODELS, ids=lambda path: path.name)
def test_bfloat16_layers_are_those_of_the_same_weights_in_float32(checkpoint: Path) -> None:
    """Layer by layer, each with the input that it had: over the whole model a choice that turns changes everything."""
    model = reference_model(checkpoint, torch.bfloat16)
    seen: list[tuple[Any, Any]] = []
    with adapt(model):
        hooks = [
            block.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
            for block in moe_blocks(model)
        ]
        logits_of(model)
        for hook in hooks:
            hook.remove()
    for block, (hidden, output) in zip(moe_blocks(model.float()), seen, strict=True):
        assert output.dtype == torch.bfloat16
        with torch.no_grad():
            assert_near(output.float(), block(hidden.float()), 1e-2)


def test_a_compiled_model_is_adapted(mixtral: Any) -> None:
    with adapt(mixtral, POLICIES, policy_index="mixed") as adapted:
        expected, k = logits_of(mixtral), adapted.steps[-1].k
        compiled = torch.compile(mixtral, backend="aot_eager")
        assert_near(logits_of(compiled), expected)
        assert torch.equal(adapted.steps[-1].k, k)


def test_on_the_kernels_for_gpus_it_is_the_model(kernels: str, tmp_path: Path) -> None:
    """Sizes that those kernels take; with "interpreter" they run here."""
    shape = Nemotron("multiples of 8", "ME*-E", {"moe_intermediate_size": 24, "moe_latent_size": 32})
    model = reference_model(make(shape, tmp_path))
    expected = logits_of(model, TOKENS[:, :4])
    with adapt(model):
        assert_near(logits_of(model, TOKENS[:, :4]), expected)


def test_what_cannot_be_adapted_is_a_sentence(mixtral: Any) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, num_key_value_heads=2, **sizes))
    with pytest.raises(CheckpointError, match="'LlamaForCausalLM' is not supported"):
        adapt(llama)
    with pytest.raises(PolicyError, match="adaptive_k_policy 'none'"):
        adapt(mixtral, POLICIES, policy_index="none")
    with pytest.raises(IndexError, match="policy_index 9"):
        adapt(mixtral, POLICIES, policy_index=9)
    with pytest.raises(PolicyError, match="names layer 7"):
        adapt(mixtral, {"policies": {"far": {"kind": "entropy", "layers": {"7": {"thresholds": [], "k": [1]}}}}})
    adapted: Adapted = adapt(mixtral)
    with pytest.raises(BuildError, match="replaced already"):
        adapt(mixtral)
    adapted.remove()
    assert "forward" not in vars(moe_blocks(mixtral)[0].experts)
