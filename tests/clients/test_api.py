"""clients.api against the real server: text in, text out, and the server's own error messages."""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from clients.api import CorralClient, ServerError, is_loopback
from tests.conftest import RunningServer, free_port
from training.chat.messages import Message
from training.errors import CorralError


@pytest.fixture
def client(server: RunningServer) -> Iterator[CorralClient]:
    with CorralClient(server.url) as client:
        yield client


def test_a_stream_has_the_text_of_the_whole_answer(client: CorralClient, server: RunningServer) -> None:
    for model in (server.base_model, server.adapter):
        pieces = list(client.stream("What is the capital of France?", model=model, temperature=0, max_tokens=16))
        answer = client.chat("What is the capital of France?", model=model, temperature=0, max_tokens=16)
        assert len(pieces) > 1
        assert "".join(pieces) == answer


def test_dialogs_go_over_whole(client: CorralClient, server: RunningServer) -> None:
    dialog = [
        Message("system", "You are brief."),
        Message("user", "My name is Ada."),
        Message("assistant", "Hello Ada."),
        Message("user", "What is my name?"),
    ]
    assert "Ada" in client.chat(dialog, model=server.base_model, temperature=0, max_tokens=24)


def test_models_has_the_base_first_and_the_adapter(client: CorralClient, server: RunningServer) -> None:
    base, *adapters = client.models()
    assert base.id == server.base_model
    assert base.parent is None
    assert any(model.id.startswith(f"{server.adapter}@") and model.parent == base.id for model in adapters)


@pytest.mark.promise("B6")
def test_an_unknown_model_is_named_with_the_nearest(client: CorralClient) -> None:
    for call in (client.chat, lambda *a, **k: list(client.stream(*a, **k))):
        with pytest.raises(ServerError, match="smollm2-135m") as exc_info:
            call("hi", model="smollm2-135")
        assert isinstance(exc_info.value, CorralError)
        assert (exc_info.value.status, exc_info.value.code) == (404, "model_not_found")


@pytest.mark.promise("B2")
def test_an_out_of_range_field_is_named(client: CorralClient, server: RunningServer) -> None:
    with pytest.raises(ServerError, match="temperature") as exc_info:
        client.chat("hi", model=server.base_model, temperature=9)
    assert (exc_info.value.status, exc_info.value.param) == (400, "temperature")


@pytest.mark.promise("B8")
def test_a_lone_surrogate_is_answered_or_refused(client: CorralClient, server: RunningServer) -> None:
    with contextlib.suppress(ServerError):
        client.chat("a \ud800 b", model=server.base_model, max_tokens=4).encode()
        return
    with pytest.raises(ServerError) as exc_info:
        client.chat("a \ud800 b", model=server.base_model, max_tokens=4)
    assert exc_info.value.status == 400


def test_a_url_may_end_in_v1(server: RunningServer) -> None:
    with CorralClient(f"{server.url}/v1/") as client:
        assert client.models()


def test_no_server_says_how_to_start_one() -> None:
    with (
        CorralClient(f"http://127.0.0.1:{free_port()}") as client,
        pytest.raises(ServerError, match="corral serve"),
    ):
        client.models()


def test_what_is_no_url_is_refused() -> None:
    with CorralClient("localhost") as client, pytest.raises(ServerError, match="http://"):
        client.models()
    with pytest.raises(ServerError, match="not a valid URL"):
        CorralClient("http://127.0.0.1:port")


def test_a_silent_server_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with CorralClient(url, timeout_s=0.3) as client, pytest.raises(ServerError, match="timed out"):
            client.models()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://localhost", True),
        ("http://[::1]:1", True),
        ("https://corral.example", False),
        ("http://10.0.0.1", False),
    ],
)
def test_loopback(url: str, expected: bool) -> None:
    assert is_loopback(url) is expected
