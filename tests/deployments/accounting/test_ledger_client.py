"""Admission and trace on the real ingress and the real ledger in one process (C2, A4, A8): whatever ends a request,
its reservation is released once and counted once. The model replica is scripted to fail and wait on request.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import httpx
import pytest
from fastapi import FastAPI
from ray import serve
from starlette.exceptions import HTTPException

from deployments.accounting.ledger import Ledger
from deployments.accounting.usage import read_usage, usage_path
from deployments.api.ingress import ChatIngress
from deployments.auth.caller import ANONYMOUS, Caller, KeyLimits
from deployments.auth.dependencies import ChatCaller
from deployments.config import ServeArgs
from deployments.engine.request import Delta
from deployments.engine.stats import EngineStats
from deployments.errors import EngineFault, RateLimited
from deployments.protocol.chat import ChatCompletionRequest
from deployments.replica.request import GenerationRequest
from tests.deployments.accounting.test_metrics import series
from tests.deployments.accounting.test_usage import LONG_AGO
from tests.deployments.in_process import Replies
from training.base_models.resolve import BaseCheckpoint

CHAT = "/v1/chat/completions"
NUM_TOKENS = 6


class Replica:
    """A model replica: `NUM_TOKENS` times the same token, or a fault before token `fails_at`."""

    def __init__(self, fails_at: int | None = None, pause_s: float = 0.0) -> None:
        self.fails_at, self.pause_s = fails_at, pause_s
        self.requests: list[GenerationRequest] = []
        self.num_open = 0

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        self.requests.append(request)
        self.num_open += 1
        try:
            length = min(NUM_TOKENS, request.sampling.max_tokens)
            for i in range(length):
                if i == self.fails_at:
                    raise EngineFault("it broke")
                await asyncio.sleep(self.pause_s)
                yield [Delta([28], "length" if i + 1 == length else None, index) for index in range(request.n)]
        finally:
            self.num_open -= 1


class LedgerHandle:
    """Ray's handle of a ledger in this process; records the calls, and can lose its ledger."""

    def __init__(self) -> None:
        self.ledger: Any = cast(serve.Deployment, Ledger).func_or_class()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.away = False

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            self.calls.append((name, args))
            if self.away:
                await asyncio.sleep(3600)
            return await getattr(self.ledger, name)(*args)

        return SimpleNamespace(remote=call)

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [args for called, args in self.calls if called == name]


@dataclass
class Api:
    """One replica of the API; requests come from `caller`."""

    ingress: Any
    app: FastAPI
    replica: Replica
    ledger: LedgerHandle
    base: str
    caller: Caller = ANONYMOUS
    sent: list[Any] = field(default_factory=list)

    def body(self, **changes: Any) -> dict[str, Any]:
        return {"model": self.base, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, **changes}

    async def post(self, path: str = CHAT, **changes: Any) -> httpx.Response:
        return await self.send("POST", path, json=self.body(**changes))

    async def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    async def asgi(self, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"test"), (b"content-type", b"application/json")],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        await self.app(scope, receive, send)

    async def reported(self) -> None:
        """Wait until the ledger has all."""
        client = self.ingress.ledger
        deadline = time.monotonic() + 300
        while client._unreported or client._report or client._running:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


@pytest.fixture
def run(tiny_base: BaseCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a test's coroutine with an Api of its own."""
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path))

    def run(scenario: Callable[[Api], Coroutine[Any, Any, None]], replica: Replica | None = None) -> None:
        async def main() -> None:
            api = await build(tiny_base, replica or Replica())
            context = SimpleNamespace(servable_object=api.ingress)  # where the routes find their `self`
            monkeypatch.setattr(serve, "get_replica_context", lambda: context)
            try:
                await asyncio.wait_for(scenario(api), 300)
            finally:
                api.app.dependency_overrides.clear()  # the application is that of every ingress in this process

        asyncio.run(main())

    return run


async def build(base: BaseCheckpoint, replica: Replica) -> Api:
    async def stats(timeout_s: float, return_exceptions: bool) -> list[Any]:
        return [("replica-1", EngineStats(2, 1, 0.5, 0, 10, 4, 0)), RuntimeError("another one died")]

    model = SimpleNamespace(
        options=lambda stream: SimpleNamespace(
            generate=SimpleNamespace(remote=lambda request: Replies(replica.generate(request)))
        ),
        broadcast=lambda method: SimpleNamespace(results_async=stats),
    )
    ledger = LedgerHandle()
    wrapped: Any = cast(serve.Deployment, ChatIngress).func_or_class
    ingress = wrapped.__new__(wrapped)
    await ingress.__init__(model, ledger, None, ServeArgs(base_model=str(base.path)))
    api = Api(ingress, ingress.app, replica, ledger, base.name)
    ingress.app.dependency_overrides[get_args(ChatCaller)[1].dependency] = lambda: api.caller
    return api


