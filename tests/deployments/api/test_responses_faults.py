"""Responses of several keys, and what happens to them when the engine or the store fails, or a client goes away.

The ingress and the store are real, in this process; the model replica is scripted to fail and wait on request.
"""

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from deployments.accounting.usage import read_usage, usage_path
from deployments.auth.caller import KeyLimits
from deployments.auth.keys import KeyStore
from deployments.config import ServeArgs, StoredResponsesArgs
from deployments.engine.request import Delta
from deployments.errors import EngineFault
from deployments.replica.request import GenerationRequest
from deployments.responses.store import responses_path
from tests.conftest import wait_until
from tests.deployments.accounting.test_usage import LONG_AGO
from tests.deployments.api.test_responses import events_of
from tests.deployments.in_process import behind, serving
from training.base_models.resolve import BaseCheckpoint

NUM_TOKENS = 6


class Replica:
    """A model replica: `NUM_TOKENS` times the same token, or a fault before token `fails_at`."""

    def __init__(self) -> None:
        self.fails_at: int | None = None
        self.pause_s = 0.0
        self.num_requests = 0
        self.num_open = 0

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        self.num_requests += 1
        self.num_open += 1
        try:
            for i in range(NUM_TOKENS):
                if i == self.fails_at:
                    raise EngineFault("it broke")
                await asyncio.sleep(self.pause_s)
                yield [Delta([28], "stop" if i + 1 == NUM_TOKENS else None)]
        finally:
            self.num_open -= 1


class FlakyStore:
    """The owner of stored responses, whose calls fail while they are in `failing`."""

    def __init__(self) -> None:
        from deployments.responses.deployment import StoredResponses

        self._stored = behind(StoredResponses, StoredResponsesArgs())
        self.failing: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            if name in self.failing:
                raise sqlite3.OperationalError("disk I/O error")
            return await getattr(self._stored, name)(*arguments)

        return call


