"""`corral bench` against real servers on the loopback interface with scripted answers, timings and faults."""

import asyncio
import datetime
import ipaddress
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner, Result

from clients.bench.results import read_results
from clients.bench.workloads import arrivals
from clients.cli.main import app
from deployments.protocol.chat import ChatCompletionRequest
from tests.conftest import free_port
from training.errors import ConfigError

FIRST_S = 0.06
GAP_S = 0.01


class ScriptedServer:
    """Serves OpenAI's chat API; the name of the model selects its behaviour."""

    def __init__(self, port: int, **options: Any) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self._measured = 0
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
        ]
        config = uvicorn.Config(Starlette(routes=routes), port=port, log_level="error", **options)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def _models(self, request: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "first"}, {"id": "second"}]})

    async def _chat(self, request: HTTPRequest) -> Response:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        model = body["model"]
        if model == "absent":
            return JSONResponse({"error": {"message": "no model 'absent'", "code": "model_not_found"}}, 404)
        if model == "strict" and "ignore_eos" in body:
            return JSONResponse({"detail": "extra field: ignore_eos"}, 422)
        if model == "flaky" and len(self.requests) % 3 == 0:
            return JSONResponse({"error": {"message": "overloaded\nplease wait"}}, 503)
        return StreamingResponse(self._events(model, body), media_type="text/event-stream")

    async def _events(self, model: str, body: dict[str, Any]) -> AsyncIterator[str]:
        num_tokens = body["max_tokens"]
        per_event = 2 if model == "pairs" else 1
        yield event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "usage": None})
        await asyncio.sleep(FIRST_S / 6 if len(body["messages"]) > 2 else FIRST_S)
        for index in range(0, num_tokens, per_event):
            if index:
                await asyncio.sleep(GAP_S)
            if model == "breaks" and index == 2:
                yield event({"error": {"message": "the engine fell over"}})
                return
            text = ' "usage": {"content":"' if index % 2 else " word"
            yield event({"choices": [{"index": 0, "delta": {"content": text}}], "usage": None})
        yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}], "usage": None})
        if model != "silent":
            num_words = sum(len(message["content"].split()) for message in body["messages"])
            details = {"cached_tokens": num_words // 2 if len(body["messages"]) > 2 else 0}
            usage = {"prompt_tokens": num_words, "completion_tokens": num_tokens, "prompt_tokens_details": details}
            yield event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[ScriptedServer, str]]:
    port = free_port()
    server = ScriptedServer(port)
    server.start()
    yield server, f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def server(running: tuple[ScriptedServer, str], monkeypatch: pytest.MonkeyPatch) -> ScriptedServer:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running[0].requests.clear()
    running[0].headers.clear()
    return running[0]


@pytest.fixture
def url(running: tuple[ScriptedServer, str]) -> str:
    return running[1]


def bench(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments], env=env)