def limited(**limits: int) -> Caller:
    return Caller("k1", "alice", frozenset({"chat"}), KeyLimits(**limits))


def released_tokens(api: Api) -> list[int]:
    """Tokens of each release; each is of another request, and of one that was admitted."""
    releases = api.ledger.called("release")
    admitted = [request_id for _, request_id, *_ in api.ledger.called("admit")]
    assert len({request_id for _, request_id, _ in releases}) == len(releases)
    assert {request_id for _, request_id, _ in releases} <= set(admitted)
    return [num_tokens for _, _, num_tokens in releases]


@pytest.mark.promise("C2")
def test_an_answer_is_released_once_with_its_usage_and_has_the_headers(run: Callable[..., None]) -> None:
    async def scenario(api: Api) -> None:
        api.caller = limited(rpm=5, tpm=1000, streams=1)
        first = await api.post()
        assert first.status_code == 200, first.text
        usage = first.json()["usage"]
        assert usage["completion_tokens"] == NUM_TOKENS
        assert released_tokens(api) == [usage["total_tokens"]]
        reserved = usage["prompt_tokens"] + 9
        assert first.headers["x-ratelimit-limit-tokens"] == "1000"
        assert first.headers["x-ratelimit-remaining-tokens"] == str(1000 - reserved)
        assert first.headers["x-ratelimit-remaining-requests"] == "4"
        second = await api.post(n=2)
        both = usage["total_tokens"] + usage["prompt_tokens"] + 2 * 9
        assert second.headers["x-ratelimit-remaining-tokens"] == str(1000 - both)
        await api.reported()
        (row,) = read_usage(usage_path(), LONG_AGO)
        totals = [answer.json()["usage"] for answer in (first, second)]
        assert (row.key_id, row.key, row.model) == ("k1", "alice", "tiny-llama")
        assert (row.requests, row.errors) == (2, 0)
        assert row.prompt_tokens == sum(total["prompt_tokens"] for total in totals)
        assert row.completion_tokens == sum(total["completion_tokens"] for total in totals) == 3 * NUM_TOKENS

    run(scenario)


@pytest.mark.promise("C2")
def test_a_stream_is_released_once_and_before_its_end_is_sent(run: Callable[..., None]) -> None:
    async def scenario(api: Api) -> None:
        api.caller = limited(streams=1, rpm=10)
        messages = [{"type": "http.request", "body": json.dumps(api.body(stream=True)).encode()}]
        released_when_done: list[list[int]] = []

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.sleep(3600)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert (b"x-ratelimit-remaining-requests", b"9") in message["headers"]
            if b"[DONE]" in message.get("body", b""):
                released_when_done.append(released_tokens(api))

        await api.asgi(receive, send)
        (tokens,) = released_when_done
        assert len(tokens) == 1
        assert released_tokens(api) == tokens
        assert (await api.post()).status_code == 200  # its place is free

    run(scenario)


@pytest.mark.promise("C2", "A8")
@pytest.mark.parametrize("how", ["the connection closes", "Ray cancels the request"])
def test_a_client_that_leaves_is_released_and_counted_with_what_it_used(run: Callable[..., None], how: str) -> None:
    async def scenario(api: Api) -> None:
        api.caller = limited(streams=1)
        messages = [{"type": "http.request", "body": json.dumps(api.body(stream=True)).encode()}]
        started, closed = asyncio.Event(), asyncio.Event()

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await closed.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if b"content" in message.get("body", b""):
                started.set()

        request = asyncio.ensure_future(api.asgi(receive, send))
        await started.wait()
        if how == "the connection closes":
            closed.set()
        else:
            request.cancel()
        await asyncio.wait({request})
        await api.reported()
        (row,) = read_usage(usage_path(), LONG_AGO)
        assert (row.requests, row.errors) == (1, 0)
        assert 1 <= row.completion_tokens < NUM_TOKENS
        assert released_tokens(api) == [row.prompt_tokens + row.completion_tokens]
        counted = series(await api.ledger.ledger.metrics())
        assert counted["corral_requests_total", ("tiny-llama", CHAT, "499")] == 1
        assert api.replica.num_open == 0
        api.replica.pause_s = 0
        assert (await api.post()).status_code == 200

    run(scenario, Replica(pause_s=0.1))


