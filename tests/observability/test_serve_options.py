# SPDX-License-Identifier: Apache-2.0
"""`adaptive-k serve` and what it writes down: standard output, samples, bad options, a collector that is not there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from observed import scrape, total
from opentelemetry.sdk.trace import TracerProvider

from adaptive_k_moe.cli import main
from adaptive_k_moe.client import Client
from adaptive_k_moe.errors import ClientError, ServerError
from adaptive_k_moe.model_repository import TritonServer
from adaptive_k_moe.model_repository.observation_options import ObservationOptions
from adaptive_k_moe.model_repository.requests import trace_headers

from waiting import eventually


def test_request_lines_on_standard_output_with_prompts(engine_dir: Path, tmp_path: Path) -> None:
    ports = ["--http_port", "0", "--grpc_port", "0", "--metrics_port", "0"]
    # Nobody listens there: spans are lost, and nothing else.
    options = ["--log_requests", "-", "--log_prompts", "--otlp_endpoint", "http://127.0.0.1:9"]
    log = tmp_path / "triton.log"
    command = [sys.executable, "-m", "adaptive_k_moe", "serve", "--engine_dir", engine_dir, "--log_file", log]
    process = subprocess.Popen(
        [*command, *ports, *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        url = ready.split("grpc ")[1].split(",")[0]
        provider = TracerProvider()
        with Client(url, timeout=60) as client:
            with provider.get_tracer("caller").start_as_current_span("caller") as span:
                client.generate("import os", max_tokens=3, end_id=-1, request_id="one\n2")
            with pytest.raises(ClientError):
                client.generate("import os", adaptive_k_policy="no such")
        # HTTP's fields do as well as gRPC's metadata.
        http = ready.split("http ")[1].split(",")[0]
        body = {
            "text_input": "import os",
            "max_tokens": 2,
            "id": "of HTTP",
            "traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01",
        }
        request = urllib.request.Request(f"http://{http}/v2/models/ensemble/generate", json.dumps(body).encode())
        assert json.load(urllib.request.urlopen(request, timeout=30))["id"] == "of HTTP"
        answered, refused = json.loads(process.stdout.readline()), json.loads(process.stdout.readline())
        assert answered["request_id"] == "one\n2" and answered["prompt"] == "import os" and answered["answers"]
        # The client says which span it is in, where the program uses OpenTelemetry.
        assert answered["trace_id"] == f"{span.get_span_context().trace_id:032x}"
        assert refused["error_kind"] == "policy" and "trace_id" not in refused
        line = json.loads(process.stdout.readline())
        assert (line["request_id"], line["trace_id"]) == ("of HTTP", "ab" * 16)
        began = time.monotonic()
        process.terminate()
        assert process.wait(60) == 0
        assert time.monotonic() - began < 40
        assert "import os" not in log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_log_of_a_share_of_the_requests(engine_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    observation = ObservationOptions(request_log=str(log), sample=0.0, max_bytes=10_000)
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    with (
        TritonServer(engine_dir, **ports, log_file=tmp_path / "triton.log", observation=observation) as server,
        Client(server.grpc_url, timeout=60) as client,
    ):
        client.generate("import os", max_tokens=3)
        with pytest.raises(ClientError):
            client.generate("import os", adaptive_k_policy="no such")
        assert eventually(lambda: total(scrape(server.metrics_url), "adaptive_k_requests_total") == 2)
    (line,) = log.read_text().splitlines()
    assert json.loads(line)["finish_reason"] == "refused"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--log_sample", "1.5"], "the share of requests to log is 1.5: it must be from 0 to 1"),
        (["--log_max_bytes", "-1"], "a log of -1 bytes cannot be kept"),
        (["--otlp_endpoint", "localhost:4317"], "'localhost:4317' is no OTLP endpoint"),
        (["--log_requests", "no/where/requests.jsonl"], "cannot write the request log"),
    ],
)
def test_bad_options_are_one_sentence(
    engine_dir: Path, tmp_path: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = ["--http_port", "0", "--grpc_port", "0", "--metrics_port", "0"]
    log = str(tmp_path / "triton.log")
    assert main(["serve", "--engine_dir", str(engine_dir), "--log_file", log, *ports, *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("adaptive-k: error: ") and sentence in error and error.count("\n") == 1


def test_options_survive_the_models_configuration() -> None:
    options = ObservationOptions(
        request_log="/a log", log_prompts=True, sample=0.125, max_bytes=5, otlp_endpoint="http://[::1]:4317"
    )
    assert ObservationOptions.from_parameters(options.to_parameters()) == options
    assert ObservationOptions.from_parameters({}) == ObservationOptions()
    assert ObservationOptions().to_parameters() == {}
    assert ObservationOptions(request_log="-").to_parameters() == {"request_log": "-"}
    relative = ObservationOptions(request_log="log", ab_db="ab.db")  # of this process's folder, not of the server's
    assert relative.to_parameters() == {"request_log": str(Path.cwd() / "log"), "ab_db": str(Path.cwd() / "ab.db")}
    with pytest.raises(ServerError, match="is no number"):
        ObservationOptions.from_parameters({"log_sample": "half"})


def test_trace_headers_are_read_whatever_their_case() -> None:
    headers = trace_headers({"Traceparent": "a", "tracestate": "b", "other": "c"})
    assert headers == {"traceparent": "a", "tracestate": "b"}