def bench_json(*arguments: str) -> Any:
    result = bench(*arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def assert_one_line_error(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    for word in words:
        assert word in last


def test_tokens_and_times_are_those_of_the_server(server: ScriptedServer, url: str) -> None:
    output = bench_json(f"{url}/v1/", "--concurrency", "1,4", "--max-tokens", "8")
    assert output["settings"]["models"] == ["first"]
    assert [level["load"]["concurrency"] for level in output["levels"]] == [1, 4]
    assert [level["requests"] for level in output["levels"]] == [2, 8]
    assert len(server.requests) == 1 + 1 + 2 + 1 + 8  # a probe, and a warm-up before each level
    for level in output["levels"]:
        assert level["errors"] == 0
        assert level["output_tokens"] == 8 * level["requests"]
        assert level["output_tokens_per_s"] == pytest.approx(level["output_tokens"] / level["elapsed_s"])
        assert FIRST_S <= level["ttft_s"]["p50"] < FIRST_S + 0.1
        assert GAP_S * 0.9 < level["tpot_s"]["p50"] < GAP_S * 3
        assert FIRST_S + 7 * GAP_S <= level["latency_s"]["p50"] < level["elapsed_s"]
        for record in level["records"]:
            assert len(record["gaps_s"]) == 7  # neither the role nor the usage event is a piece of text
            assert record["tpot_s"] == pytest.approx(sum(record["gaps_s"]) / 7, abs=1e-4)
            assert record["latency_s"] > record["ttft_s"] + sum(record["gaps_s"]) - 1e-5  # gaps are rounded
    request = server.requests[-1]
    assert (request["ignore_eos"], request["temperature"], request["max_tokens"]) == (True, 0.0, 8)
    assert (request["stream"], request["stream_options"]) == (True, {"include_usage": True})


@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_corral_accepts_what_is_sent(server: ScriptedServer, url: str, temperature: str) -> None:
    bench(url, "--concurrency", "1", "--max-tokens", "2", "--temperature", temperature, "--seed", "11")
    sent = [ChatCompletionRequest.model_validate(request) for request in server.requests[-2:]]
    assert [request.seed for request in sent] == ([None, None] if temperature == "0" else [11, 12])


def test_usage_counts_the_tokens_where_an_event_has_several(server: ScriptedServer, url: str) -> None:
    [level] = bench_json(url, "-m", "pairs", "--concurrency", "1", "--max-tokens", "8")["levels"]
    [record, _] = level["records"]
    assert (record["completion_tokens"], len(record["gaps_s"])) == (8, 3)
    assert record["tpot_s"] == pytest.approx(sum(record["gaps_s"]) / 7, abs=1e-4)


def test_a_server_without_usage_has_its_pieces_counted_and_that_is_said(server: ScriptedServer, url: str) -> None:
    result = bench(url, "-m", "silent", "--concurrency", "1", "--max-tokens", "5", "--json", "-")
    output = json.loads(result.stdout)
    assert output["levels"][0]["output_tokens"] == 10
    assert output["levels"][0]["prompt_tokens"] is None
    assert "no usage" in output["notes"][0]
    assert "note: the server sends no usage" in result.stderr


def test_several_models_take_turns(server: ScriptedServer, url: str) -> None:
    [level] = bench_json(
        url, "-m", "a", "-m", "b", "-m", "c", "--concurrency", "3", "--num-requests", "9", "--max-tokens", "2"
    )["levels"]
    assert Counter(record["model"] for record in level["records"]) == {"a": 3, "b": 3, "c": 3}
    assert [request["model"] for request in server.requests[-9:-6]] == ["a", "b", "c"]


def test_an_open_loop_sends_at_the_arrivals_and_does_not_wait_for_answers(server: ScriptedServer, url: str) -> None:
    output = bench_json(url, "--rate", "40", "--num-requests", "12", "--max-tokens", "20", "--seed", "5")
    [level] = output["levels"]
    assert level["load"] == {"concurrency": None, "rate": 40.0, "prompt_tokens": None}
    starts = sorted(record["start_s"] for record in level["records"])
    for start, at in zip(starts, arrivals(40.0, seed=5), strict=False):
        assert at <= start < at + 0.1
    assert starts[4] < min(record["latency_s"] for record in level["records"])


def test_a_second_turn_sends_the_whole_dialog_and_is_shown_beside_the_first(server: ScriptedServer, url: str) -> None:
    arguments = (url, "--workload", "shared-prefix", "--prefix-tokens", "60", "--concurrency", "2", "--max-tokens", "3")
    [level] = bench_json(*arguments)["levels"]
    first, second = level["turns"]
    assert (first["requests"], second["requests"]) == (2, 2)
    assert first["prompt_tokens"] > 60
    assert second["prompt_tokens"] > first["prompt_tokens"]
    assert (first["cached_tokens"], second["cached_tokens"] > 20) == (0, True)
    assert second["ttft_s"]["p50"] < first["ttft_s"]["p50"] / 2
    dialogs = [request["messages"] for request in server.requests]
    later = [dialog for dialog in dialogs if len(dialog) == 4]
    assert len(later) == 2
    for dialog in later:
        assert [message["role"] for message in dialog] == ["system", "user", "assistant", "user"]
        assert dialog[2]["content"] == ' word "usage": {"content":" word'
        assert dialog[:2] in dialogs
    assert "faster" in bench(*arguments).stdout


def test_a_server_that_refuses_ignore_eos_is_asked_without_it(server: ScriptedServer, url: str) -> None:
    result = bench(url, "-m", "strict", "--concurrency", "1", "--max-tokens", "2", "--json", "-")
    assert result.exit_code == 0, result.stderr
    output = json.loads(result.stdout)
    assert not output["settings"]["ignore_eos"]
    assert "refuses ignore_eos" in output["notes"][0]
    assert ["ignore_eos" in request for request in server.requests] == [True] + [False] * 4
    bench(url, "-m", "strict", "--no-ignore-eos", "--concurrency", "1", "--max-tokens", "2")
    assert not any("ignore_eos" in request for request in server.requests[5:])


@pytest.mark.parametrize(
    ("model", "why"), [("flaky", "503: overloaded please wait"), ("breaks", "after the answer began: the engine fell")]
)
def test_failed_requests_are_counted_named_and_exit_1(server: ScriptedServer, url: str, model: str, why: str) -> None:
    result = bench(url, "-m", model, "--concurrency", "1", "--num-requests", "4", "--max-tokens", "4")
    failed = 2 if model == "flaky" else 4  # every third that the server gets
    assert_one_line_error(result, 1, f"{failed} of 4 requests failed", why)
    assert f"4, {failed} failed" in result.stdout


def test_a_server_that_is_not_there_or_refuses_is_one_line_and_exits_1(server: ScriptedServer, url: str) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    assert_one_line_error(bench(away), 1, away, "start one")
    assert_one_line_error(bench(away, "-m", "a"), 1, away, "start one")
    assert_one_line_error(bench(url, "-m", "first", "-m", "absent"), 1, "404: no model 'absent'")
    assert_one_line_error(bench(f"{url}/elsewhere"), 1, "/elsewhere/v1/models", "404")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["127.0.0.1:8000"], ["127.0.0.1:8000", "http://"]),
        (["ftp://host"], ["ftp://host", "http://"]),
        (["--concurrency", "1,x"], ["--concurrency", "1,x"]),
        (["--concurrency", "0"], ["--concurrency"]),
        (["--rate", "nan"], ["--rate"]),
        (["--rate", "2", "--concurrency", "2"], ["--rate", "--concurrency"]),
        (["--prompt-tokens", "5"], ["--prompt-tokens", "prompt-length"]),
        (["--turns", "3"], ["--turns", "shared-prefix"]),
        (["--workload", "chatter"], ["chatter"]),
        (["--api-key", "k\u00e9y"], ["API key"]),
        (["--json", "/nowhere/else.json"], ["/nowhere/else.json"]),
        (["--plot", "plot.pdf"], ["plot.pdf", ".png"]),
        (["--compare", "/nowhere/else.json"], ["/nowhere/else.json", "--json"]),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exits_2_before_anything_is_sent(
    arguments: list[str], words: list[str]
) -> None:
    result = bench(*arguments)
    assert result.stdout == ""
    assert_one_line_error(result, 2, *words)
    assert result.stderr.count("\n") == 1


def test_results_are_read_back_and_shown_beside_a_new_run(server: ScriptedServer, url: str, tmp_path: Path) -> None:
    earlier, image = tmp_path / "earlier.json", tmp_path / "both.png"
    arguments = (url, "--concurrency", "1,2", "--max-tokens", "3")
    assert bench(*arguments, "--json", str(earlier), "--api-key", "sk-secret").exit_code == 0
    assert "sk-secret" not in earlier.read_text()
    results = read_results(earlier)
    assert results.as_json() == earlier.read_text()
    assert [level.requests for level in results.levels] == [2, 4]

    result = bench(*arguments, "--compare", str(earlier), "--label", "later", "--plot", str(image))
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines() if "stream" in line]
    assert [row[2] for row in rows] == ["earlier", "later"] * 2
    assert [row[3] for row in rows] == ["2", "2", "4", "4"]
    assert all(len(line) < 140 for line in result.stdout.splitlines())
    from PIL import Image

    with Image.open(image) as opened:
        opened.verify()
        assert (opened.format, opened.width) == ("PNG", 1800)

    earlier.write_text('{"format": "corral-bench/1"}')
    with pytest.raises(ConfigError, match="not a result of corral bench"):
        read_results(earlier)


