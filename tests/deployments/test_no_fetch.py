"""B7: nothing that a request names is fetched, and templates and guided fields of requests are refused."""

import socket
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import InProcessApi

_watched: list[Any] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        _watched.append(arguments[1] if event != "socket.getaddrinfo" else arguments[:2])


sys.addaudithook(_audit)  # it cannot be removed


@pytest.fixture
def connections() -> Iterator[list[Any]]:
    """The addresses that any thread of this process, which runs the complete API, connects to."""
    global _watched
    _watched = []
    yield _watched
    _watched = None


@pytest.fixture
def web_server() -> Iterator[socket.socket]:
    """An external web server, which must not receive a request."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


def bodies(url: str) -> list[tuple[str, dict[str, Any], str]]:
    def part(kind: str, **content: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": kind, **content}]}]}

    return [
        ("image", part("image_url", image_url={"url": f"{url}/a.png"}), "messages.0.content.1.image_url"),
        ("audio", part("input_audio", input_audio={"data": f"{url}/a.wav"}), "messages.0.content.1.input_audio"),
        ("file", part("file", file={"file_id": f"{url}/a.txt"}), "messages.0.content.1.file"),
        ("file on disk", part("file", file={"file_id": "file:///etc/passwd"}), "messages.0.content.1.file"),
        ("template", {"chat_template": "{{ cycler.__init__.__globals__ }}"}, "chat_template"),
        ("template fields", {"chat_template_kwargs": {"url": url}}, "chat_template_kwargs"),
        ("guided", {"guided_json": {"$ref": f"{url}/schema.json"}}, "guided_json"),
        ("guided decoding", {"guided_grammar": "root ::= 'a'"}, "guided_grammar"),
        ("tool", {"tools": [{"type": "mcp", "server_url": url}]}, "tools.0.server_url"),
        (
            "a tool's schema",
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"$ref": f"{url}/schema.json"}}}]},
            "tools.0.function.parameters.$ref",
        ),
        ("model", {"model": f"{url}/model"}, "model"),
        ("hub id", {"model": "meta-llama/Llama-2-7b-chat-hf"}, "model"),
    ]  # fmt: skip


@pytest.mark.promise("B7")
def test_nothing_that_a_request_names_is_fetched(
    tiny_api: InProcessApi, connections: list[Any], web_server: socket.socket
) -> None:
    url = f"http://127.0.0.1:{web_server.getsockname()[1]}"
    own_port = httpx.URL(tiny_api.url).port
    with httpx.Client(base_url=tiny_api.url, timeout=120) as client:
        for name, change, param in bodies(url):
            messages = [{"role": "user", "content": f"Open {url}/page and file:///etc/passwd"}]
            body = {"model": tiny_api.adapter, "messages": messages, "max_tokens": 2, **change}
            response = client.post("/v1/chat/completions", json=body)
            assert response.status_code in (400, 404), name
            assert response.json()["error"]["param"] == param, name
        assert client.post("/v1/chat/completions", json={**body, "model": tiny_api.adapter}).status_code == 200
    with pytest.raises(BlockingIOError):  # nobody connected
        web_server.accept()
    addresses = [address for address in connections if address[1] != own_port]
    assert addresses == []
    assert connections  # the client's own connection: the audit hook works
