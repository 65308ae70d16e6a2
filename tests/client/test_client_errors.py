# SPDX-License-Identifier: Apache-2.0
"""The client against servers that refuse, stall, break off or are not there; TLS; options it checks itself."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

from adaptive_k_moe import cli
from adaptive_k_moe.client import AsyncClient, Client
from adaptive_k_moe.client.options import GenerateOptions
from adaptive_k_moe.client.protocol import encode_request
from adaptive_k_moe.errors import ClientError


def _piece(text: str) -> Any:
    response = service_pb2.ModelStreamInferResponse()
    arrays = {
        "text_output": np.array([text.encode()], dtype=object),
        "num_output_tokens": np.array([[1]], np.int32),
        "num_input_tokens": np.array([[3]], np.int32),
        "adaptive_k_avg_k": np.array([[1.5]], np.float32),
        "adaptive_k_compute_saved_ratio": np.array([[0.25]], np.float32),
        "adaptive_k_k": np.array([[[1, 2]]], np.int32),
    }
    types = {"O": "BYTES", "i": "INT32", "f": "FP32"}
    for name, array in arrays.items():
        response.infer_response.outputs.add(name=name, datatype=types[array.dtype.kind], shape=array.shape)
        raw = serialize_byte_tensor(array).item() if array.dtype == object else array.tobytes()
        response.infer_response.raw_output_contents.append(raw)
    return response


class _Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers as its `behave` says, and remembers whether a client went away."""

    def __init__(self) -> None:
        self.behave: Callable[[Any], Iterator[Any]] = lambda context: iter([])
        self.left = threading.Event()
        self.headers: dict[str, str] = {}

    def ModelStreamInfer(self, request_iterator: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        context.add_callback(self.left.set)
        self.headers = dict(context.invocation_metadata())
        list(request_iterator)
        yield from self.behave(context)


@pytest.fixture
def service() -> Iterator[tuple[_Service, str, Any]]:
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        service = _Service()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield service, f"127.0.0.1:{port}", server
        server.stop(None).wait()


def _endless(context: Any) -> Iterator[Any]:
    while context.is_active():
        yield _piece("a")
        time.sleep(0.01)


def test_pieces_are_joined_to_a_whole(service: Any) -> None:
    fake, url, _ = service
    fake.behave = lambda context: iter([_piece("a"), service_pb2.ModelStreamInferResponse(), _piece("é")])
    with Client(url, headers={"Authorization": "secret"}) as client:
        completion = client.generate("p")
    assert completion.text == "aé"
    assert (completion.num_output_tokens, completion.num_input_tokens, completion.avg_k) == (2, 3, 1.5)
    np.testing.assert_array_equal(completion.k, [[1, 2], [1, 2]])
    assert completion.entropy is None
    assert fake.headers["authorization"] == "secret"


@pytest.mark.parametrize("how", ["close", "forget", "leave the block"])
def test_a_stream_that_is_given_up_is_cancelled(service: Any, how: str) -> None:
    fake, url, _ = service
    fake.behave = _endless
    with Client(url) as client:
        stream = client.generate("p", stream=True)
        assert next(stream).text == "a"
        if how == "close":
            stream.close()
            assert list(stream) == []
        elif how == "forget":
            del stream
        else:
            with stream:
                pass
        assert fake.left.wait(60)


def test_a_server_that_dies_in_the_middle_raises(service: Any) -> None:
    fake, url, server = service
    fake.behave = _endless
    with Client(url) as client:
        stream = client.generate("p", stream=True)
        next(stream)
        server.stop(None)
        with pytest.raises(ClientError, match="cannot be reached, or broke off"):
            list(stream)
        assert list(stream) == []


def test_a_server_that_stalls_runs_into_the_timeout(service: Any) -> None:
    fake, url, _ = service

    def stall(context: Any) -> Iterator[Any]:
        yield _piece("a")
        while context.is_active():
            time.sleep(0.01)

    fake.behave = stall
    with Client(url, timeout=30) as client:
        stream = client.generate("p", stream=True, timeout=2.0)
        assert next(stream).text == "a"
        with pytest.raises(ClientError, match=r"did not finish its answer within 2 s"):
            next(stream)


def test_refusals_in_either_of_tritons_forms(service: Any) -> None:
    fake, url, _ = service
    fake.behave = lambda context: iter([service_pb2.ModelStreamInferResponse(error_message="top_p is 7")])
    with Client(url) as client:
        with pytest.raises(ClientError, match="refused the request: top_p is 7"):
            client.generate("p")
        fake.behave = lambda context: context.abort(grpc.StatusCode.INVALID_ARGUMENT, "top_k is\n7")
        with pytest.raises(ClientError, match="refused the request: top_k is 7"):
            client.generate("p")
        fake.behave = lambda context: iter([])
        with pytest.raises(ClientError, match="without an answer"):
            client.generate("p")


def test_a_client_may_be_closed_before_it_is_used_twice_and_used_again(service: Any) -> None:
    fake, url, _ = service
    fake.behave = lambda context: iter([_piece("a")])
    client = Client(url)
    client.close()
    for _ in range(2):
        assert client.generate("p").text == "a"
        client.close()
        client.close()

    other = AsyncClient(url)

    async def ask() -> str:
        await other.close()
        completion = await other.generate("p")
        await other.close()
        return completion.text

    assert [asyncio.run(ask()) for _ in range(2)] == ["a", "a"]  # each in a loop of its own


def test_no_server_is_an_error_at_once() -> None:
    started = time.monotonic()
    with Client("127.0.0.1:1") as client:
        assert not client.is_ready()
        with pytest.raises(ClientError, match=r"127.0.0.1:1 cannot be reached"):
            client.generate("p")
    assert time.monotonic() - started < 30


def test_the_async_twin(service: Any) -> None:
    fake, url, _ = service

    async def use() -> None:
        async with AsyncClient(url) as client:
            fake.behave = lambda context: iter([_piece("a"), _piece("b")])
            both = await asyncio.gather(client.generate("p"), client.generate("q"))
            assert [completion.text for completion in both] == ["ab", "ab"]
            assert [chunk.text async for chunk in client.generate("p", stream=True)] == ["a", "b"]
            fake.behave = _endless
            fake.left.clear()
            async with client.generate("p", stream=True) as stream:
                assert (await anext(stream)).text == "a"
            assert await asyncio.to_thread(fake.left.wait, 60)
            fake.left.clear()
            stream = client.generate("p", stream=True)
            await anext(stream)
            del stream
            assert await asyncio.to_thread(fake.left.wait, 60)
            with pytest.raises(ClientError, match=r"within 0.2 s"):
                await client.generate("p", timeout=0.2)
            task = asyncio.create_task(client.generate("p"))
            await asyncio.sleep(0.1)
            fake.left.clear()
            task.cancel()
            assert await asyncio.to_thread(fake.left.wait, 60)
            fake.behave = lambda context: iter([service_pb2.ModelStreamInferResponse(error_message="no")])
            with pytest.raises(ClientError, match="refused the request: no"):
                await client.generate("p")
        async with AsyncClient("127.0.0.1:1") as nobody:
            assert not await nobody.is_ready()

    asyncio.run(use())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls(tmp_path: Path, service: Any) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    fake, _, server = service
    fake.behave = lambda context: iter([_piece("a")])
    secrets = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    # Ports cannot be added to a server that runs, so this one has its own.
    with ThreadPoolExecutor(2) as pool:
        secure = grpc.server(pool)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, secure)
        port = secure.add_secure_port("localhost:0", secrets)
        secure.start()
        try:
            with Client(f"localhost:{port}", ssl=True, root_certificates=str(certificate)) as client:
                assert client.generate("p").text == "a"
            with Client(f"localhost:{port}", ssl=True, timeout=60) as client:
                with pytest.raises(ClientError, match="no secure connection"):
                    client.generate("p")
        finally:
            secure.stop(None).wait()
    del server


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(url="http://localhost:8001"), "is not an address"),
        (dict(url="localhost"), "is not an address"),
        (dict(url="localhost:port"), "is not an address"),
        (dict(url="a:1", root_certificates="/x"), "without ssl=True"),
        (dict(url="a:1", ssl=True, root_certificates="/no/such.pem"), "cannot read root_certificates /no/such.pem"),
        (dict(url=8001), "url is 8001: it must be text"),
        (dict(url="a:1", timeout="soon"), "timeout is 'soon': it must be a finite number"),
        (dict(url="a:1", headers={"a": 1}), "headers is {'a': 1}: it must be a dictionary of texts"),
        (dict(url="a:1", ssl=1), "ssl is 1: it must be True or False"),
    ],
)
def test_what_cannot_be_connected_to(arguments: dict[str, Any], sentence: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ClientError, match=sentence):
            kind(**arguments)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(max_tokens=2**31), "max_tokens is 2147483648"),
        (dict(max_tokens=1.5), "max_tokens is 1.5"),
        (dict(seed=-1), "seed is -1"),
        (dict(top_k="many"), "top_k is 'many'"),
        (dict(temprature=1.0), "no option 'temprature'"),
        (dict(adaptive_k_policy=5), "adaptive_k_policy is 5: it must be text"),
        (dict(user=b"me"), "user is b'me': it must be text"),
        (dict(stop=5), "stop is 5: it must be text or a list of texts"),
        (dict(bad=["a", 5]), "bad is .'a', 5.: it must be text or a list of texts"),
        (dict(logit_bias={"a": "much"}), "logit_bias is .* it must be a dictionary of texts, with finite numbers"),
        (dict(logit_bias={7: 1.0}), "logit_bias is .* it must be a dictionary of texts, with finite numbers"),
        (dict(return_k="no"), "return_k is 'no': it must be True or False"),
        (dict(request_id=7), "request_id is 7: it must be text"),
        (dict(timeout="soon"), "timeout is 'soon': it must be a finite number"),
        (dict(chat_template_kwargs=["tools"]), "chat_template_kwargs is .'tools'.: it must be a dictionary"),
        (dict(chat_template_kwargs={"tools": object()}), "chat_template_kwargs must be plain data"),
    ],
)
def test_what_cannot_be_sent(options: Any, sentence: str) -> None:
    with pytest.raises(ClientError, match=sentence):
        encode_request("ensemble", "p", options, stream=False)


