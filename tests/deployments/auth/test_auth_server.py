"""Keys on the running server: its first key closes it without a restart, through proxy and page alike (C1, C2, C8)."""

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from clients.api import CorralClient, ServerError
from deployments.auth.keys import KeyStore
from tests.conftest import RunningServer
from tests.deployments.auth.test_auth import status_of

PROMPT = "Is xylophone-quagmire a word?"


@pytest.fixture
def key() -> Iterator[str]:
    """The first key of the session's CORRAL_HOME; afterwards there are none again."""
    store = KeyStore()
    assert not store.required
    yield store.create("laptop", ("chat",))[1]
    store.path.unlink()


def client(server: RunningServer, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.mark.promise("C1")
def test_the_first_key_closes_the_running_server(server: RunningServer, key: str) -> None:
    answer = client(server, key).chat.completions.create(
        model=server.base_model, messages=[{"role": "user", "content": "hi"}], max_tokens=4
    )
    assert answer.usage is not None
    with pytest.raises(openai.AuthenticationError) as exc_info:
        client(server, key[:-1]).models.list()
    assert exc_info.value.code == "invalid_api_key"
    assert exc_info.value.response.headers["www-authenticate"] == "Bearer"
    with pytest.raises(ServerError, match="Authorization: Bearer KEY"), CorralClient(server.url) as keyless:
        keyless.models()
    with CorralClient(server.url, key) as with_key:
        assert with_key.models()[0].id == server.base_model
    for path in ("/healthz", "/readyz"):
        assert httpx.get(f"{server.url}{path}", timeout=120).status_code == 200

    page = httpx.get(server.ui_url, headers={"accept": "text/html"})
    assert (page.status_code, page.headers["location"]) == (303, "/ui/login")
    assert httpx.get(f"{server.ui_url}config").status_code == 401
    with httpx.Client(base_url=server.ui_url) as browser:
        assert browser.post("login", data={"key": key}).headers["location"] == "/ui/"
        assert browser.get("config").status_code == 200


@pytest.mark.promise("C1")
def test_no_odd_request_gets_past_the_proxy(server: RunningServer, key: str) -> None:
    at = urlsplit(server.url)
    assert at.hostname
    assert at.port
    address, host, good = (at.hostname, at.port), b"Host: 127.0.0.1", b"Authorization: Bearer " + key.encode()
    assert status_of(address, b"/v1/models", host, good) == 200
    bad = b"Authorization: Bearer wrong"
    for target in (
        b"/v1/models", b"//v1/models", b"/V1/models", b"/v1/%6dodels", b"/healthz/../v1/models", b"/%2e%2e/v1/models",
        b"/healthz/%2e%2e/v1/models", b"http://127.0.0.1/v1/models", b"/docs", b"/redoc", b"/openapi.json",
        b"/ui/config", b"/ui//config", b"/ui/gradio_api/info", b"/ui/%2e%2e/v1/models", b"/ui/../v1/models",
        b"/UI/config",
    ):  # fmt: skip
        for headers in ([host], [b"Host: "], [b"Host: a@b"], [], [host, bad], [host, good, bad], [host, good, good]):
            assert status_of(address, target, *headers) != 200, (target, headers)


@pytest.mark.promise("C1")
def test_ray_serves_own_routes_tell_no_more_than_where_applications_are(server: RunningServer, key: str) -> None:
    at = urlsplit(server.url)
    root = f"http://{at.netloc}"
    assert httpx.get(f"{root}/-/healthz").text.strip('"') == "success"
    assert httpx.get(f"{root}/-/routes").json() == {"/": "corral", "/ui": "corral-ui"}


@pytest.mark.promise("C8")
def test_neither_keys_nor_prompts_are_in_the_logs(server: RunningServer, key: str) -> None:
    secret = key.split("-", 3)[3]
    ask = {"model": server.base_model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
    for bearer, body in ((key, ask), (key[:-1], ask), (key, ask | {"stop": 5}), (key, ask | {"model": "nobody"})):
        headers = {"authorization": f"Bearer {bearer}"}
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=120)
        assert secret[:-1] not in response.text
        assert PROMPT not in response.text or response.status_code == 200
    httpx.post(f"{server.ui_url}login", data={"key": key[:-1]})
    store = KeyStore()
    content = store.path.read_bytes()
    store.path.write_text("{")  # an error is what makes the replicas write their logs
    try:
        assert httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 500
        assert httpx.get(f"{server.ui_url}config").status_code == 500
    finally:
        store.path.write_bytes(content)
    logs = [path for path in Path(os.environ["RAY_TMPDIR"]).rglob("*") if path.is_file() and "logs" in path.parts]
    log_text = "".join(path.read_text(errors="replace") for path in [*logs, server.log])
    assert log_text.count("keys.json is broken") >= 2
    assert "/v1/chat/completions" in log_text
    assert secret[:-1] not in log_text
    assert "xylophone-quagmire" not in log_text