@dataclass
class Api:
    url: str
    model: str
    replica: Replica
    store: FlakyStore

    def body(self, **changes: Any) -> dict[str, Any]:
        return {"model": self.model, "input": "Say hi.", **changes}

    def post(self, key: str | None = None, **changes: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/responses", json=self.body(**changes), headers=bearer(key), timeout=60)

    def get(self, path: str, key: str | None = None, method: str = "GET") -> httpx.Response:
        return httpx.request(method, f"{self.url}/v1/responses/{path}", headers=bearer(key), timeout=60)


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


@pytest.fixture
def api(tiny_base: BaseCheckpoint) -> Iterator[Api]:
    replica, store = Replica(), FlakyStore()
    with serving(ServeArgs(base_model=str(tiny_base.path)), replica, store) as url:
        yield Api(url, tiny_base.name, replica, store)


@pytest.fixture
def keys() -> Iterator[KeyStore]:
    store = KeyStore()
    assert not store.required
    yield store
    store.path.unlink()


def num_stored() -> int:
    with sqlite3.connect(responses_path()) as db:
        return int(db.execute("SELECT count(*) FROM responses").fetchone()[0])


@pytest.mark.promise("F3")
def test_a_response_is_its_keys_alone(api: Api, keys: KeyStore) -> None:
    without_key = api.post().json()
    alice, bob = (keys.create(name, ("chat",))[1] for name in ("alice", "bob"))
    response = api.post(alice).json()
    path, (message,) = response["id"], response["output"]
    assert api.get(path, alice).json() == response
    unknown = api.get("resp_unknown", bob)
    for method, suffix in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
        refused = api.get(path + suffix, bob, method)
        assert refused.status_code == 404
        assert refused.json() == json.loads(unknown.text.replace("resp_unknown", path))
    for changes in ({"previous_response_id": path}, {"input": [{"id": message["id"]}]}):
        refused = api.post(bob, **changes)
        never_was = api.post(bob, **json.loads(json.dumps(changes).replace(path, "resp_0").replace("msg_", "msg_0")))
        assert refused.status_code == never_was.status_code in (400, 404)
        assert refused.json()["error"]["code"] == never_was.json()["error"]["code"]
    assert api.get(without_key["id"], alice).status_code == 404
    assert api.post(alice, previous_response_id=path).status_code == 200
    assert api.get(path, alice, "DELETE").status_code == 200


@pytest.mark.promise("F3")
def test_a_key_takes_back_nothing_that_a_client_sends_as_anothers(api: Api, keys: KeyStore) -> None:
    alice, bob = (keys.create(name, ("chat",))[1] for name in ("alice", "bob"))
    (message,) = api.post(alice).json()["output"]
    forged = {**message, "content": [{"type": "output_text", "text": "Something else."}]}
    response = api.post(bob, input=[forged, {"role": "user", "content": "Go on."}]).json()
    assert api.get(f"{response['id']}/input_items", bob).json()["data"][1]["id"] == message["id"]
    items = api.get(f"{api.post(alice, input=[{'id': message['id']}]).json()['id']}/input_items", alice).json()
    assert items["data"] == [message]


@pytest.mark.promise("F3")
@pytest.mark.parametrize("stream", [False, True])
def test_without_a_store_nothing_is_generated_unless_nothing_is_to_be_stored(api: Api, stream: bool) -> None:
    api.store.failing = {"earlier", "get", "delete"}
    refused = api.post(stream=stream)
    assert refused.status_code == 503
    assert "store: false" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"] == "1"
    assert api.replica.num_requests == 0
    assert api.post(store=False, stream=stream).status_code == 200
    assert api.post(store=False, previous_response_id="resp_1").status_code == 503
    assert api.get("resp_1").status_code == 503
    api.store.failing = set()
    assert api.post(stream=stream).status_code == 200


@pytest.mark.promise("F3")
def test_a_response_that_could_not_be_stored_is_never_said_to_be_complete(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.responses.client._ADD_S", 1.0)
    api.store.failing = {"add"}
    assert api.post().status_code == 503
    events = events_of(api.post(stream=True))
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["code"] == "server_error"
    assert api.get(events[-1]["response"]["id"]).status_code == 404


@pytest.mark.promise("F3")
def test_a_store_that_comes_back_in_time_gets_the_response(api: Api) -> None:
    api.store.failing = {"add"}
    api.replica.pause_s = 0.1
    with httpx.stream("POST", f"{api.url}/v1/responses", json=api.body(stream=True), timeout=60) as stream:
        text = ""
        for part in stream.iter_text():
            text += part
            if "response.output_item.done" in text:
                api.store.failing = set()
    assert "response.completed" in text
    response_id = json.loads(text.split("data: ")[1].splitlines()[0])["response"]["id"]
    assert api.get(response_id).json()["status"] == "completed"


@pytest.mark.promise("F3")
def test_an_engine_that_fails_ends_the_stream_with_what_there_is(api: Api) -> None:
    api.replica.fails_at = 3
    before = num_stored()
    assert api.post().status_code == 500
    events = events_of(api.post(stream=True))
    last = events[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"] == {"code": "server_error", "message": "it broke"}
    assert last["response"]["output"][0]["status"] == "incomplete"
    assert last["response"]["output"][0]["content"][0]["text"] == "".join(
        event["delta"] for event in events if "delta" in event
    )
    assert last["response"]["usage"]["output_tokens"] == 3
    api.replica.fails_at = 0
    assert api.post(stream=True).status_code == 500  # before the first byte
    assert num_stored() == before


@pytest.mark.promise("F3")
def test_what_a_client_abandons_ends_and_is_not_stored(api: Api) -> None:
    api.replica.pause_s = 0.2
    before = num_stored()
    with httpx.stream("POST", f"{api.url}/v1/responses", json=api.body(stream=True), timeout=60) as stream:
        lines = stream.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))
        next(line for line in lines if "output_text.delta" in line)
        lines.close()
    wait_until(lambda: api.replica.num_open == 0)
    time.sleep(0.3)
    assert num_stored() == before
    assert api.get(json.loads(first.removeprefix("data: "))["response"]["id"]).status_code == 404


@pytest.mark.promise("F3")
def test_limits_and_usage_are_those_of_every_other_route(api: Api, keys: KeyStore) -> None:
    key = keys.create("one a minute", ("chat",), KeyLimits(rpm=1, tpm=1000))[1]
    answer = api.post(key, max_output_tokens=NUM_TOKENS)
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    refused = api.post(key)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1

    def usage() -> list[tuple[int, int, int]]:
        rows = [row for row in read_usage(usage_path(), LONG_AGO) if row.key == "one a minute"]
        return [(row.requests, row.errors, row.completion_tokens) for row in rows]

    wait_until(lambda: usage() == [(2, 1, NUM_TOKENS)], seconds=30)
