"""Authentication of the HTTP API: which key is accepted for what, and that every route requires one (C1, C2, C8)."""

import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.routing import Mount
from starlette.testclient import TestClient

from deployments.api.http_app import create_api
from deployments.auth import dependencies
from deployments.auth.caller import ANONYMOUS
from deployments.auth.dependencies import AdminCaller, ChatCaller, key_store
from deployments.auth.keys import KeyStore
from deployments.auth.origin import is_foreign, names_loopback
from tests.conftest import free_port

OPEN_ROUTES = {"/healthz", "/readyz"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyStore]:
    """An empty CORRAL_HOME."""
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path))
    key_store.cache_clear()
    yield KeyStore()
    key_store.cache_clear()


def api() -> FastAPI:
    """The ingress's application, with two routes that report the caller."""
    app = create_api()

    @app.get("/v1/models")
    async def chat(caller: ChatCaller) -> dict[str, str | None]:
        return {"id": caller.key_id, "name": caller.name}

    @app.post("/v1/adapters")
    async def admin(caller: AdminCaller, body: dict[str, int]) -> str:
        return caller.name

    @app.get("/fails")
    async def fails(caller: ChatCaller) -> None:
        raise RuntimeError("broken")

    return app


@pytest.fixture
def client(store: KeyStore) -> TestClient:
    return TestClient(api(), base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def assert_refused(response: httpx.Response, status: int, code: str, *words: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert ("www-authenticate" in response.headers) == (status == 401)
    for word in words:
        assert word in error["message"]


@pytest.mark.promise("C1")
def test_without_keys_everybody_on_this_machine_gets_in(client: TestClient) -> None:
    assert client.get("/v1/models").json() == {"id": None, "name": ANONYMOUS.name}
    assert client.get("/v1/models", headers=bearer("none")).status_code == 200  # OpenAI's client always sends one
    assert client.post("/v1/adapters", json={}).status_code == 200


@pytest.mark.promise("C1")
def test_the_first_key_closes_a_running_server(client: TestClient, store: KeyStore) -> None:
    assert client.get("/v1/models").status_code == 200
    record, key = store.create("laptop", ("chat",))
    assert_refused(client.get("/v1/models"), 401, "invalid_api_key", "Authorization: Bearer KEY")
    assert_refused(client.get("/v1/models", headers=bearer("none")), 401, "invalid_api_key", "corral keys create")
    answer = client.get("/v1/models", headers=bearer(key))
    assert answer.json() == {"id": record.id, "name": "laptop"}
    store.revoke(record.id)
    assert_refused(client.get("/v1/models", headers=bearer(key)), 401, "invalid_api_key", "revoked")


@pytest.mark.promise("C2")
def test_scopes(client: TestClient, store: KeyStore) -> None:
    _, chat = store.create("laptop", ("chat",))
    _, admin = store.create("boss", ("admin",))
    assert_refused(
        client.post("/v1/adapters", json={}, headers=bearer(chat)), 403, "missing_scope", "'laptop'", "'admin'"
    )
    assert client.post("/v1/adapters", json={}, headers=bearer(admin)).json() == "boss"
    assert client.get("/v1/models", headers=bearer(admin)).json()["name"] == "boss"
    assert_refused(client.post("/v1/adapters", json={}), 401, "invalid_api_key")
    assert_refused(client.post("/v1/adapters", json={"a": "no number"}), 401, "invalid_api_key")  # before the body


@pytest.mark.promise("C2")
def test_an_expired_key_says_so(client: TestClient, store: KeyStore) -> None:
    _, key = store.create("guest", ("chat",), expires=datetime.now(UTC) - timedelta(days=1))
    assert_refused(client.get("/v1/models", headers=bearer(key)), 401, "invalid_api_key", "'guest' expired at")


@pytest.mark.promise("C1")
@pytest.mark.parametrize("path", ["/docs", "/docs/start.js", "/docs/swagger-ui.css", "/openapi.json"])
def test_the_documentation_needs_a_key(client: TestClient, store: KeyStore, path: str) -> None:
    assert client.get(path).status_code == 200
    _, key = store.create("laptop", ("chat",))
    assert_refused(client.get(path), 401, "invalid_api_key")
    assert client.get(path, headers=bearer(key)).status_code == 200


@pytest.mark.promise("C1")
def test_without_keys_a_server_that_haproxy_opens_to_others_lets_nobody_in(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for host, status in (("127.0.0.1", 200), ("::1", 200), ("*", 401), ("::", 401), ("10.0.0.7", 401)):
        dependencies._listens_on_loopback.cache_clear()
        monkeypatch.setenv("CORRAL_HAPROXY_BIND", f"{host}:8000 ssl crt /run/tls.crt")
        assert client.get("/v1/models").status_code == status, host
    dependencies._listens_on_loopback.cache_clear()


@pytest.mark.promise("A4")
def test_docs_name_the_schema_under_any_prefix(store: KeyStore) -> None:
    client = TestClient(api(), base_url="http://127.0.0.1", root_path="/llm")
    schema = client.get("/llm/openapi.json").json()
    assert schema["servers"] == [{"url": "/llm"}]
    assert schema["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"


def routes(router: Any) -> Iterator[Any]:
    """Every route, through routers that FastAPI keeps as one node."""
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        yield from routes(inner) if inner is not None else (route,)


def asks_for_a_caller(dependant: Any) -> bool:
    from deployments.auth.dependencies import _chat_caller

    return dependant.call is _chat_caller or any(asks_for_a_caller(inner) for inner in dependant.dependencies)


@pytest.mark.promise("C1")
def test_every_route_of_the_api_asks_for_a_key() -> None:
    from deployments.api.ingress import api as ingress_api

    api_routes = list(routes(ingress_api))
    assert not [route for route in api_routes if isinstance(route, Mount) or not hasattr(route, "dependant")]
    open_routes = {route.path for route in api_routes if not asks_for_a_caller(route.dependant)}
    assert open_routes == OPEN_ROUTES
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/docs", "/openapi.json"} <= {
        route.path for route in api_routes
    }


@pytest.fixture
def address(store: KeyStore) -> Iterator[tuple[str, int]]:
    """The application on a socket, for requests that no client library would send."""
    config = uvicorn.Config(api(), port=free_port(), log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield "127.0.0.1", config.port
    server.should_exit = True
    thread.join(10)


def status_of(address: tuple[str, int], target: bytes, *headers: bytes) -> int:
    """The status that a raw request gets; 0 where the connection is closed without one."""
    with socket.create_connection(address, timeout=120) as connection:
        connection.sendall(b"\r\n".join([b"GET " + target + b" HTTP/1.1", *headers, b"Connection: close", b"", b""]))
        first = connection.makefile("rb").readline()
    return int(first.split()[1]) if first else 0


@pytest.mark.promise("C1")
def test_no_odd_request_gets_in(address: tuple[str, int], store: KeyStore) -> None:
    record, key = store.create("laptop", ("chat",))
    host, good = b"Host: 127.0.0.1", b"Authorization: Bearer " + key.encode()
    assert status_of(address, b"/v1/models", host, good) == 200
    any_case = b"authorization: bearer " + key.encode()  # RFC 9110
    assert status_of(address, b"/v1/models", host, any_case) == 200

    targets = [
        b"/v1/models", b"//v1/models", b"/v1//models", b"/v1/models/", b"/V1/MODELS", b"/v1/%6dodels",
        b"/%76%31/models", b"/healthz/../v1/models", b"/healthz/%2e%2e/v1/models", b"/%2e%2e/v1/models",
        b"/v1/models%00", b"/v1/models;a",
        b"/v1/models?api_key=" + key.encode(), b"/v1/models?path=/healthz", b"/v1/models#/healthz",
        b"http://127.0.0.1/v1/models", b"http://127.0.0.1/healthz@/v1/models", b"/docs", b"//docs", b"/docs/",
        b"/openapi.json", b"/OPENAPI.json",
    ]  # fmt: skip
    hosts = [
        [host], [b"Host: localhost"], [b"Host: "], [], [b"Host: 127.0.0.1/healthz?"], [b"Host: 127.0.0.1@evil"],
        [b"Host: a\tb"], [b"Host: \xff"], [host, b"Host: evil"], [host, b"X-Forwarded-Host: localhost"],
        [host, b"X-Forwarded-Prefix: /healthz"], [host, b"X-Original-URL: /healthz"], [host, b"Origin: http://127.0.0.1"],
    ]  # fmt: skip
    for target in targets:
        for headers in hosts:
            assert status_of(address, target, *headers) != 200, (target, headers)

    wrong = [
        b"Bearer", b"Bearer ", b"bearer wrong", b"Bearer none", b"Basic " + key.encode(), key.encode(),
        b"Bearer" + key.encode(), b"Bearer " + key.upper().encode(), b"Bearer Bearer " + key.encode(),
        b"Bearer " + key.encode() + b", Bearer x", b"Bearer " + key.encode() + b" x", b"Bearer \xc3\xbc",
        b"Bearer \xff", b"Bearer " + record.id.encode(), b"Bearer " + record.sha256.encode(),
        b"Bearer " + key[:-1].encode(), b"Token " + key.encode(), b"Bearer\x0b" + key.encode(),
    ]  # fmt: skip
    for value in wrong:
        assert status_of(address, b"/v1/models", host, b"Authorization: " + value) in (400, 401), value
    bad = b"Authorization: Bearer wrong"
    for pair in ((good, good), (good, bad), (bad, good)):  # two headers are ambiguous
        assert status_of(address, b"/v1/models", host, *pair) == 401


@pytest.mark.promise("C1")
@pytest.mark.parametrize(
    ("headers", "word"),
    [
        ({"origin": "http://evil.example"}, "pages of other hosts"),
        ({"origin": "http://127.0.0.1:8001"}, "pages of other hosts"),
        ({"origin": "null"}, "pages of other hosts"),
        ({"host": "evil.example:8000"}, "127.0.0.1 and localhost only"),
        ({"host": "127.0.0.1.evil.example"}, "127.0.0.1 and localhost only"),
        ({"host": "evil.example", "origin": "http://evil.example"}, "127.0.0.1 and localhost only"),
    ],
)
def test_without_keys_pages_of_other_hosts_do_not_get_in(
    client: TestClient, headers: dict[str, str], word: str
) -> None:
    assert_refused(client.get("/v1/models", headers=headers), 403, "origin_refused", word, "corral keys create")
    assert_refused(client.post("/v1/adapters", json={}, headers=headers), 403, "origin_refused")
    own = {"origin": "http://localhost:8000", "host": "localhost:8000"}
    assert client.get("/v1/models", headers=own).status_code == 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.0.0.1:8000", True), ("LOCALHOST:1", True), ("localhost", True), ("[::1]:8000", True),
        ("127.9.9.9", True), ("", False), ("localhost.evil.example", False), ("evil@localhost", False),
        ("localhost@evil", False), ("localhost/x", False), ("localhost?", False), ("0.0.0.0", False), ("[::1", False),
        ("localhost:x", True), ("10.0.0.1", False), ("::1", False), ("localhost\tx", False), ("2130706433", False),
    ],
)  # fmt: skip
@pytest.mark.promise("C1")
def test_loopback_names(host: str, expected: bool) -> None:
    assert names_loopback(host) is expected


@pytest.mark.promise("C7")
def test_an_origin_that_cannot_be_parsed_is_foreign() -> None:
    assert is_foreign({"origin": "http://[", "host": "localhost"})
    assert not is_foreign({"host": "localhost"})


@pytest.mark.promise("C2")
def test_a_broken_file_lets_nobody_in_and_tells_the_log(
    client: TestClient, store: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    _, key = store.create("laptop", ("chat",))
    store.path.write_text("{")
    for headers in ({}, bearer(key)):
        response = client.get("/v1/models", headers=headers)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "keys_unreadable"
        assert str(store.path) not in response.text
    assert client.get("/docs").status_code == 500
    assert f"{store.path} is broken" in caplog.text


@pytest.mark.promise("C8")
def test_a_key_is_in_no_answer_and_in_no_log(
    client: TestClient, store: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("ray.serve").addHandler(caplog.handler)  # it passes nothing on to the root
    record, key = store.create("laptop", ("chat",))
    secret = key.partition(record.id)[2]
    sent = [key, key[:-1], key.upper(), f"{key} x", key.replace(record.id, "0" * 10)]
    answers = [client.get("/v1/models", headers=bearer(text)) for text in sent]
    answers += [client.get("/v1/models", headers={"authorization": text}) for text in sent]
    json_type = {"content-type": "application/json"}
    answers += [client.get("/fails", headers=bearer(key)), client.post("/v1/adapters", json={}, headers=bearer(key))]
    answers += [client.post("/v1/adapters", content="{", headers=bearer(key) | json_type)]
    store.revoke(record.id)
    answers += [client.get("/v1/models", headers=bearer(key))]
    store.path.write_text("{")
    answers += [client.get("/v1/models", headers=bearer(key))]
    assert {answer.status_code for answer in answers} == {200, 400, 401, 403, 500}
    assert "/fails failed" in caplog.text
    for text in [caplog.text, *(answer.text + str(answer.headers) for answer in answers)]:
        assert secret[:-2].lower() not in text.lower()


def test_keys_are_importable_without_torch_and_ray() -> None:
    code = "import sys, deployments.auth.keys; print(sorted({'torch', 'ray', 'fastapi'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