@pytest.mark.promise("C2")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fails_at", [0, 3])
def test_a_failed_answer_is_released_once_and_counted_as_an_error(
    run: Callable[..., None], fails_at: int, stream: bool
) -> None:
    async def scenario(api: Api) -> None:
        api.caller = limited(streams=1, tpm=1000)
        answer = await api.post(stream=stream)
        breaks_off = stream and fails_at > 0
        assert answer.status_code == (200 if breaks_off else 500)
        assert "it broke" in answer.text
        await api.reported()
        (row,) = read_usage(usage_path(), LONG_AGO)
        assert (row.requests, row.errors) == (1, 1)
        assert row.completion_tokens == fails_at
        assert bool(row.prompt_tokens) == (fails_at > 0)
        assert released_tokens(api) == [row.prompt_tokens + row.completion_tokens]
        assert series(await api.ledger.ledger.metrics())["corral_requests_total", ("tiny-llama", CHAT, "500")] == 1

    run(scenario, Replica(fails_at=fails_at))


@pytest.mark.promise("C2")
def test_what_is_refused_before_it_is_admitted_is_not_released(run: Callable[..., None]) -> None:
    async def scenario(api: Api) -> None:
        api.caller = limited(rpm=1)
        assert (await api.post(temperature=3)).status_code == 400
        assert (await api.post(max_tokens=5000)).json()["error"]["code"] == "context_length_exceeded"
        assert (await api.post(model="nobody")).status_code == 404
        assert (api.ledger.called("admit"), released_tokens(api)) == ([], [])
        assert (await api.post()).status_code == 200  # they reserved nothing

    run(scenario)


@pytest.mark.promise("C2")
def test_over_the_limit_is_429_in_openais_shape_before_any_header(run: Callable[..., None]) -> None:
    async def scenario(api: Api) -> None:
        api.caller = limited(rpm=1)
        assert (await api.post()).status_code == 200
        for stream in (False, True):
            response = await api.post(stream=stream)
            assert response.status_code == 429
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert 59 <= int(response.headers["retry-after"]) <= 61
            assert response.headers["x-ratelimit-remaining-requests"] == "0"
            assert f"try again in {response.headers['retry-after']} s" in error["message"]
        assert len(api.replica.requests) == len(released_tokens(api)) == 1
        await api.reported()
        (row,) = read_usage(usage_path(), LONG_AGO)
        assert (row.requests, row.errors) == (3, 2)

    run(scenario)


@pytest.mark.promise("C2")
def test_a_default_length_takes_what_is_left_of_the_tokens_of_a_minute(run: Callable[..., None]) -> None:
    async def scenario(api: Api) -> None:
        api.caller = limited(tpm=200)
        left = 200
        for number in range(3):  # each may use all that is left, and is counted with what it used
            answer = await api.post(max_tokens=None, n=2)
            assert answer.status_code == 200, answer.text
            assert api.replica.requests[number].max_total_tokens in (left - 1, left)
            left -= answer.json()["usage"]["total_tokens"]
        num_prompt_tokens = answer.json()["usage"]["prompt_tokens"]
        while left >= num_prompt_tokens + 1:
            answer = await api.post(max_tokens=None)
            assert answer.status_code == 200, answer.text
            left -= answer.json()["usage"]["total_tokens"]
            assert left >= 0
        refused = await api.post(max_tokens=None)
        assert refused.status_code == 429
        assert f"this request may use {num_prompt_tokens + 1}" in refused.json()["error"]["message"]
        too_large = await api.post(max_tokens=199)
        assert too_large.status_code == 429
        assert "lower max_tokens" in too_large.json()["error"]["message"]
        assert too_large.headers["x-should-retry"] == "false"

    run(scenario)


@pytest.mark.promise("C2")
def test_the_ui_is_held_to_the_same_limits_and_counted(run: Callable[..., None]) -> None:
    async def scenario(api: Api) -> None:
        body, caller = ChatCompletionRequest(**api.body()), limited(rpm=1)
        text = "".join([piece async for piece in api.ingress.chat(body, caller)])
        assert text
        with pytest.raises(RateLimited, match="1 per minute"):
            [piece async for piece in api.ingress.chat(body, caller)]
        half = api.ingress.chat(body, ANONYMOUS)
        await anext(half)
        await half.aclose()
        assert len(released_tokens(api)) == 1
        await api.reported()
        assert [(r.key, r.requests, r.errors) for r in read_usage(usage_path(), LONG_AGO)] == [
            ("alice", 2, 1),
            ("anonymous", 1, 0),
        ]
        counted = series(await api.ledger.ledger.metrics())
        assert [counted["corral_requests_total", ("tiny-llama", "ui", status)] for status in ("200", "429", "499")] == [
            1,
            1,
            1,
        ]

    run(scenario)


