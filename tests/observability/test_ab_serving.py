# SPDX-License-Identifier: Apache-2.0
"""An A/B test on a real Triton server: who takes part, what is written, a bad variant stopped, a bad file survived."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adaptive_k_moe import cli
from adaptive_k_moe.client import Client, Completion
from adaptive_k_moe.model_repository import TritonServer
from adaptive_k_moe.model_repository.observation_options import ObservationOptions
from adaptive_k_moe.observability.ab_test.abtest import ABTest
from adaptive_k_moe.observability.ab_test.store import Store

from waiting import eventually

WORDS = str.split("the router chose two experts of eight and it came to pass that a token went its way")


@pytest.fixture(scope="module")
def ab_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ab") / "ab.db"


@pytest.fixture(scope="module")
def server(engine_dir: Path, ab_db: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log_file = tmp_path_factory.mktemp("log") / "triton.log"
    with TritonServer(
        engine_dir,
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        log_file=log_file,
        num_threads=1,
        observation=ObservationOptions(ab_db=str(ab_db)),
    ) as server:
        yield server


@pytest.fixture
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=60) as client:
        yield client


@pytest.fixture
def experiment(ab_db: Path, client: Client, request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """Starts an experiment, of which the server knows when this returns; it is stopped in the end."""
    name = f"{request.node.name[5:35]}-{time.time_ns()}"

    def start(*options: str) -> str:
        arguments = ["ab", "start", "--db", str(ab_db), "--experiment", name, *options]
        assert cli.main(arguments) == 0
        assert eventually(lambda: ask(client).variant is not None)
        return name

    yield start
    with Store(ab_db) as store:
        if store.running() is not None:
            store.stop()
    assert eventually(lambda: ask(client).variant is None)


def ask(client: Client, prompt: str = "the", **options: Any) -> Completion:
    return client.generate(prompt, **{"max_tokens": 1, "end_id": -1, "return_k": False, **options})


def rows(path: Path, sql: str) -> list[Any]:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def test_requests_without_a_policy_are_assigned_and_those_with_one_are_not(
    experiment: Callable[..., str],
    ab_db: Path,
    server: TritonServer,
    client: Client,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = experiment("--variant", "control=full", "--variant", "less=top1", "--guardrail", "none")
    test = ABTest(ab_db, name)
    expected = {"control": 2.0, "less": 1.0}
    for user in (f"user {index}" for index in range(12)):
        answers = [ask(client, user=user, max_tokens=3) for _ in range(2)]
        for answer in answers:
            assert answer.variant == test.assign_variant("any id", user=user)
            assert answer.avg_k == expected[answer.variant]
    assert {ask(client, user=f"user {index}").variant for index in range(12)} == set(expected)
    named = ask(client, adaptive_k_policy="top1")
    assert named.variant is None and named.avg_k == 1.0
    assert (
        cli.main(["client", "--url", server.grpc_url, "--prompt", "the", "--max_tokens", "1", "--user", "user 5"]) == 0
    )
    assert f"variant {test.assign_variant('', user='user 5')}\n" in capsys.readouterr().err

    for request_id in ("a request", "another", "a third", "a fourth"):
        body = {"text_input": "the", "max_tokens": 1, "id": request_id}
        url = f"http://{server.http_url}/v2/models/ensemble/generate"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60) as answer:
            assert json.load(answer)["adaptive_k_variant"] == test.assign_variant(request_id)
    with Client(server.grpc_url, model_name="tensorrt_llm_bls", timeout=60) as other:
        assert ask(other, user="user 3").variant == test.assign_variant("", user="user 3")
        pieces = list(other.generate("the", stream=True, user="user 4", max_tokens=3, end_id=-1))
        assert {piece.variant for piece in pieces} == {test.assign_variant("", user="user 4")}
    test.close()


def test_each_finished_request_is_recorded_and_a_share_of_them_scored(
    experiment: Callable[..., str], ab_db: Path, client: Client
) -> None:
    name = experiment("--variant", "control=full", "--variant", "less=top1", "--score_share", "0.5")
    with Store(ab_db) as store:
        before = 1  # the one that showed that the server knows of the experiment
        assert eventually(lambda: sum(store.read(name).num_requests.values()) == before)
        answers = [ask(client, " ".join(WORDS[: 3 + i % 9]), max_tokens=2 + i % 5) for i in range(40)]
        assert eventually(lambda: sum(store.read(name).num_requests.values()) == before + 40)
    found = rows(
        ab_db,
        "SELECT variants.name, num_tokens, num_prompt_tokens, avg_k, latency, ttft, outcome FROM requests "
        f"JOIN variants ON variants.id = variant ORDER BY requests.id DESC LIMIT {40}",
    )[::-1]
    for answer, (variant, num_tokens, num_prompt_tokens, avg_k, latency, ttft, outcome) in zip(
        answers, found, strict=True
    ):
        assert (variant, num_tokens, num_prompt_tokens) == (
            answer.variant,
            answer.num_output_tokens,
            answer.num_input_tokens,
        )
        assert avg_k == pytest.approx(answer.avg_k) and outcome == "length"
        assert 0 < ttft <= latency < 60
    scored = "SELECT count(*), min(answer_logprob), max(answer_logprob) FROM requests WHERE answer_logprob IS NOT NULL"
    assert eventually(lambda: rows(ab_db, scored)[0][0] >= 8)
    _, least, greatest = rows(ab_db, scored)[0]
    assert -20 < least <= greatest <= 0


def test_a_variant_that_harms_quality_is_stopped_and_stays_so(
    experiment: Callable[..., str],
    ab_db: Path,
    server: TritonServer,
    client: Client,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--variant", "control=full", "--variant", "less=top1:1", "--variant", "same=full:0.2"]
    name = experiment(*options, "--score_share", "1", "--guardrail", "quality:0.005")
    test = ABTest(ab_db, name)
    harmed = [f"user {index}" for index in range(100) if test.assign_variant("", user=f"user {index}") == "less"]
    generator = random.Random(5)

    def stopped() -> bool:
        with ThreadPoolExecutor(4) as pool:
            prompts = [" ".join(generator.choices(WORDS, k=8)) for _ in range(24)]
            list(pool.map(lambda prompt: ask(client, prompt, max_tokens=16), prompts))
        time.sleep(0.3)  # idle time, in which answers are scored
        return test.compute_results().variants[1].variant.stopped_at is not None

    assert eventually(stopped, 90)
    results = test.compute_results()
    less, same = results.treatments
    assert less.variant.stop_reason is not None and "quality" in less.variant.stop_reason
    assert less.comparisons["quality"].low > 0.005
    assert same.variant.stopped_at is None
    assert eventually(lambda: ask(client, user=harmed[0]).variant == "control")
    answer = ask(client, user=harmed[1], max_tokens=4)
    assert answer.variant == "control" and answer.avg_k == 2.0

    # Another server on the same file, as after a restart, stops it too, and what it took counts for nobody.
    second = TritonServer(
        server.engine_dir,
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        log_file=server.engine_dir.parent / "second.log",
        num_threads=1,
        observation=ObservationOptions(ab_db=str(ab_db)),
    )
    with second, Client(second.grpc_url, timeout=60) as other:
        counted = "SELECT sum(count) FROM sums JOIN variants ON variants.id = variant WHERE metric = 'latency'"
        total = "SELECT count(*) FROM requests"
        before, num_rows = rows(ab_db, counted)[0][0], rows(ab_db, total)[0][0]
        assert {ask(other, user=user).variant for user in harmed[2:8]} == {"control"}
        assert eventually(lambda: rows(ab_db, total)[0][0] == num_rows + 6)
        assert rows(ab_db, counted)[0][0] == before

        # Both at work at once, until this one is killed.
        num_rows += 6
        assert second.pid is not None
        with ThreadPoolExecutor(6) as pool:
            done = list(pool.map(lambda index: ask((client, other)[index % 2], user=f"late {index}"), range(60)))
            assert eventually(lambda: rows(ab_db, total)[0][0] == num_rows + 60)
            more = [pool.submit(ask, (client, other)[index % 2], user=f"later {index}") for index in range(60)]
            time.sleep(0.1)
            os.killpg(second.pid, signal.SIGKILL)
            failed = sum(future.exception() is not None for future in more)
    assert len(done) == 60 and all(answer.variant in ("control", "same") for answer in done)
    assert eventually(lambda: rows(ab_db, total)[0][0] >= num_rows + 60 + 30)  # those of the server that lives
    assert rows(ab_db, total)[0][0] <= num_rows + 120 and failed <= 30
    assert rows(ab_db, "PRAGMA integrity_check") == [("ok",)]
    in_rows = "SELECT count(*) FROM requests WHERE counted AND outcome IN ('stop', 'length')"
    assert rows(ab_db, in_rows) == rows(ab_db, counted)
    assert ask(client).variant is not None
    test.close()
    assert cli.main(["ab", "status", "--db", str(ab_db)]) == 0
    printed = capsys.readouterr().out
    assert "less against control\n  stopped " in printed and "Quality: -" in printed
    assert cli.main(["ab", "status", "--db", str(ab_db), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert [variant["stop_reason"] is not None for variant in status["variants"]] == [False, True, False]
    less_saved, less_time = status["variants"][1]["time_saved"], status["variants"][1]["comparisons"]["time_per_token"]
    assert less_saved == {"estimate": -less_time["estimate"], "low": -less_time["high"], "high": -less_time["low"]}
    assert status["variants"][0]["time_saved"] is None


def test_a_spoilt_file_is_a_sentence_in_the_log_and_the_server_goes_on(
    server: TritonServer, client: Client, tmp_path: Path
) -> None:
    # The last test of this module: the file is of no use afterwards.
    options = server._observation
    assert options.ab_db is not None
    spoilt = tmp_path / "spoilt"
    spoilt.write_bytes(random.Random(1).randbytes(50_000))
    for log in Path(options.ab_db).parent.glob("*-wal"):
        log.unlink()  # SQLite would mend the file from it
    shutil.move(spoilt, options.ab_db)
    sentence = f"the A/B database {options.ab_db} cannot be opened: file is not a database."
    assert eventually(lambda: sentence in server.log_tail)
    answers = [ask(client, user=f"user {index}") for index in range(5)]
    assert {answer.variant for answer in answers} == {None}
    time.sleep(2.5)
    assert server.log_tail.count(sentence) == 1
