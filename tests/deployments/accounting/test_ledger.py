"""The ledger on a real server with two replicas of the API: limits hold over both, usage is exact, crashes are survived
(C2, A4). The tests run in this order: the last two kill processes of the server.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from deployments.accounting.usage import UsageRow, read_usage, usage_path
from deployments.auth.caller import KeyLimits
from deployments.auth.keys import KeyStore
from tests.conftest import descendants, serve_config, start_server, stop_server, wait_until
from tests.deployments.accounting.test_metrics import series
from tests.deployments.accounting.test_usage import LONG_AGO
from training.base_models.resolve import BaseCheckpoint

pytestmark = pytest.mark.slow


@dataclass
class Server:
    url: str
    pid: int
    base: str

    def key(self, name: str, **limits: int) -> str:
        return KeyStore().create(name, ("chat",), KeyLimits(**limits))[1]

    def body(self, **changes: Any) -> dict[str, Any]:
        return {"model": self.base, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **changes}

    def post(self, key: str, **changes: Any) -> httpx.Response:
        url, headers = f"{self.url}/v1/chat/completions", {"authorization": f"Bearer {key}"}
        return httpx.post(url, json=self.body(ignore_eos=True, **changes), headers=headers, timeout=120)

    def stream(self, up: ExitStack, key: str) -> httpx.Response:
        """A long stream that has started; it is closed with `up`."""
        url, headers = f"{self.url}/v1/chat/completions", {"authorization": f"Bearer {key}"}
        body = self.body(ignore_eos=True, stream=True, max_tokens=480, n=8)
        response = up.enter_context(httpx.stream("POST", url, json=body, headers=headers, timeout=120))
        if response.status_code == 200:
            lines = response.iter_lines()
            next(lines)
            up.callback(lines.close)  # an unreferenced generator would close the connection
        return response

    def kill(self, deployment: str) -> None:
        pids = descendants(self.pid, f"ServeReplica:corral:{deployment}")
        assert pids
        for process in pids:
            os.kill(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tiny_base: BaseCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Keys are created while it runs, in a CORRAL_HOME of its own, since the first key closes a server."""
    content = serve_config()
    application = content["applications"][0]
    application["args"] = {"base_model": str(tiny_base.path), "engine": {"max_model_len": 512}}
    application["deployments"].append({"name": "ChatIngress", "num_replicas": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORRAL_HOME", str(tmp_path_factory.mktemp("home")))
        process, running = start_server(content, tmp_path_factory.mktemp("server"))
        yield Server(running.url, process.pid, tiny_base.name)
        assert stop_server(process) == 0, running.log.read_text()[-4000:]


def usage_of(name: str) -> UsageRow:
    nothing = UsageRow(None, None, name, None, 0, 0, 0, 0, 0)
    return next((row for row in read_usage(usage_path(), LONG_AGO) if row.key == name), nothing)


@pytest.mark.promise("C2")
def test_a_limit_holds_over_all_replicas_of_the_api(server: Server) -> None:
    key = server.key("six a minute", rpm=6)
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: server.post(key), range(20)))
    assert sorted(answer.status_code for answer in answers) == [200] * 6 + [429] * 14
    for refusal in (answer for answer in answers if answer.status_code == 429):
        assert 1 <= int(refusal.headers["retry-after"]) <= 61
        assert refusal.headers["x-ratelimit-remaining-requests"] == "0"
    wait_until(lambda: usage_of("six a minute").requests == 20)
    with closing(sqlite3.connect(usage_path())) as db:
        assert db.execute("SELECT count(*) FROM reports").fetchone() == (2,)  # both have served some


@pytest.mark.promise("C2")
def test_requests_at_a_time_hold_over_all_replicas_and_end_with_their_client(server: Server) -> None:
    key = server.key("two at a time", streams=2)
    with ExitStack() as first, ExitStack() as second:
        assert server.stream(first, key).status_code == server.stream(second, key).status_code == 200
        with ThreadPoolExecutor(4) as pool:  # at once: the streams end some time
            refusals = [*pool.map(lambda _: server.post(key), range(4))]
        assert [answer.status_code for answer in refusals] == [429] * 4
        assert "limit on concurrent requests is reached (2)" in refusals[0].json()["error"]["message"]
        first.close()
        wait_until(lambda: server.post(key).status_code == 200)
    for _ in range(5):  # sequential requests pass
        assert server.post(key, stream=True).status_code == 200


def test_usage_is_exact_and_live_in_the_file_and_in_metrics(server: Server) -> None:
    key = server.key("alice")
    answers = [server.post(key, max_tokens=n).json()["usage"] for n in (1, 2, 3)]
    assert server.post(key, temperature=3).status_code == 400  # names no model yet
    assert server.post(key, messages=[]).status_code == 400
    wait_until(lambda: usage_of("alice").requests == 4)
    row = usage_of("alice")
    assert (row.model, row.errors) == (server.base, 1)
    assert row.prompt_tokens == sum(answer["prompt_tokens"] for answer in answers)
    assert row.completion_tokens == sum(answer["completion_tokens"] for answer in answers) == 6
    command = [sys.executable, "-m", "clients.cli", "usage", "--json", "--by", "key"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert next(entry for entry in report if entry["key"] == "alice")["completion_tokens"] == 6

    headers = {"authorization": f"Bearer {key}"}
    assert httpx.get(f"{server.url}/metrics", timeout=120).status_code == 401
    metrics = series(httpx.get(f"{server.url}/metrics", headers=headers, timeout=120).text)
    assert metrics["corral_key_requests_total", ("alice",)] >= 4
    assert metrics["corral_key_generation_tokens_total", ("alice",)] == 6
    assert metrics["corral_requests_total", (server.base, "/v1/chat/completions", "429")] >= 18
    assert metrics["corral_replicas", ()] == 1
    assert next(value for (name, _), value in metrics.items() if name == "corral_prefix_cache_queries_total") > 0


@pytest.mark.promise("C2")
def test_the_ledger_dies_limited_callers_wait_and_nobody_else_notices(server: Server) -> None:
    limited, free = server.key("limited", rpm=1000), server.key("free")
    assert server.post(limited).status_code == server.post(free).status_code == 200
    wait_until(lambda: usage_of("limited").requests == usage_of("free").requests == 1)
    server.kill("Ledger")
    num_limited = num_free = 1
    num_refused = 0
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        answer = server.post(limited)
        num_limited += 1
        if answer.status_code == 200 and num_refused:
            break
        if answer.status_code == 503:
            num_refused += 1
            assert answer.headers["retry-after"] == "1"
            assert "limits" in answer.json()["error"]["message"]
        assert server.post(free).status_code == 200
        num_free += 1
    assert num_refused
    assert server.post(limited).status_code == 200
    num_limited += 1
    wait_until(lambda: (usage_of("limited").requests, usage_of("free").requests) == (num_limited, num_free))
    assert usage_of("limited").errors == num_refused
    assert usage_of("free").errors == 0


@pytest.mark.promise("C2")
def test_what_a_killed_replica_of_the_api_left_running_frees_its_place(server: Server) -> None:
    key = server.key("one at a time", streams=1)
    with ExitStack() as up:
        assert server.stream(up, key).status_code == 200
        assert server.post(key).status_code == 429
        server.kill("ChatIngress")

        def passes() -> bool:
            try:
                return server.post(key).status_code == 200
            except httpx.HTTPError:
                return False

        wait_until(passes)