def test_a_refusal_is_not_asked_for_as_the_calls_status(service: Any) -> None:
    fake, url, _ = service
    fake.behave = lambda context: iter([_piece("a")])
    with Client(url) as client:
        client.generate("p", chat_template_kwargs={})
    assert "triton_grpc_error" not in fake.headers  # server 2.51 may end with a segmentation fault


def test_an_option_that_is_none_is_left_to_the_server_and_the_client(service: Any) -> None:
    nothing: Any = dict.fromkeys(GenerateOptions.__annotations__)
    assert encode_request("m", "p", nothing, stream=False) == encode_request("m", "p", {}, stream=False)
    fake, url, _ = service

    def stall(context: Any) -> Iterator[Any]:
        while context.is_active():
            time.sleep(0.01)
        yield from ()

    fake.behave = stall
    with Client(url, timeout=0.3) as client, pytest.raises(ClientError, match=r"within 0\.3 s"):
        client.generate("p", timeout=None)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (["a", "b"], "the prompt is list: give a string, or a list of messages"),
        ([], "the prompt is list"),
        (b"text", "the prompt is bytes"),
        ({"role": "user"}, "the prompt is dict"),
        ([{"role": "user", "content": object()}], "messages must be plain data"),
        ("half a pair: \ud800", "not text that can be sent: surrogates not allowed"),
    ],
)
def test_a_prompt_must_be_text_or_messages(prompt: Any, sentence: str) -> None:
    with pytest.raises(ClientError, match=sentence):
        encode_request("ensemble", prompt, {}, stream=False)


def test_a_temperature_alone_samples() -> None:
    sent = [tensor.name for tensor in encode_request("m", "p", {"temperature": 0.5}, stream=False).inputs]
    assert "top_p" in sent
    for options in ({"temperature": 0.0}, {"temperature": 0.5, "top_k": 4}, {}):
        sent = [tensor.name for tensor in encode_request("m", "p", options, stream=False).inputs]
        assert "top_p" not in sent


def test_the_command_prints_pieces_and_k(service: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake, url, _ = service
    fake.behave = lambda context: iter([_piece("a"), _piece("b")])
    assert cli.main(["client", "--url", url, "--prompt", "p", "--stream"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "ab\n"
    assert "2 tokens" in printed.err
    assert "average k 1.50, 25.0 % of the expert runs left out" in printed.err
    assert cli.main(["client", "--url", url, "--prompt", "p", "--stream", "--show_k"]) == 0
    assert capsys.readouterr().out == "'a'  k=1,2\n'b'  k=1,2\n"
    assert cli.main(["client", "--url", "nowhere", "--prompt", "p"]) == 1
    assert capsys.readouterr().err.startswith("adaptive-k: error: 'nowhere' is not an address")
