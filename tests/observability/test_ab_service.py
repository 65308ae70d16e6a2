# SPDX-License-Identifier: Apache-2.0
"""An A/B test on an engine in this process: scores are right, and whatever the file does, requests are answered."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptive_k_moe.observability.ab_test import ABTest
from adaptive_k_moe.observability.ab_test.experiment import Experiment, Variant
from adaptive_k_moe.observability.ab_test.service import ABService
from adaptive_k_moe.observability.ab_test.store import Store
from adaptive_k_moe.runtime import LLM, RequestOutput, SamplingParams

from waiting import eventually

VARIANTS = ["control=full", "less=top1"]
PROMPTS = ["And it came to pass", "the router", "import os", "two of eight experts", "class", "for each token"]


@pytest.fixture(scope="module")
def llm(engine_dir: Path) -> Iterator[LLM]:
    with LLM(engine_dir, num_threads=1) as llm:
        yield llm


class Running:
    """A service with the sentences that it logged."""

    def __init__(self, llm: LLM, path: Path, **settings: Any) -> None:
        self.news: list[str] = []
        self.errors: list[str] = []
        self.llm = llm
        settings = {"poll_seconds": 0.05, "pause_seconds": 0.3} | settings
        self.service = ABService(llm, path, log=self.news.append, log_error=self.errors.append, **settings)

    def ask(self, unit: str, **params: Any) -> RequestOutput:
        given: dict[str, Any] = {"max_tokens": 3, "end_id": -1} | params
        sampling, enrollment = self.service.enroll(SamplingParams(**given), unit)
        prompt = PROMPTS[len(unit) % len(PROMPTS)]
        return self.llm.generate_async(prompt, sampling, enrollment=enrollment).result(60)


@pytest.fixture
def run(llm: LLM) -> Iterator[Callable[..., Running]]:
    with contextlib.ExitStack() as stack:

        def start(path: Path, **settings: Any) -> Running:
            running = Running(llm, path, **settings)
            stack.callback(running.service.close)
            return running

        yield start


def counts(path: Path) -> int:
    with Store(path, create=False) as store:
        return sum(store.read().num_requests.values())


def test_scores_are_what_the_logits_say(llm: LLM, run: Callable[..., Running], tmp_path: Path) -> None:
    path = tmp_path / "ab.db"
    ABTest.start(path, "e", VARIANTS, score_share=1.0, guardrails=()).close()
    running = run(path)
    outputs = [running.ask(f"unit {index}", max_tokens=4 + 5 * index, temperature=index % 2) for index in range(8)]
    connection = sqlite3.connect(path)
    sql = "SELECT answer_logprob, best_logprob, own_logprob, agreement FROM requests WHERE request_id = ?"

    def scored(output: RequestOutput) -> Any:
        row = connection.execute(sql, (output.request_id,)).fetchone()
        return row if row and row[0] is not None else None

    for output in outputs:
        assert eventually(lambda output=output: scored(output) is not None)
        answer = output.outputs[0].token_ids
        logits = {}
        for policy in ("full", output.policy):
            params = SamplingParams(max_tokens=1, end_id=-1, return_context_logits=True, adaptive_k_policy=policy)
            whole = np.asarray(llm.generate([*output.prompt_token_ids, *answer], params).context_logits, np.float64)
            logits[policy] = whole[len(output.prompt_token_ids) - 1 : -1]
        logprobs = {name: rows - np.logaddexp.reduce(rows, axis=1)[:, None] for name, rows in logits.items()}
        full, own, places = logprobs["full"], logprobs[output.policy], np.arange(len(answer))
        expected = (
            full[places, answer].mean(),
            full.max(axis=1).mean(),
            own[places, answer].mean(),
            (full.argmax(axis=1) == own.argmax(axis=1)).mean(),
        )
        assert scored(output) == pytest.approx(expected, abs=1e-4)
        if output.policy == "full":
            assert scored(output)[0] == scored(output)[2] and scored(output)[3] == 1.0
    assert {output.variant for output in outputs} == {"control", "less"}
    connection.close()


def test_an_answer_by_load_is_scored_under_the_policy_that_computed_most(
    engine_dir: Path, run: Callable[..., Running], tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(engine_dir, engine)
    config = json.loads((engine / "config.json").read_text())
    # From the second token on, any time since the token before is too long.
    steps = [{"policy": "full"}, {"policy": "top1", "time_between_tokens": 1e-9}]
    config["adaptive_k"]["policies"]["auto"] = {"kind": "by_load", "steps": steps, "leave_seconds": 0}
    (engine / "config.json").write_text(json.dumps(config))
    path = tmp_path / "ab.db"
    ABTest.start(path, "e", ["control=top1", "less=auto"], score_share=1.0, guardrails=()).close()
    with LLM(engine, num_threads=1) as llm:
        running = Running(llm, path)
        try:
            outputs = [running.ask(f"unit {index}", max_tokens=40) for index in range(6)]
            by_load = next(output for output in outputs if output.policy == "auto")
            assert by_load.followed_by_load is not None and set(by_load.followed) == {"full", "top1"}
            assert by_load.followed["top1"] > by_load.followed["full"]
            with Store(path, create=False) as store:
                assert eventually(lambda: sum(sums["own_loss"].count for sums in store.read().sums.values()) == 6)
            with contextlib.closing(sqlite3.connect(path)) as connection:
                sql = "SELECT agreement FROM requests WHERE request_id = ?"
                [agreement] = connection.execute(sql, (by_load.request_id,)).fetchone()
            assert agreement < 1.0  # not under full, which agrees with itself
        finally:
            running.service.close()


def test_an_answer_as_long_as_the_engine_takes_is_scored(run: Callable[..., Running], tmp_path: Path) -> None:
    path = tmp_path / "ab.db"
    ABTest.start(path, "e", VARIANTS, score_share=1.0, guardrails=()).close()
    running = run(path)
    output = running.ask("unit", max_tokens=1000)
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 512

    def num_scored() -> int:
        with ABTest(path) as test:
            quality = test.compute_results().treatments[0].comparisons["quality"]
        return quality.count + quality.control_count

    assert eventually(lambda: num_scored() == 1)


def test_start_stop_and_an_unknown_policy(run: Callable[..., Running], tmp_path: Path) -> None:
    path = tmp_path / "ab.db"
    running = run(path)
    assert running.ask("a").variant is None
    with Store(path) as store:
        store.start(Experiment("first", (Variant("control", "full"), Variant("less", "top1"))))
        assert eventually(lambda: running.ask("a").variant is not None)
        store.stop()
        assert eventually(lambda: running.ask("a").variant is None)
        store.start(Experiment("second", (Variant("control", "nowhere"), Variant("less", "nowhere"))))
        assert eventually(lambda: running.ask("a").variant is None and bool(running.errors))
        store.stop()
    assert running.news[0] == "the experiment 'first' is running: control = full (1), less = top1 (1)."
    assert "the experiment 'first' is over." in running.news
    (error,) = running.errors
    assert error.startswith("the experiment 'second' enrols no request for the variant ")
    assert error.endswith(": this engine has no policy 'nowhere'.")


def test_named_requests_take_no_part_and_cancelled_ones_are_told_apart(
    llm: LLM, run: Callable[..., Running], tmp_path: Path
) -> None:
    path = tmp_path / "ab.db"
    ABTest.start(path, "e", VARIANTS, score_share=1.0).close()
    running = run(path)
    assert running.ask("named", adaptive_k_policy="top1").variant is None
    assert running.ask("fine").variant is not None
    params, enrollment = running.service.enroll(SamplingParams(max_tokens=400, end_id=-1), "cancelled")
    handle = llm.generate_async("the", params, enrollment=enrollment)
    handle.abort()
    assert handle.result(60).outputs[0].finish_reason == "cancelled"
    assert eventually(lambda: counts(path) == 2)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT outcome FROM requests ORDER BY id").fetchall() == [
            ("length",),
            ("cancelled",),
        ]


def test_more_than_a_batch_does_not_wait_between_its_writes(
    run: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptive_k_moe.observability.ab_test.service._MAX_BATCH", 1)
    path = tmp_path / "ab.db"
    ABTest.start(path, "e", VARIANTS, score_share=0.0, guardrails=()).close()
    running = run(path, poll_seconds=3600.0)
    output = running.ask("unit")
    for number in range(100):  # with a pause after each, this would take a minute
        running.service.on_request_finished(replace(output, request_id=f"request {number}"))
    assert eventually(lambda: counts(path) == 101)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.execute("ROLLBACK")
    connection.close()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptive_k_moe.observability.ab_test.store._BUSY_SECONDS", 0.1)


def test_a_locked_file_holds_up_nobody_and_nothing_is_lost(
    run: Callable[..., Running], tmp_path: Path, patience: None
) -> None:
    path = tmp_path / "ab.db"
    ABTest.start(path, "e", VARIANTS, score_share=1.0).close()
    running = run(path, pause_seconds=60)
    with _locked(path):
        answered = [running.ask(f"unit {index}").variant for index in range(10)]
        assert None not in answered
        assert eventually(lambda: bool(running.errors))
        answered += [running.ask(f"unit {index}").variant for index in range(10, 20)]
    assert eventually(lambda: counts(path) == 20)
    assert running.errors == [f"the A/B database {path} cannot be written: database is locked."]
    assert eventually(lambda: running.news[-1] == f"the A/B database {path} can be used again.")


def test_a_test_that_nobody_watches_over_pauses(run: Callable[..., Running], tmp_path: Path, patience: None) -> None:
    path = tmp_path / "ab.db"
    ABTest.start(path, "e", VARIANTS, score_share=1.0).close()
    running = run(path)
    assert running.ask("unit").variant is not None
    assert eventually(lambda: counts(path) == 1)
    with _locked(path):
        assert running.ask("another").variant is not None
        assert eventually(lambda: running.ask("unit").variant is None)
        assert any("'e' pauses" in one for one in running.errors + running.news)
    assert eventually(lambda: running.ask("unit").variant is not None)
    assert eventually(lambda: counts(path) >= 3)


@pytest.mark.parametrize(
    ("pragma", "sentence"),
    [("query_only = 1", "attempt to write a readonly database"), ("max_page_count = 1", "database or disk is full")],
)
def test_a_file_that_cannot_be_written(run: Callable[..., Running], tmp_path: Path, pragma: str, sentence: str) -> None:
    path = tmp_path / "ab.db"
    ABTest.start(path, "e", VARIANTS, score_share=1.0).close()
    running = run(path, pause_seconds=60)
    store = running.service._store
    assert store is not None
    store._connection.execute(f"PRAGMA {pragma}")
    asked = 0
    while not running.errors and asked < 400:  # the first pages of the file have room for some
        running.ask(f"unit {asked}", max_tokens=1)
        asked += 1
    assert eventually(lambda: bool(running.errors))
    assert sentence in running.errors[0] and running.errors[0].count("\n") == 0
    assert running.ask("another").error is None
    store._connection.execute("PRAGMA query_only = 0")
    store._connection.execute("PRAGMA max_page_count = 1000000")
    assert eventually(lambda: counts(path) == asked + 1)


def test_a_file_that_is_spoilt_deleted_and_made_anew(run: Callable[..., Running], tmp_path: Path) -> None:
    path = tmp_path / "ab.db"
    ABTest.start(path, "e", VARIANTS, score_share=1.0).close()
    running = run(path)
    assert running.ask("unit").variant is not None
    spoilt = tmp_path / "spoilt"
    spoilt.write_bytes(os.urandom(100_000))
    os.replace(spoilt, path)
    assert eventually(lambda: running.ask("unit").variant is None)
    assert running.errors[0] == f"the A/B database {path} cannot be opened: file is not a database."
    for leftover in tmp_path.glob("ab.db*"):
        leftover.unlink()
    assert running.ask("unit").error is None
    ABTest.start(path, "anew", VARIANTS, score_share=1.0).close()
    assert eventually(lambda: running.ask("unit").variant is not None)
    assert eventually(lambda: counts(path) > 0)


def test_a_file_in_the_midst_of_which_bytes_are_spoilt(run: Callable[..., Running], tmp_path: Path) -> None:
    path = tmp_path / "ab.db"
    ABTest.start(path, "e", VARIANTS, score_share=1.0).close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))
    running = run(path)
    assert running.ask("unit").variant is None
    assert running.errors == [f"the A/B database {path} cannot be read: database disk image is malformed."]


def test_what_is_queued_is_written_before_the_end(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "ab.db"
    ABTest.start(path, "e", VARIANTS, score_share=0.5, guardrails=()).close()
    running = Running(llm, path)
    threads = [threading.Thread(target=running.ask, args=(f"unit {index}",)) for index in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    running.service.close()
    assert counts(path) == 30


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can act as another user")
def test_a_file_of_another_user_is_one_sentence() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ab.db"
        ABTest.start(path, "e", VARIANTS).close()
        os.chmod(directory, 0o755)
        os.chmod(path, 0o644)
        # The interpreter itself may lie where only root may look, so it is loaded before the step down.
        code = (
            "import contextlib, io, os, sys\n"
            "from adaptive_k_moe import cli\n"
            "with contextlib.redirect_stdout(io.StringIO()): cli.main(['ab', 'status', *sys.argv[3:]])\n"
            "os.setegid(65534); os.seteuid(65534)\n"
            "raise SystemExit(cli.main(sys.argv[1:]))"
        )
        command = [sys.executable, "-c", code, "ab", "stop", "--db", path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
        assert "readonly database" in done.stderr or "unable to open" in done.stderr
