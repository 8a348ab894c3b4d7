"""The chat page's login: who is admitted, with which cookie, and that no route of Gradio's is open (C1, C2, C7)."""

import re
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import itsdangerous
import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from deployments.auth.keys import KeyStore
from deployments.ui.deployment import build_asgi_app
from deployments.ui.sessions import SessionMiddleware
from tests.deployments.ui.test_page import ScriptedBackend

URL = "http://localhost:8000"
AS_BROWSER = {"accept": "text/html,application/xhtml+xml"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> KeyStore:
    return KeyStore(tmp_path_factory.mktemp("home") / "keys.json")


@pytest.fixture(scope="module")
def app(stored: KeyStore) -> Any:
    """Built once: Gradio takes its time."""
    return build_asgi_app(ScriptedBackend(), stored, "Corral <1>")


@pytest.fixture
def store(stored: KeyStore) -> Iterator[KeyStore]:
    yield stored
    stored.path.unlink(missing_ok=True)


def browser(app: Any, url: str = URL) -> TestClient:
    return TestClient(app, base_url=url, root_path="/ui", follow_redirects=False)


@pytest.fixture
def client(app: Any) -> TestClient:
    return browser(app)


def log_in(client: TestClient, key: str, **headers: str) -> httpx.Response:
    origin = str(client.base_url).rstrip("/")
    return client.post("/ui/login", data={"key": key}, headers={"origin": origin} | headers)


def gets_in(client: TestClient) -> bool:
    status = client.get("/ui/config").status_code
    assert status in (200, 401)
    return status == 200


def route_paths(app: Any) -> set[tuple[str, str]]:
    """(method, path) of every route behind the login, with a word in place of each parameter."""
    paths: set[tuple[str, str]] = set()
    for route in app.routes:
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        if isinstance(inner, SessionMiddleware):
            inner = inner._app
        if hasattr(inner, "routes") and not getattr(route, "methods", None):
            paths |= route_paths(inner)
        elif methods := getattr(route, "methods", None):
            path = re.sub(r"\{[^}]*\}", "x", route.path)
            paths |= {(method, path) for method in methods}
    return paths


@pytest.mark.promise("C1")
def test_every_route_of_the_page_needs_a_session(app: Any, store: KeyStore) -> None:
    store.create("laptop", ("chat",))
    paths = route_paths(app)
    protected = paths - {("GET", "/login"), ("POST", "/login"), ("POST", "/logout")}
    prefixed = {path if path.startswith("/gradio_api") else f"/gradio_api{path}" for _, path in protected}
    assert {
        f"/gradio_api/{path}" for path in ("queue/join", "queue/data", "heartbeat/x", "upload", "cancel")
    } <= prefixed
    assert len(protected) > 60
    client = browser(app)
    for method, path in [*sorted(protected), ("GET", "/"), ("GET", "/login/"), ("GET", "/LOGIN"), ("GET", "//login")]:
        for full in (f"/ui{path}", f"/ui/gradio_api{path}"):
            response = client.request(method, full)
            assert response.status_code in (401, 405), (method, full)
            assert client.request(method, full, cookies={"corral_session": "x"}).status_code in (401, 405)
    for path in ("/", "/gradio_api/", "/x"):
        redirect = client.get(f"/ui{path}", headers=AS_BROWSER)
        assert (redirect.status_code, redirect.headers["location"]) == (303, "/ui/login")


@pytest.mark.promise("C1")
def test_a_websocket_gets_nowhere(app: Any, store: KeyStore) -> None:
    store.create("laptop", ("chat",))
    with (
        pytest.raises(WebSocketDisconnect),
        browser(app).websocket_connect("/ui/gradio_api/queue/join", {"origin": URL}),
    ):
        pass


@pytest.mark.promise("C1")
def test_logging_in_and_out(client: TestClient, store: KeyStore) -> None:
    assert gets_in(client)  # there are no keys
    assert client.get("/ui/login").headers["location"] == "/ui/"
    record, key = store.create("laptop", ("chat",))
    assert not gets_in(client)
    assert client.get("/ui/login").status_code == 200

    response = log_in(client, f" {key}\n")
    assert (response.status_code, response.headers["location"]) == (303, "/ui/")
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Path=/ui/;" in cookie
    assert "Secure" not in cookie
    assert record.id in cookie
    assert key not in cookie
    assert gets_in(client)
    assert client.get("/ui/login").headers["location"] == "/ui/"

    assert client.post("/ui/logout", headers={"origin": URL}).headers["location"] == "/ui/login"
    assert not gets_in(client)
    assert client.get("/ui/logout").status_code == 401  # a link or an image logs nobody out
    assert client.get("/ui/logout", headers=AS_BROWSER).headers["location"] == "/ui/login"


@pytest.mark.promise("C2")
def test_a_session_ends_with_its_key(client: TestClient, store: KeyStore) -> None:
    record, key = store.create("laptop", ("chat",))
    log_in(client, key)
    assert gets_in(client)
    store.revoke(record.id)
    assert not gets_in(client)

    soon = datetime.now(UTC) + timedelta(seconds=0.5)
    _, key = store.create("guest", ("chat",), expires=soon)
    log_in(client, key)
    assert gets_in(client)
    while datetime.now(UTC) < soon:
        pass
    assert not gets_in(client)


@pytest.mark.promise("C2")
def test_a_session_ends_after_a_day(client: TestClient, store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    _, key = store.create("laptop", ("chat",))
    signed_at = itsdangerous.TimestampSigner.get_timestamp
    monkeypatch.setattr(itsdangerous.TimestampSigner, "get_timestamp", lambda self: signed_at(self) - 24 * 3600 + 60)
    log_in(client, key)
    monkeypatch.undo()
    assert gets_in(client)
    monkeypatch.setattr(itsdangerous.TimestampSigner, "get_timestamp", lambda self: signed_at(self) + 61)
    assert not gets_in(client)


@pytest.mark.promise("C1")
def test_a_cookie_that_we_did_not_sign_is_none(app: Any, client: TestClient, store: KeyStore) -> None:
    entry, key = store.create("laptop", ("chat",))
    other, _ = store.create("boss", ("admin",))
    log_in(client, key)
    cookie = client.cookies["corral_session"]
    assert gets_in(client)
    theirs = itsdangerous.TimestampSigner(b"guess").sign(entry.id).decode()
    for forged in (entry.id, theirs, cookie[:-1], cookie.replace(entry.id, other.id), f"{cookie}x", "", "ü", "." * 99):
        thief = browser(app)
        header = f"corral_session={forged}".encode("latin-1")
        assert thief.get("/ui/config", headers=[(b"cookie", header)]).status_code == 401, forged


@pytest.mark.promise("C2")
def test_sessions_outlive_a_restart_and_their_secret_is_the_owners(client: TestClient, store: KeyStore) -> None:
    _, key = store.create("laptop", ("chat",))
    log_in(client, key)
    secret = store.path.with_name("ui_secret")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert len(secret.read_bytes()) == 32
    restarted = browser(build_asgi_app(ScriptedBackend(), KeyStore(store.path), "Corral"))
    restarted.cookies = client.cookies
    assert gets_in(restarted)
    secret.unlink()
    forgotten = browser(build_asgi_app(ScriptedBackend(), KeyStore(store.path), "Corral"))
    forgotten.cookies = client.cookies
    assert not gets_in(forgotten)


@pytest.mark.promise("C3")
@pytest.mark.parametrize("url", ["https://localhost:8000", "http://localhost:8000"])
def test_the_cookie_is_secure_under_https_also_behind_a_proxy(app: Any, store: KeyStore, url: str) -> None:
    _, key = store.create("laptop", ("chat",))
    assert "Secure" in log_in(browser(app, url), key, origin="https://localhost:8000").headers["set-cookie"]


@pytest.mark.promise("C2")
def test_attempts_are_limited(store: KeyStore, tmp_path: Path) -> None:
    client = browser(build_asgi_app(ScriptedBackend(), store, "Corral"))
    _, key = store.create("laptop", ("chat",))
    for _ in range(10):
        assert log_in(client, "sk-corral-wrong").status_code == 401
    for candidate in ("sk-corral-wrong", key):
        response = log_in(client, candidate)
        assert response.status_code == 429
        assert 0 < int(response.headers["retry-after"]) <= 61
        assert "wait" in response.text
        assert "set-cookie" not in response.headers


@pytest.mark.promise("C7")
def test_the_login_page_loads_nothing_and_repeats_nothing(client: TestClient, store: KeyStore) -> None:
    _, key = store.create("laptop", ("chat",))
    page = client.get("/ui/login", headers=AS_BROWSER)
    assert page.headers["cache-control"] == "no-store"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'self'" in page.headers["content-security-policy"]
    assert "form-action 'self'" in page.headers["content-security-policy"]
    assert not re.search(r"src=|href=|url\(|<script|//", page.text)
    assert "Corral &lt;1&gt;" in page.text
    assert 'action="/ui/login"' in page.text
    for candidate in (key[:-1], "<script>alert(1)</script>", "x" * 10_000, ""):
        response = log_in(client, candidate)
        assert response.status_code == 401
        assert "set-cookie" not in response.headers
        assert candidate == "" or candidate not in response.text
    assert log_in(client, "x" * 3_000_000).status_code == 413


@pytest.mark.promise("C2")
@pytest.mark.parametrize("body", [b"", b"key", b"\xff\xfe", b"&" * 100, b"key=%ff", b"a=b&" * 1000 + b"key=x"])
def test_odd_forms_are_refused(app: Any, store: KeyStore, body: bytes) -> None:
    store.create("laptop", ("chat",))
    client = browser(build_asgi_app(ScriptedBackend(), store, "Corral"))
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/ui/login", content=body, headers=form).status_code == 401


@pytest.mark.promise("C7")
def test_pages_of_other_hosts_neither_log_in_nor_out_nor_use_an_open_page(client: TestClient, store: KeyStore) -> None:
    foreign = {"origin": "http://evil.example"}
    assert client.get("/ui/config", headers=foreign).status_code == 403
    assert client.get("/ui/config", headers={"host": "evil.example"}).status_code == 403  # DNS rebinding
    assert client.get("/ui/login", headers={"host": "evil.example"}).status_code == 403
    _, key = store.create("laptop", ("chat",))
    assert log_in(client, key, **foreign).status_code == 403
    log_in(client, key)
    assert client.post("/ui/logout", headers=foreign).status_code == 403
    assert client.post("/ui/gradio_api/queue/join", json={}, headers=foreign).status_code == 403
    assert gets_in(client)


@pytest.mark.promise("C2")
def test_a_broken_file_lets_nobody_in(client: TestClient, store: KeyStore) -> None:
    _, key = store.create("laptop", ("chat",))
    log_in(client, key)
    store.path.write_text("{")
    for response in (client.get("/ui/config"), client.get("/ui/login"), log_in(client, key)):
        assert response.status_code == 500
        assert "its log has the cause" in response.text
        assert str(store.path) not in response.text
