"""litellm as a client of an OpenAI-compatible server."""

from typing import Any

import litellm
import pytest

from tests.conftest import RunningServer

PARIS = [{"role": "user", "content": "What is the capital of France?"}]


def arguments(server: RunningServer, **fields: Any) -> dict[str, Any]:
    model = f"openai/{fields.pop('model', server.base_model)}"
    at: dict[str, Any] = {"api_base": f"{server.url}/v1", "api_key": "none", "num_retries": 0}
    return {"model": model, "messages": PARIS, "temperature": 0, "max_tokens": 8, **at, **fields}


@pytest.mark.promise("A1")
def test_completion_and_stream(server: RunningServer) -> None:
    for model in (server.base_model, server.adapter):
        completion: Any = litellm.completion(**arguments(server, model=model))
        text = completion.choices[0].message.content
        assert text
        assert completion.usage.completion_tokens == 8
        chunks = list(litellm.completion(**arguments(server, model=model, stream=True)))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        assert litellm.stream_chunk_builder(chunks).choices[0].message.content == text  # type: ignore[union-attr]


@pytest.mark.promise("A2")
def test_text_completion(server: RunningServer) -> None:
    fields = arguments(server)
    fields.pop("messages")
    fields["model"] = f"text-completion-openai/{server.base_model}"
    completion: Any = litellm.text_completion(prompt="One, two,", **fields)
    assert completion.choices[0].text


def test_b_errors_have_litellms_types(server: RunningServer) -> None:
    with pytest.raises(litellm.exceptions.NotFoundError):
        litellm.completion(**arguments(server, model="smollm2-135m:nobody"))
    with pytest.raises(litellm.exceptions.BadRequestError, match="temperature"):
        litellm.completion(**arguments(server, temperature=9))
    with pytest.raises(litellm.exceptions.ContextWindowExceededError):
        litellm.completion(**arguments(server, messages=[{"role": "user", "content": "hello " * 5000}]))
