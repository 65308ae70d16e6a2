# SPDX-License-Identifier: Apache-2.0
"""The sampler against Hugging Face's logits processors, and its draws against their probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adaptive_k_moe.errors import RequestError
from adaptive_k_moe.runtime.sampler import SamplingState, candidates, draw, log_probabilities, sample
from adaptive_k_moe.runtime.sampling_params import SamplingParams

VOCAB = 300


def random_logits(seed: int, vocab_size: int = VOCAB, scale: float = 3) -> Any:
    return (np.random.default_rng(seed).standard_normal(vocab_size) * scale).astype(np.float32)


def hugging_face(logits: Any, token_ids: list[int], processors: list[Any]) -> Any:
    history: Any = torch.tensor([token_ids])
    scores: Any = LogitsProcessorList(processors)(history, torch.tensor(logits[None].copy()))
    return scores[0].numpy()


def state(params: SamplingParams, token_ids: list[int], num_generated: int = 0, **options: Any) -> SamplingState:
    prompt = token_ids[: len(token_ids) - num_generated]
    made = SamplingState(params, VOCAB, list(prompt), **options)
    for token_id in token_ids[len(prompt) :]:
        made.append(token_id)
    return made


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 2, 5, 50, VOCAB, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_the_warped_distribution_is_hugging_faces(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(seed)
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    expected = torch.softmax(torch.tensor(hugging_face(logits, [1], warpers)), -1).numpy()
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    token_ids, probabilities = candidates(logits, params)
    got = np.zeros(VOCAB, np.float32)
    got[token_ids] = probabilities
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert (np.diff(token_ids) > 0).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), top_k=st.integers(1, 80), levels=st.sampled_from([3, 40, 100_000]))
def test_top_k_of_a_large_vocabulary_is_hugging_faces_ties_and_all(seed: int, top_k: int, levels: int) -> None:
    logits = np.random.default_rng(seed).integers(0, levels, 7001).astype(np.float32) / levels
    expected = hugging_face(logits, [1], [TopKLogitsWarper(top_k)])
    token_ids, _ = candidates(logits, SamplingParams(temperature=1, top_k=top_k))
    np.testing.assert_array_equal(token_ids, np.flatnonzero(np.isfinite(expected)))


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_the_repetition_penalty_is_hugging_faces(penalty: float) -> None:
    logits, token_ids = random_logits(1), [3, 3, 17, 200, 5]
    got = state(SamplingParams(repetition_penalty=penalty), token_ids, 2).processed(logits)
    expected = hugging_face(logits, token_ids, [RepetitionPenaltyLogitsProcessor(penalty)])
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_the_logit_bias_is_hugging_faces_and_comes_before_penalties(penalty: float) -> None:
    logits, token_ids = random_logits(7), [3, 17, 17, 5]
    bias = {3: 2.5, 17: -40.0, 200: 1e-3, 299: 12.0}
    made = state(SamplingParams(repetition_penalty=penalty), token_ids, 2, logit_bias=bias)
    processors: list[Any] = [SequenceBiasLogitsProcessor({(i,): value for i, value in bias.items()})]
    if penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    np.testing.assert_allclose(made.processed(logits), hugging_face(logits, token_ids, processors), rtol=1e-6)


def test_a_bias_beyond_float32_is_certain_and_no_error() -> None:
    logits = random_logits(8)
    for value, choose in ((1e300, np.argmax), (-1e300, np.argmin)):
        made = state(SamplingParams(), [1], logit_bias={7: value})
        assert np.isfinite(made.processed(logits)).all()
        assert choose(made.processed(logits)) == 7


@pytest.mark.parametrize("tail", [[1, 2], [4, 1, 2], [2, 1], [1, 1, 1], [9, 8, 7, 6]])
def test_bad_words_are_hugging_faces(tail: list[int]) -> None:
    logits, token_ids = random_logits(2), [50, 60, *tail]
    words = [[5], [1, 2, 30], [2, 31], [1, 1], [9, 8, 7, 6, 32], [50, 60, 4, 1, 2, 3, 4, 5, 6, 7, 8]]
    got = state(SamplingParams(), token_ids, bad_words=words).processed(logits)
    expected = hugging_face(logits, token_ids, [NoBadWordsLogitsProcessor(words, eos_token_id=[0])])
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("num_generated", [0, 2, 3, 4])
def test_min_tokens_is_hugging_faces(num_generated: int) -> None:
    logits, token_ids = random_logits(3), [8, 9, 1, 2, 3, 4]
    scores = logits
    made = state(SamplingParams(min_tokens=3), token_ids, num_generated, end_ids=[0, 7])
    if made.changes_logits:
        scores = made.processed(logits)
    processor = MinNewTokensLengthLogitsProcessor(len(token_ids) - num_generated, 3, [0, 7], device="cpu")
    np.testing.assert_array_equal(scores, hugging_face(logits, token_ids, [processor]))


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = random_logits(4)
    made = state(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), [1, 1, 2, 3, 3, 3], 4)
    expected = logits.copy()
    expected[2] -= 0.75
    expected[3] -= 1.25
    np.testing.assert_allclose(made.processed(logits), expected, rtol=1e-6)


def test_processing_leaves_the_models_logits_alone() -> None:
    logits = random_logits(5)[None]
    before = logits.copy()
    params = SamplingParams(
        repetition_penalty=2, presence_penalty=1, min_tokens=2, temperature=1, top_k=5, top_p=0.5, logprobs=1
    )
    sample(logits, [state(params, [1, 2], end_ids=[3], bad_words=[[4]])])
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 8},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1, "top_k": 20, "top_p": 0.95},
    ],
)
def test_tokens_come_as_often_as_their_probabilities_say(params: dict[str, Any]) -> None:
    logits = random_logits(6, vocab_size=30, scale=1.5)
    parameters = SamplingParams(seed=11, **params)
    made = SamplingState(parameters, 30, [1])
    draws = 20_000
    counts = np.bincount([draw(logits, made) for _ in range(draws)], minlength=30)
    token_ids, probabilities = candidates(logits, parameters)
    assert counts.sum() == counts[token_ids].sum()
    expected = probabilities.astype(np.float64) * draws
    enough = expected >= 5
    chi_square = ((counts[token_ids] - expected) ** 2 / expected)[enough].sum()
    degrees = enough.sum() - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)


def test_the_same_seed_gives_the_same_tokens_and_others_do_not_matter() -> None:
    logits = np.stack([random_logits(i) for i in range(4)])
    params = [SamplingParams(temperature=1, seed=i) for i in range(4)]

    def alone(i: int) -> list[int]:
        made = state(params[i], [1])
        return [sample(logits[i : i + 1], [made])[0].token_id for _ in range(10)]

    together = [state(param, [1]) for param in params]
    rows = [[choice.token_id for choice in sample(logits, together)] for _ in range(10)]
    for i in range(4):
        assert [row[i] for row in rows] == alone(i) == alone(i)


def test_each_of_n_sequences_has_its_own_generator() -> None:
    params = SamplingParams(temperature=1, seed=5, n=3)
    draws = {i: state(params, [1], index=i).generator.random() for i in range(3)}
    assert len(set(draws.values())) == 3
    assert draws[0] == np.random.Generator(np.random.PCG64(5)).random()
    assert state(SamplingParams(), [1]).generator.random() != state(SamplingParams(), [1]).generator.random()


def test_greedy_takes_the_lowest_index_among_equals() -> None:
    logits = np.zeros((3, VOCAB), np.float32)
    logits[:, [40, 70, 90]] = 2
    params = [SamplingParams(), SamplingParams(temperature=1, top_k=1), SamplingParams(repetition_penalty=4)]
    choices = sample(logits, [state(params[0], [1]), state(params[1], [1]), state(params[2], [40])])
    assert [choice.token_id for choice in choices] == [40, 40, 70]


def test_logprobs_are_the_models_own() -> None:
    logits = random_logits(7)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    params = SamplingParams(temperature=0.5, logprobs=3, repetition_penalty=2, seed=1)
    (choice,) = sample(logits[None], [state(params, [1])])
    assert choice.logprobs is not None
    assert choice.logprob == pytest.approx(expected[choice.token_id], abs=1e-5)
    top = np.argsort(-expected)[:3].tolist()
    assert list(choice.logprobs)[:3] == top
    assert set(choice.logprobs) == {*top, choice.token_id}
    for token_id, logprob in choice.logprobs.items():
        assert logprob == pytest.approx(expected[token_id], abs=1e-5)
    assert list(log_probabilities(logits, 9, 0)) == [9]
    assert len(log_probabilities(logits, 9, VOCAB)) == VOCAB


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_give_an_error_and_no_token(value: float, temperature: float) -> None:
    logits = random_logits(8)[None]
    logits[0, 9] = value
    (choice,) = sample(logits, [state(SamplingParams(temperature=temperature), [1])])
    assert choice.token_id == -1
    assert "not finite" in str(choice.error)


def test_forbidding_every_token_is_an_error() -> None:
    words = [[token_id] for token_id in range(VOCAB)]
    (choice,) = sample(random_logits(9)[None], [state(SamplingParams(temperature=1), [1], bad_words=words)])
    assert "forbid every token" in str(choice.error)


@pytest.mark.parametrize("temperature", [1e-46, 1e-6, 1e-3])
def test_a_tiny_temperature_is_nearly_greedy(temperature: float) -> None:
    logits = random_logits(10)
    assert draw(logits, state(SamplingParams(temperature=temperature), [1])) == int(logits.argmax())


def test_minus_infinity_in_the_logits_is_a_token_that_never_comes() -> None:
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[3, 8]] = 1
    made = state(SamplingParams(temperature=1, top_k=50, top_p=0.99, min_p=0.01, seed=1), [1])
    assert {draw(logits, made) for _ in range(50)} == {3, 8}


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0},
        {"top_p": 1.1}, {"min_p": 2}, {"repetition_penalty": 0}, {"min_tokens": 33}, {"n": 0}, {"n": 257},
        {"logprobs": -1}, {"seed": -1}, {"max_tokens": "5"}, {"max_tokens": 2.5}, {"top_k": True}, {"top_p": "x"},
        {"presence_penalty": np.float32("nan")}, {"stop": [1]}, {"stop": 1}, {"bad": [None]}, {"end_id": "0"},
        {"stop_token_ids": "abc"}, {"stop_token_ids": [1.5]}, {"adaptive_k_policy": 3},
        {"return_context_logits": "yes"}, {"stop": [""]}, {"bad": ""},
    ],
)  # fmt: skip
def test_a_parameter_out_of_range_is_named(params: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(params))):
        SamplingParams(**params)


def test_numpys_numbers_are_numbers() -> None:
    values: dict[str, Any] = {
        "max_tokens": np.int32(4),
        "temperature": np.float32(0.5),
        "seed": np.uint64(7),
        "stop_token_ids": np.array([1, 2]),
    }
    params = SamplingParams(**values)
    assert params == SamplingParams(max_tokens=4, temperature=0.5, seed=7, stop_token_ids=(1, 2))
    assert type(params.max_tokens) is int
