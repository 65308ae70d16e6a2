# SPDX-License-Identifier: Apache-2.0
"""The line of a request: its fields, where it goes, what is left out, and that a slow writer holds nobody up."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from observed import make_output

from adaptive_k_moe.errors import ServerError
from adaptive_k_moe.observability import get_logger
from adaptive_k_moe.observability.inference_trace import InferenceTrace
from adaptive_k_moe.observability.logs import InferenceLogger, SampleFilter, as_fields, file_handler
from adaptive_k_moe.observability.request_records import RequestRecords
from adaptive_k_moe.observability.trace_context import read_trace_context
from adaptive_k_moe.runtime.expert_runs import ExpertReads, ExpertRuns
from adaptive_k_moe.runtime.outputs import Enrollment, RequestContext
from adaptive_k_moe.runtime.telemetry import Refusal

PARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


@pytest.fixture
def logger() -> Iterator[InferenceLogger]:
    logger = get_logger("test")
    logger.logger.propagate = False
    yield logger
    for handler in list(logger.logger.handlers):
        logger.logger.removeHandler(handler)
        handler.close()
    logger.logger.filters.clear()


def test_a_line_says_what_happened(logger: InferenceLogger, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    logger.logger.addHandler(file_handler(path))
    context = RequestContext(client_id="mine", batch_index=2, trace_headers={"traceparent": PARENT})
    logger.log_inference(make_output(context=context, enrollment=Enrollment("test", "candidate", "mine")))
    line = json.loads(path.read_text())
    assert next(iter(line)) == "ts" and line.pop("ts").endswith("Z")
    assert line.pop("latency_ms") == pytest.approx(1000, abs=1)
    assert line.pop("queue_ms") == pytest.approx(250, abs=1)
    assert line.pop("ttft_ms") == pytest.approx(500, abs=1)
    assert line == {
        "request_id": "mine",
        "batch_index": 2,
        "trace_id": "ab" * 16,
        "policy": "balanced",
        "variant": "candidate",
        "num_input_tokens": 3,
        "num_output_tokens": 2,
        "avg_k": 1.75,  # (2 x 4 + 4 x 1 of the prompt, 2 x 1 of the answer) / 8
        "compute_saved_ratio": 0.5625,
        "k_histogram": {"1": 6, "4": 2},
        "finish_reason": "stop",
    }


def test_a_line_says_what_was_read_and_which_policies_were_followed() -> None:
    reads = ExpertReads()
    reads.add(6.0, 3, 4)
    reads.add(2.0, 1, 2)
    fields = as_fields(InferenceTrace.of(make_output(expert_reads=reads, followed={"full": 3, "fast": 1})))
    assert (fields["avg_reads"], fields["reads_per_token"]) == (4.0, (6 * 3 / 4 + 2 * 1 / 2) / 4)
    assert (fields["policy"], fields["followed"]) == ("balanced", {"full": 3, "fast": 1})
    alone = as_fields(InferenceTrace.of(make_output(followed={"balanced": 4})))
    assert not {"followed", "avg_reads", "reads_per_token"} & set(alone)


def test_prompts_and_answers_only_on_request() -> None:
    trace = InferenceTrace.of(make_output())
    assert "to be" not in json.dumps(as_fields(trace)) and "a<b>" not in json.dumps(as_fields(trace))
    fields = as_fields(trace, with_text=True)
    assert (fields["prompt"], fields["answers"]) == ("to be", ["a<b>"])


@given(st.text(), st.text())
def test_a_request_is_one_line_whatever_it_holds(prompt: str, request_id: str) -> None:
    trace = InferenceTrace.of(make_output(prompt=prompt, context=RequestContext(client_id=request_id)))
    line = json.dumps(as_fields(trace, with_text=True))
    assert len(line.splitlines()) == 1
    assert json.loads(line)["prompt"] == prompt


def test_refused_and_failed_requests_have_lines_of_a_graver_level(caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger("graver")
    with caplog.at_level(logging.INFO):
        logger.log_inference(InferenceTrace.of(Refusal("id", "no such", "sentence", "policy")))
        logger.log_inference(make_output(error="the engine failed: x", error_kind="engine"))
        logger.log_inference(make_output())
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR", "INFO"]
    refused, failed, _ = (json.loads(record.getMessage()) for record in caplog.records)
    assert (refused["finish_reason"], refused["error_kind"], refused["error"]) == ("refused", "policy", "sentence")
    assert (refused["request_id"], refused["policy"]) == ("id", "no such")
    assert (failed["finish_reason"], failed["error_kind"]) == ("error", "engine")


def test_a_request_that_ended_before_its_first_step() -> None:
    output = make_output(prompt_k=np.zeros((0, 2), np.int32), expert_runs=ExpertRuns(full_k=4))
    output.outputs[0].k = np.zeros((0, 2), np.int32)
    output.outputs[0].finish_reason = "cancelled"
    output.metrics.first_scheduled_time = output.metrics.first_token_time = None
    fields = as_fields(InferenceTrace.of(output))
    assert fields["finish_reason"] == "cancelled"
    assert not {"avg_k", "ttft_ms", "queue_ms"} & fields.keys()
    assert fields["k_histogram"] == {}


def test_without_any_handler_lines_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    logger = get_logger("nobody_listens")
    logger.logger.propagate = False
    logger.log_inference(make_output())
    assert json.loads(capsys.readouterr().err)["request_id"] == "mine"


def test_sampling_keeps_a_share_and_all_failures(logger: InferenceLogger, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    handler = file_handler(path)
    handler.addFilter(SampleFilter(0.25))
    logger.logger.addHandler(handler)
    for number in range(1000):
        logger.log_inference(make_output(context=RequestContext(client_id=f"id-{number}")))
        if number % 100 == 0:
            logger.log_inference(make_output(error="sentence", error_kind="engine"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum(line["finish_reason"] == "error" for line in lines) == 10
    kept = {line["request_id"] for line in lines if line["finish_reason"] == "stop"}
    assert 190 < len(kept) < 310  # four standard deviations and more
    path.write_text("")
    for number in range(1000):
        logger.log_inference(make_output(context=RequestContext(client_id=f"id-{number}")))
    assert {json.loads(line)["request_id"] for line in path.read_text().splitlines()} == kept


def test_files_rotate_at_a_size_and_follow_logrotate(logger: InferenceLogger, tmp_path: Path) -> None:
    rotating = file_handler(tmp_path / "sized.jsonl", max_bytes=2000, backup_count=2)
    moved = file_handler(tmp_path / "moved.jsonl")
    logger.logger.addHandler(rotating)
    logger.logger.addHandler(moved)
    for _ in range(40):
        logger.log_inference(make_output())
    sized = sorted(tmp_path.glob("sized.jsonl*"))
    assert [path.name for path in sized] == ["sized.jsonl", "sized.jsonl.1", "sized.jsonl.2"]
    assert all(path.stat().st_size <= 2000 for path in sized)
    (tmp_path / "moved.jsonl").rename(tmp_path / "moved.old")
    logger.log_inference(make_output())
    assert len((tmp_path / "moved.jsonl").read_text().splitlines()) == 1
    assert len((tmp_path / "moved.old").read_text().splitlines()) == 40


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"cannot write the request log .*nowhere"):
        file_handler(tmp_path / "nowhere" / "requests.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_sentence_and_no_more(
    logger: InferenceLogger, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = file_handler("/dev/full")
    logger.logger.addHandler(handler)
    for _ in range(3):
        logger.log_inference(make_output())
    handler.close()
    assert [record.getMessage() for record in caplog.records if record.name.endswith(".observability")] == [
        "the request log /dev/full cannot be written: [Errno 28] No space left on device"
    ]
    assert "Traceback" not in capsys.readouterr().err


def test_a_request_that_ends_between_the_last_look_and_the_close_is_recorded() -> None:
    seen: list[str] = []
    looked, closing = threading.Event(), threading.Event()

    class SlowAfterALook(RequestRecords):
        def _record_waiting(self) -> None:
            super()._record_waiting()
            looked.set()
            closing.wait()

    records = SlowAfterALook([lambda trace: seen.append(trace.request_id)])
    records.on_request_finished(make_output(context=RequestContext(client_id="first")))
    looked.wait()
    records.on_request_finished(make_output(context=RequestContext(client_id="second")))
    records.close(0.0)
    closing.set()
    records.close()
    assert seen == ["first", "second"]


def test_records_come_in_order_and_a_failing_sink_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def sink(trace: InferenceTrace) -> None:
        seen.append(trace.request_id)
        if trace.request_id == "1":
            raise RuntimeError("trouble")

    records = RequestRecords([sink])
    for number in range(5):
        records.on_request_finished(make_output(context=RequestContext(client_id=str(number))))
    records.on_request_refused(Refusal("5", None, "sentence", "request"))
    records.close()
    assert seen == list("012345")
    assert "a request could not be recorded" in caplog.text


def test_a_sink_that_hangs_holds_nobody_up_and_what_is_lost_is_counted() -> None:
    go_on = threading.Event()
    seen: list[str] = []

    def sink(trace: InferenceTrace) -> None:
        go_on.wait()
        seen.append(trace.request_id)

    records = RequestRecords([sink], most_waiting=3)
    for _ in range(10):
        records.on_request_finished(make_output())
    assert records.num_dropped >= 6  # one may be with the sink
    go_on.set()
    records.close()
    assert len(seen) + records.num_dropped == 10


@pytest.mark.parametrize(
    "header",
    ["", "x", PARENT[:-1], f"ff{PARENT[2:]}", f"{PARENT}-more", f"00-{'0' * 32}-{'cd' * 8}-01", PARENT.upper()],
)
def test_an_invalid_trace_context_is_none(header: str) -> None:
    assert read_trace_context({"traceparent": header}) is None
    assert read_trace_context({}) is None


def test_a_later_version_of_the_trace_context_may_say_more() -> None:
    context = read_trace_context({"traceparent": f"01{PARENT[2:]}-more"})
    assert context is not None and context.span_id == "cd" * 8
