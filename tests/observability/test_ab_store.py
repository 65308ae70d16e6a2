# SPDX-License-Identifier: Apache-2.0
"""The database of A/B tests: sums that are right however requests arrive, limits, and files that are no use."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptive_k_moe import cli
from adaptive_k_moe.errors import ExperimentError
from adaptive_k_moe.observability import ab_test
from adaptive_k_moe.observability.ab_test import ABTest, Experiment, Variant
from adaptive_k_moe.observability.ab_test.records import RequestRecord, ScoreRecord
from adaptive_k_moe.observability.ab_test.results import compute, violations
from adaptive_k_moe.observability.ab_test.store import Store

VARIANTS = (Variant("control", "full"), Variant("less", "top1"))


def record(index: int, variant: str = "control", **fields: Any) -> RequestRecord:
    given: dict[str, Any] = {
        "experiment": "e",
        "unit": f"unit {index}",
        "request_id": f"request {index}",
        "outcome": "stop",
        "latency_seconds": 0.5,
        "ttft_seconds": 0.1,
        "num_tokens": 4,
        "avg_k": 2.0,
    }
    return RequestRecord(variant=variant, **(given | fields))


def score(index: int, lost: float = 0.0) -> ScoreRecord:
    return ScoreRecord(f"request {index}", answer_logprob=-1 - lost, best_logprob=-1, own_logprob=-1, agreement=1.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "ab.db") as store:
        store.start(Experiment("e", VARIANTS))
        yield store


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_sums_are_those_of_the_requests_however_they_are_batched_and_repeated(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 40))
    seconds = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=count, max_size=count))
    variants = data.draw(st.lists(st.sampled_from(["control", "less"]), min_size=count, max_size=count))
    records: list[RequestRecord | ScoreRecord] = []
    for index, (latency, variant) in enumerate(zip(seconds, variants, strict=True)):
        records += [record(index, variant, latency_seconds=latency), score(index, latency)]
    path = tmp_path_factory.mktemp("ab") / "ab.db"
    with Store(path) as first, Store(path) as second:
        first.start(Experiment("e", VARIANTS))
        start = 0
        while start < len(records):
            end = start + data.draw(st.integers(1, 12))
            writer = data.draw(st.sampled_from([first, second]))
            for _ in range(data.draw(st.integers(1, 2))):  # the second time changes nothing
                writer.record(records[start:end])
            start = end
        stored = first.read("e")
    for variant in ("control", "less"):
        chosen = [one for one, name in zip(seconds, variants, strict=True) if name == variant]
        assert stored.num_requests[variant] == len(chosen)
        if not chosen:
            continue
        for metric, values in (("latency", np.log(chosen)), ("quality", np.array(chosen))):
            deviations = values - values.mean()
            expected = (len(values), values.mean(), (deviations**2).sum(), (deviations**3).sum())
            scale = max(1.0, float(np.abs(deviations).max())) ** 3 * len(values)
            assert stored.sums[variant][metric] == pytest.approx(expected, rel=1e-6, abs=1e-9 * scale)


def test_only_a_units_first_request_counts(store: Store) -> None:
    store.record([record(index, unit="one user") for index in range(3)])
    store.record([record(3, unit="one user"), record(4, unit="another"), score(3), score(0)])
    stored = store.read()
    assert stored.num_requests["control"] == 5
    assert stored.sums["control"]["latency"].count == 2
    assert stored.sums["control"]["quality"].count == 1


def test_what_a_request_is_an_observation_of_depends_on_how_it_ended(store: Store) -> None:
    store.record([record(0, outcome="cancelled"), record(1, outcome="error"), record(2, outcome="length")])
    sums = store.read().sums["control"]
    assert {name: moments.count for name, moments in sums.items() if moments.count} == {
        "cancelled_rate": 3,
        "error_rate": 2,
        "latency": 1,
        "ttft": 1,
        "time_per_token": 1,
        "avg_k": 1,
    }
    assert sums["cancelled_rate"].mean == pytest.approx(1 / 3) and sums["error_rate"].mean == 0.5
    assert sums["time_per_token"].mean == pytest.approx(math.log(0.5 / 4))


def test_a_stopped_variants_figures_stay_as_they_were(store: Store) -> None:
    store.record([record(index, "less", latency_seconds=1.0) for index in range(3)])
    figures = {name: found.to_dict() for name, found in compute(store.read()).treatments[0].comparisons.items()}
    assert store.stop_variant("e", "less", "it is worse.", figures)
    assert not store.stop_variant("e", "less", "it is worse.", {})
    store.record(
        [record(9, "less"), score(1), record(10, counted=False), record(11, "nobody"), record(12, experiment="f")]
    )
    stored = store.read()
    assert stored.sums["less"]["latency"].count == 3 and stored.sums["less"]["quality"].count == 0
    assert stored.sums["control"]["latency"].count == 0 and stored.num_requests == {"control": 1, "less": 4}
    result = compute(stored).treatments[0]
    assert result.variant.stop_reason == "it is worse." and result.comparisons["latency"].count == 3
    assert math.isinf(result.comparisons["quality"].low)
    running = store.running()
    assert running is not None and running.variants[1].stopped_at is not None


def test_old_requests_go_and_their_sums_stay(tmp_path: Path) -> None:
    path = tmp_path / "ab.db"
    with Store(path) as store:
        store.start(Experiment("e", VARIANTS, max_rows=1000))
        for start in range(0, 20_000, 500):
            store.record([record(index, latency_seconds=1 + index) for index in range(start, start + 500)])
        assert store.read().sums["control"]["latency"].count == 20_000
        assert store.read().num_requests["control"] == 20_000
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*), min(request_id) FROM requests").fetchone()[0] == 1000
    connection.close()
    assert path.stat().st_size < 400_000  # all of them take 3 MB


def test_one_experiment_runs_at_a_time_and_each_name_is_used_once(store: Store) -> None:
    with pytest.raises(ExperimentError, match="'e' is running"):
        store.start(Experiment("f", VARIANTS))
    assert store.stop().name == "e"
    assert store.running() is None
    with pytest.raises(ExperimentError, match="no experiment is running"):
        store.stop()
    with pytest.raises(ExperimentError, match="has an experiment 'e' already"):
        store.start(Experiment("e", VARIANTS))
    store.start(Experiment("f", VARIANTS, alpha=0.1, score_share=0.5, guardrails=(), max_rows=7))
    assert store.read().experiment.name == "f" and store.read("e").experiment.stopped_at is not None
    found = store.running()
    assert found is not None and (found.alpha, found.score_share, found.guardrails, found.max_rows) == (0.1, 0.5, (), 7)
    with pytest.raises(ExperimentError, match="there is no experiment 'g'"):
        store.read("g")
    with pytest.raises(ExperimentError, match="no experiment 'e' is running"):
        store.stop("e")


def test_two_processes_opening_a_new_file_at_once_make_one_database(tmp_path: Path) -> None:
    for attempt in range(10):
        path, errors = tmp_path / f"{attempt}.db", []
        barrier = threading.Barrier(4)

        def open_it(path: Path = path, errors: list[Exception] = errors, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                Store(path).close()
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=open_it) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []


def _garbage(path: Path) -> None:
    path.write_bytes(os.urandom(8192))


def _another(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE mine (x)")


def _newer(path: Path) -> None:
    Store(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def _truncated(path: Path) -> None:
    with Store(path) as store:
        store.start(Experiment("e", VARIANTS))
        store.record([record(index) for index in range(500)])
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: None, "there is no A/B database"),
        (_garbage, "file is not a database"),
        (_another, "but not one of A/B tests"),
        (_newer, "format 99, not 1"),
        (_truncated, "malformed"),
        (lambda path: path.mkdir(), "unable to open database file"),
    ],
)
def test_a_file_that_is_no_use_is_one_sentence(
    tmp_path: Path, spoil: Any, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ab.db"
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    assert cli.main(["ab", "status", "--db", str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and sentence in printed.err
    assert before is None or path.read_bytes() == before


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    db = ["--db", str(tmp_path / "ab.db")]
    start = ["ab", "start", *db, "--variant", "control=full:3", "--variant", "less=top1"]
    assert (
        cli.main([*start, "--experiment", "spring", "--guardrail", "latency:0.1", "--guardrail", "agreement:0.02"]) == 0
    )
    assert cli.main(["ab", "status", *db]) == 0
    printed = capsys.readouterr().out
    assert "guardrails latency:0.1, agreement:0.02" in printed and "not measured yet" in printed
    assert cli.main([*start, "--experiment", "summer"]) == 1
    assert "'spring' is running" in capsys.readouterr().err
    assert cli.main(["ab", "stop", *db]) == 0
    assert cli.main(["ab", "stop", *db]) == 1
    assert cli.main([*start, "--experiment", "summer", "--guardrail", "none"]) == 0
    with Store(tmp_path / "ab.db") as store:
        running = store.running()
        assert running is not None and running.guardrails == () and running.control.weight == 3
        store.record(
            [record(i, ("control", "less")[i % 2], experiment="summer", latency_seconds=0.1 + i) for i in range(400)]
        )
        store.record([record(i, "less", experiment="summer") for i in range(400, 2000)])
    capsys.readouterr()
    assert cli.main(["ab", "status", *db]) == 0
    printed = capsys.readouterr().out
    assert "the shares of requests are not what the weights say" in printed
    assert "time saved a token: " in printed and "Quality: not measured yet" in printed
    with pytest.raises(SystemExit):
        cli.main(["ab"])


def test_policies_of_any_name_are_shown_on_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    db = ["--db", str(tmp_path / "ab.db")]
    policy = "\x1b[2Jtwo\nlines \u202e\u00fc"
    arguments = ["--experiment", "odd", "--variant", "control=full", "--variant", f"less={policy}"]
    assert cli.main(["ab", "start", *db, *arguments]) == 0
    capsys.readouterr()
    assert cli.main(["ab", "status", *db]) == 0
    assert "  \\x1b[2Jtwo\\nlines \\u202e\u00fc  " in capsys.readouterr().out
    assert cli.main(["ab", "status", *db, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["variants"][1]["policy"] == policy


def test_a_test_in_a_program_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ab.db"
    with pytest.raises(ExperimentError, match="no A/B test is chosen"):
        ab_test.compute_results()
    random = np.random.default_rng(0)
    with ABTest.start(path, "fewer-experts", ["control=full", "treatment=balanced:1"], score_share=1.0) as test:
        for index in range(400):
            request_id = f"request {index}"
            variant = test.assign_variant(request_id)
            treated = test.policy(variant) == "balanced"
            latency = random.lognormal(-1, 0.1) * (0.68 if treated else 1.0)
            test.record(request_id, variant, latency_seconds=latency, num_tokens=10, avg_k=1.5)
            lost = random.exponential(0.001) if treated else 0.0
            test.record_score(ScoreRecord(request_id, -1 - lost, -1, -1, 1.0))
        with pytest.raises(ExperimentError, match="has no variant 'nobody'"):
            test.record("request", "nobody", latency_seconds=1.0)
        assert test.apply_guardrails() == []
    # The lines of the README of old, word for word:
    request_id = "request 7"
    ab_test.configure(path)
    ab_test.assign_variant(request_id)
    print(ab_test.compute_results())
    printed = capsys.readouterr().out
    assert printed.startswith("Latency: -3") and ", Quality: -0.1" in printed
    assert repr(ab_test.compute_results()) == printed.strip()
    assert ab_test.assign_variant("request 7", user="user 7") == ab_test.assign_variant("another", user="user 7")


@pytest.mark.parametrize(
    "guardrail", ["quality:0.05", "agreement:0.05", "error_rate:0.1", "latency:0.2", "own_loss:0.1"]
)
def test_each_guardrail_stops_its_own_harm_and_nothing_else(tmp_path: Path, guardrail: str) -> None:
    metric = guardrail.partition(":")[0]
    random = np.random.default_rng(1)
    variants = ["control=full", "bad=top1", "fine=top1"]
    with ABTest.start(tmp_path / "ab.db", "e", variants, guardrails=(ab_test.Guardrail.parse(guardrail),)) as test:
        store = Store(tmp_path / "ab.db")
        records: list[RequestRecord | ScoreRecord] = []
        for index in range(1500):
            variant = test.assign_variant(f"unit {index}")
            bad = variant == "bad"
            outcome = "error" if bad and metric == "error_rate" and random.random() < 0.3 else "stop"
            latency = random.lognormal(0, 0.3) * (1.5 if bad and metric == "latency" else 1.0)
            records.append(record(index, variant, outcome=outcome, latency_seconds=latency))
            lost = random.exponential(0.02 if variant != "control" else 1e-9) + 0.2 * bad
            of = {name: lost if metric == name else 0.0 for name in ("quality", "own_loss", "agreement")}
            answer = -1 - max(of["quality"], of["own_loss"])
            best, own = (-1 if of[name] else answer for name in ("quality", "own_loss"))
            records.append(ScoreRecord(f"request {index}", answer, best, own, 1 - of["agreement"]))
        store.record(records)
        assert [variant.name for variant, _, _ in violations(store.read())] == ["bad"]
        (sentence,) = test.apply_guardrails()
        assert metric in sentence and "'bad'" in sentence and sentence.endswith(".")
        assert test.apply_guardrails() == []
        store.close()
    with ABTest(tmp_path / "ab.db") as test:
        names = {test.assign_variant(f"unit {index}") for index in range(100)}
    assert names == {"control", "fine"}
