"""Keys and limits as the openai package meets them (C1, C2)."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from deployments.auth.caller import KeyLimits
from deployments.auth.keys import KeyStore
from tests.conftest import RunningServer

HI: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def key(server: RunningServer) -> Iterator[str]:
    """The server's only key, for one request at a time; without it the server is open again."""
    store = KeyStore()
    _, key = store.create("client", ("chat",), KeyLimits(streams=1))
    yield key
    store.path.unlink()


def client(server: RunningServer, key: str, max_retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=max_retries)


@pytest.mark.promise("C1")
def test_without_a_valid_key_nothing_is_answered(server: RunningServer, key: str) -> None:
    with pytest.raises(openai.AuthenticationError, match="key") as exc_info:
        client(server, "none").chat.completions.create(model=server.base_model, messages=HI)
    assert exc_info.value.code == "invalid_api_key"
    assert client(server, key).models.list().data[0].id == server.base_model


@pytest.mark.promise("C2")
def test_a_second_stream_is_refused_and_the_package_tries_again_until_the_first_has_ended(
    server: RunningServer, key: str
) -> None:
    fields: dict[str, Any] = {"model": server.base_model, "messages": HI, "temperature": 0}
    with client(server, key).chat.completions.create(
        **fields, stream=True, max_tokens=200, extra_body={"ignore_eos": True}
    ) as first:
        next(first)
        with pytest.raises(openai.RateLimitError) as exc_info:
            client(server, key).chat.completions.create(**fields, max_tokens=1)
        assert exc_info.value.code == "rate_limit_exceeded"
        assert int(exc_info.value.response.headers["retry-after"]) >= 1
        patient = client(server, key, max_retries=20)
        assert patient.chat.completions.create(**fields, max_tokens=1).choices[0].finish_reason == "length"