def test_who_has_no_limits_waits_for_no_ledger(run: Callable[..., None]) -> None:
    async def scenario(api: Api) -> None:
        api.ledger.away = True
        for caller in (ANONYMOUS, limited()):
            api.caller = caller
            assert (await api.post()).status_code == 200
        assert (api.ledger.called("admit"), api.ledger.called("release")) == ([], [])

    run(scenario)


@pytest.mark.promise("C2")
def test_without_a_ledger_limited_callers_get_503_and_nothing_is_lost(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.accounting.ledger_client._ADMIT_S", 0.3)
    monkeypatch.setattr("deployments.accounting.ledger_client._REPORT_S", 0.3)

    async def scenario(api: Api) -> None:
        api.ledger.away = True
        assert (await api.post()).status_code == 200
        api.caller = limited(rpm=1)
        async with asyncio.timeout(60):  # the ledger would be away for longer
            response = await api.post()
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert (await api.send("GET", "/metrics")).status_code == 503
        await asyncio.sleep(0.5)
        api.ledger.away = False
        assert (await api.post()).status_code == 200
        await api.reported()
        assert len(api.ledger.called("report")) >= 2
        rows = {row.key: (row.requests, row.errors) for row in read_usage(usage_path(), LONG_AGO)}
        assert rows == {"anonymous": (1, 0), "alice": (2, 1)}

    run(scenario)


@pytest.mark.promise("C2")
def test_a_caller_who_leaves_while_the_ledger_decides_holds_no_place(run: Callable[..., None]) -> None:
    async def scenario(api: Api) -> None:
        api.caller = limited(streams=1)
        decide, ledger = asyncio.Event(), api.ledger.ledger
        admit = ledger.admit

        async def slow(*args: Any) -> Any:
            admission = await admit(*args)
            await decide.wait()
            return admission

        ledger.admit = slow
        request = asyncio.ensure_future(api.post())
        while not api.ledger.called("admit"):
            await asyncio.sleep(0.01)
        request.cancel()
        await asyncio.wait({request})
        decide.set()
        await asyncio.sleep(0.05)
        assert released_tokens(api) == [0]
        assert (await api.post()).status_code == 200

    run(scenario)


@pytest.mark.promise("A4")
def test_every_request_is_counted_by_route_and_status(run: Callable[..., None]) -> None:
    async def scenario(api: Api) -> None:
        def nobody() -> Caller:
            raise HTTPException(401, "no key")

        assert (await api.post()).status_code == 200
        assert (await api.post("/v1/completions", messages=None, prompt="hi")).status_code == 200
        assert (await api.send("POST", CHAT, content=b"{")).status_code == 400
        assert (await api.send("POST", CHAT, content=b"x" * 3_000_000)).status_code == 413
        assert (await api.send("GET", "/v1/models/tiny-llama:nobody")).status_code == 404
        for i in range(3):
            assert (await api.send("GET", f"/{i}")).status_code == 404
        api.app.dependency_overrides[get_args(ChatCaller)[1].dependency] = nobody
        assert (await api.post()).status_code == 401
        await api.reported()
        counted = series(await api.ledger.ledger.metrics())
        assert {labels: n for (name, labels), n in counted.items() if name == "corral_requests_total"} == {
            ("tiny-llama", CHAT, "200"): 1,
            ("tiny-llama", "/v1/completions", "200"): 1,
            ("", CHAT, "400"): 1,
            ("", CHAT, "401"): 1,
            ("", "other", "413"): 1,  # refused before it has a route
            ("", "/v1/models/{model_id:path}", "404"): 1,
            ("", "other", "404"): 3,
        }

    run(scenario)


@pytest.mark.promise("A4")
def test_metrics_are_of_the_ledger_and_of_the_model_replicas(run: Callable[..., None]) -> None:
    async def scenario(api: Api) -> None:
        assert (await api.post()).status_code == 200
        await api.reported()
        answer = await api.send("GET", "/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        metrics = series(answer.text)
        assert metrics["corral_generation_tokens_total", ("tiny-llama",)] == NUM_TOKENS
        assert metrics["corral_time_to_first_token_seconds_count", ("tiny-llama",)] == 1
        assert metrics["corral_num_requests_running", ("replica-1",)] == 2
        assert metrics["corral_replicas", ()] == 1

    run(scenario)


def test_reports_go_once_a_second_at_most(run: Callable[..., None]) -> None:
    async def scenario(api: Api) -> None:
        started = time.monotonic()
        for _ in range(40):
            assert (await api.post()).status_code == 200
        await api.reported()
        seconds = time.monotonic() - started
        assert len(api.ledger.called("report")) <= seconds + 1
        (row,) = read_usage(usage_path(), LONG_AGO)
        assert row.requests == 40

    run(scenario)