def test_failures_alone_can_be_shown_and_drawn(server: ScriptedServer, url: str, tmp_path: Path) -> None:
    image = tmp_path / "none.png"
    result = bench(url, "-m", "breaks", "--concurrency", "1", "--max-tokens", "4", "--plot", str(image))
    assert result.exit_code == 1
    assert image.read_bytes().startswith(b"\x89PNG")


def test_the_key_comes_from_the_environment(server: ScriptedServer, url: str) -> None:
    bench(url, "--concurrency", "1", "--max-tokens", "2", env={"OPENAI_API_KEY": "sk-environment"})
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-environment"}


def test_ctrl_c_shows_what_was_measured_and_exits_130(server: ScriptedServer, url: str, tmp_path: Path) -> None:
    path = tmp_path / "partial.json"
    command = [sys.executable, "-m", "clients.cli", "bench", url, "-m", "a", "--concurrency", "1,2", "--num-requests"]
    running = subprocess.Popen(
        [*command, "12", "--max-tokens", "2", "--json", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(server.requests) < 2 + 12 + 1 + 4:  # into the second level
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=300)
    assert running.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "1 stream: 12 of 12 requests" in stderr
    complete, partial = read_results(path).levels
    assert (complete.interrupted, complete.requests, partial.interrupted) == (False, 12, True)
    assert 2 <= partial.requests < 12
    assert partial.errors == 0
    assert f"{partial.requests}, stopped" in stdout


def test_a_request_that_takes_too_long_fails(server: ScriptedServer, url: str) -> None:
    result = bench(url, "--concurrency", "1", "--max-tokens", "200", "--timeout", "0.3")
    assert_one_line_error(result, 1, "2 of 2 requests failed", "within 0.3 s")


def test_a_certificate_of_ones_own_needs_insecure(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ranch")])
    now = datetime.datetime.now(datetime.UTC)
    loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    unsigned = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    certificate = unsigned.add_extension(loopback, critical=False).sign(key, hashes.SHA256())
    (tmp_path / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    port = free_port()
    server = ScriptedServer(port, ssl_certfile=tmp_path / "cert.pem", ssl_keyfile=tmp_path / "key.pem")
    server.start()
    try:
        arguments = (f"https://127.0.0.1:{port}", "-m", "a", "--concurrency", "2", "--max-tokens", "2")
        assert_one_line_error(bench(*arguments), 1, "cannot be verified", "--insecure")
        assert bench(*arguments, "--insecure").exit_code == 0
    finally:
        server.stop()


def test_matplotlib_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert_one_line_error(bench("--plot", "x.png"), 2, "pip install 'matplotlib")


def test_nothing_heavy_is_imported_to_measure() -> None:
    heavy = {"torch", "ray", "numpy", "matplotlib", "transformers"}
    code = f"import sys, clients.cli, clients.bench.run; print(*sorted({heavy!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
    assert "Benchmark a chat server" in bench("--help").stdout
