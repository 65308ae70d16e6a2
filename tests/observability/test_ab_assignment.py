# SPDX-License-Identifier: Apache-2.0
"""Which variant a request belongs to: by weight, the same everywhere, and of no other experiment's choosing."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from adaptive_k_moe.errors import ExperimentError
from adaptive_k_moe.observability.ab_test.assignment import Assigner, fraction
from adaptive_k_moe.observability.ab_test.experiment import Experiment, Guardrail, Variant

UNITS = [f"request-{index}" for index in range(20_000)]


@pytest.mark.parametrize("weights", [(1, 1), (9, 1), (1, 2, 3), (0.001, 0.999), (5,) * 8])
def test_shares_are_the_weights(weights: tuple[float, ...]) -> None:
    assigner = Assigner("salt", weights)
    counts = Counter(map(assigner.assign, UNITS))
    expected = np.array(weights) / sum(weights) * len(UNITS)
    assert stats.chisquare([counts[index] for index in range(len(weights))], expected).pvalue > 1e-3


def test_the_hash_is_uniform_and_independent_between_experiments() -> None:
    first, second = ([fraction(salt, unit) for unit in UNITS] for salt in ("one", "two"))
    assert stats.kstest(first, "uniform").pvalue > 1e-3
    together, _, _ = np.histogram2d(first, second, bins=8, range=[[0, 1], [0, 1]])
    assert stats.chisquare(together.ravel()).pvalue > 1e-3


def test_what_is_scored_does_not_depend_on_the_variant() -> None:
    experiment = Experiment("e", (Variant("control", "full"), Variant("less", "top1")), score_share=0.2)
    assigner = experiment.assigner()
    counts = Counter((assigner.assign(unit), experiment.is_scored(unit)) for unit in UNITS)
    table = [[counts[variant, scored] for scored in (False, True)] for variant in (0, 1)]
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert counts[0, True] + counts[1, True] == pytest.approx(4000, abs=250)


def test_every_process_and_every_version_says_the_same() -> None:
    assert [Assigner("spring", (1, 1, 2)).assign(unit) for unit in ("a", "b", "c", "ü", "")] == [0, 0, 2, 0, 2]
    code = (
        "from adaptive_k_moe.observability.ab_test.assignment import Assigner\n"
        "print([Assigner('spring', (1, 1, 2)).assign(str(i)) for i in range(50)])"
    )
    said = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
        for _ in range(2)
    }
    assert said == {f"{[Assigner('spring', (1, 1, 2)).assign(str(i)) for i in range(50)]}\n"}


@given(st.text(), st.text(), st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6))
def test_any_text_has_a_variant(salt: str, unit: str, weights: list[float]) -> None:
    assert 0 <= Assigner(salt, weights).assign(unit) < len(weights)
    assert 0 <= fraction(salt, unit) < 1


def test_parts_of_a_hash_are_not_run_together() -> None:
    assert fraction("ab", "c") != fraction("a", "bc")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("less", "has no policy: give NAME=policy"),
        ("=top1", "cannot be the name of a variant"),
        ("two words=top1", "cannot be the name of a variant"),
        ("less=top1:much", "is not of the form NAME=policy or NAME=policy:weight"),
        ("less=top1:0", "has the weight 0"),
        ("less=top1:nan", "has the weight nan"),
        ("less=:1", "has no policy"),
    ],
)
def test_bad_variants_are_refused_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ExperimentError, match=sentence):
        Variant.parse(text)


def test_the_name_of_a_policy_may_hold_anything() -> None:
    for policy in ("a:b", "k=1", 'quoted "name"', "\u00fc \U0001f600", " "):
        assert Variant.parse(f"less={policy}:0.5") == Variant("less", policy, 0.5)
    assert Variant.parse("less=k=1") == Variant("less", "k=1")


def test_bad_experiments_are_refused_in_a_sentence() -> None:
    control, less = Variant("control", "full"), Variant("less", "top1")
    for arguments, sentence in (
        (("e", (control,)), "at least two variants"),
        (("e", (less, less)), "two variants of one name"),
        (("é", (control, less)), "cannot be the name of an experiment"),
    ):
        with pytest.raises(ExperimentError, match=sentence):
            Experiment(*arguments)
    for settings, sentence in (
        ({"alpha": 0.0}, "alpha is 0"),
        ({"score_share": 1.5}, "score_share is 1.5"),
        ({"score_share": 0.0}, "the guardrail quality:0.05 needs a score_share above 0"),
        ({"max_rows": 0}, "max_rows is 0"),
    ):
        with pytest.raises(ExperimentError, match=sentence):
            Experiment("e", (control, less), **settings)
    for text, sentence in (
        ("speed:1", "'speed' cannot be guarded"),
        ("quality", "METRIC:MARGIN"),
        ("quality:-1", "0 or more"),
    ):
        with pytest.raises(ExperimentError, match=sentence):
            Guardrail.parse(text)
    assert Experiment("e", (less, control)).control is control
    assert Experiment("e", (less, Variant("more", "full"))).control is less
