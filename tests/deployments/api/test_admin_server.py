"""Canary and rollback (A5), request ids (A8) and what is logged (C8), on a real server."""

import json
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import RunningServer
from training.base_models.resolve import BaseCheckpoint
from training.registry.aliases import draw
from training.registry.manifest import AdapterManifest
from training.registry.promotion import AdapterPromoter
from training.registry.publish import import_adapter
from training.registry.registry import AdapterRegistry

USERS = [f"user-{number}" for number in range(100)]
NAME = "canary-test"


@pytest.fixture(scope="module")
def model(server: RunningServer, quickstart: AdapterManifest, embedded_base: BaseCheckpoint) -> Iterator[str]:
    """Two versions of an adapter, the first of them the champion."""
    registry = AdapterRegistry()
    for _ in range(2):
        folder = registry.fetch(quickstart)
        import_adapter(registry, folder, NAME, embedded_base, chat_format=quickstart.chat_format, force=True)
    AdapterPromoter(registry).promote(NAME, 1)
    yield f"{embedded_base.name}:{NAME}"
    registry.storage.remove_folder(NAME)


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as http:
        yield http


def ask(http: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}
    return http.post("/v1/chat/completions", json=body | fields)


@pytest.mark.promise("A5")
def test_a_tenth_of_the_users_get_the_canary_until_it_is_rolled_back(http: httpx.Client, model: str) -> None:
    def answered_by(user: str) -> str:
        return str(ask(http, model, user=user).json()["model"])

    def answered() -> dict[str, str]:
        with ThreadPoolExecutor(8) as pool:
            return dict(zip(USERS, pool.map(answered_by, USERS), strict=True))

    champion, canary = f"{model}@1", f"{model}@2"
    started = http.post(f"/v1/adapters/{NAME}/promote", json={"version": 2, "percent": 10})
    assert started.json()["canary"] == {"version": 2, "percent": 10}
    drawn = {user: canary if draw(NAME, 1, 2, f"user {user}") < 10 else champion for user in USERS}
    assert 2 <= list(drawn.values()).count(canary) <= 20  # P = 0.9995 for another choice of 100 users
    assert answered() == drawn

    shares = {m["id"]: m["canary_percent"] for m in http.get("/v1/models").json()["data"]}
    assert (shares[champion], shares[canary]) == (None, 10)

    http.post(f"/v1/adapters/{NAME}/rollback")
    canary_users = [user for user in USERS if drawn[user] == canary]
    deadline = time.monotonic() + 300
    while canary in {answered_by(user) for user in canary_users}:
        assert time.monotonic() < deadline
    assert set(answered().values()) == {champion}


@pytest.mark.promise("A8")
def test_every_answer_has_a_request_id_the_clients_own_if_it_sent_one(server: RunningServer, model: str) -> None:
    def requests(http: httpx.Client) -> Iterator[tuple[int, httpx.Response]]:
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        yield 200, http.post("/v1/chat/completions", json=body)
        yield 200, http.post("/v1/chat/completions", json=body | {"stream": True})
        yield 200, http.get("/healthz")
        yield 200, http.get("/docs")
        yield 400, http.post("/v1/chat/completions", content=b"{")
        yield 404, http.post("/v1/chat/completions", json=body | {"model": "x"})
        yield 404, http.get("/nope")
        yield 404, http.get("/v1/adapters/nobody")
        yield 405, http.put("/tokenize", json={})
        yield 413, http.post("/tokenize", content=b"x" * 3_000_000)

    with httpx.Client(base_url=server.url, timeout=120) as http:
        drawn = []
        for status, answer in requests(http):
            assert answer.status_code == status, answer.text
            drawn.append(answer.headers["x-request-id"])
        assert len(set(drawn)) == len(drawn)
        http.headers["x-request-id"] = "mine-7"
        for _, answer in requests(http):
            assert answer.headers.get_list("x-request-id") == ["mine-7"]


@pytest.mark.promise("C8")
def test_changes_are_in_the_audit_log_and_prompts_answers_and_keys_in_no_log(
    server: RunningServer, http: httpx.Client, model: str
) -> None:
    prompt, key, request_id = f"prompt-{uuid.uuid4().hex}", f"key-{uuid.uuid4().hex}", f"request-{uuid.uuid4().hex}"
    http.headers["authorization"] = f"Bearer {key}"
    messages = [{"role": "user", "content": f"Write a story about {prompt}."}]
    answer = ask(http, model, messages=messages, max_tokens=24).json()["choices"][0]["message"]["content"]
    assert len(answer) > 20
    assert ask(http, model, messages=messages, stream=True, max_tokens=24).status_code == 200
    ask(http, model, messages=messages, temperature=prompt)
    ask(http, f"{model}@{prompt}")
    http.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": 1})
    http.post("/v1/completions", content=json.dumps({"model": model, "prompt": prompt})[:-1])
    http.post("/tokenize", json={"prompt": prompt})
    with (
        httpx.Client(base_url=server.url) as leaving,
        leaving.stream("POST", "/v1/chat/completions", json={"model": model, "messages": messages, "stream": True}),
    ):
        pass
    assert http.post(
        f"/v1/adapters/{NAME}/promote", json={"version": 2}, headers={"x-request-id": request_id}
    ).is_success
    assert http.delete(f"/v1/adapters/{NAME}/versions/2").status_code == 409
    for _ in range(1100):  # Ray writes a replica's lines when it has a thousand, or an error
        http.get("/healthz")
    del http.headers["authorization"]

    home, sessions = Path(os.environ["CORRAL_HOME"]), Path(os.environ["RAY_TMPDIR"])
    *_, promoted, refusal = [json.loads(line) for line in (home / "audit.jsonl").read_text().splitlines()]
    assert (promoted["action"], promoted["target"], promoted["outcome"]) == ("promote", NAME, "done")
    assert (promoted["before"], promoted["after"]) == ({"version": 1}, {"version": 2})
    assert (refusal["action"], refusal["target"], refusal["outcome"]) == ("delete", f"{NAME}@2", "refused")

    logs = [server.log, home / "audit.jsonl", *(p for p in sessions.rglob("*") if p.is_file() and "logs" in p.parts)]
    texts = {path: path.read_text(errors="replace") for path in logs}
    accesses = [line for text in texts.values() for line in text.splitlines() if request_id in line]
    assert any("/promote" in line for line in accesses), [str(path) for path in texts]
    assert any('"action": "promote"' in line for line in accesses)
    for secret in (prompt, answer, answer[:30], key):
        assert [str(path) for path, text in texts.items() if secret in text] == []
