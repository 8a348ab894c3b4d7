"""litellm as a client of an OpenAI-compatible server."""

import json
from typing import Any, Literal

import litellm
import pytest
from pydantic import BaseModel

from tests.conftest import RunningServer
from tests.third_party.plain import QUESTION, SECOND_QUESTION, TOOL_QUESTION, plain

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


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    is_capital: bool


@pytest.mark.promise("F7")
def test_a_schema_is_kept(server: RunningServer) -> None:
    completion: Any = litellm.completion(**arguments(server, max_tokens=64, response_format=City))
    City.model_validate_json(completion.choices[0].message.content)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How warm it is in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


@pytest.mark.promise("F7")
def test_a_tool_is_called_and_its_result_goes_back(server: RunningServer) -> None:
    question = {"role": "user", "content": TOOL_QUESTION}
    fields = arguments(server, messages=[question], tools=[WEATHER], max_tokens=64)
    fields["tool_choice"] = {"type": "function", "function": {"name": "weather"}}
    completion: Any = litellm.completion(**fields)
    message = completion.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    assert completion.choices[0].finish_reason == "tool_calls"
    streamed: Any = litellm.stream_chunk_builder(list(litellm.completion(**fields, stream=True)))
    assert streamed.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"}
    final: Any = litellm.completion(**fields | {"messages": [question, message, result], "tool_choice": "none"})
    assert final.choices[0].message.content
    assert final.usage.prompt_tokens > completion.usage.prompt_tokens


@pytest.mark.promise("F7")
def test_a_second_turn_continues_the_first(server: RunningServer) -> None:
    question, again = ({"role": "user", "content": text} for text in (QUESTION, SECOND_QUESTION))
    first: Any = litellm.completion(**arguments(server, messages=[question], max_tokens=16)).choices[0].message  # type: ignore[union-attr]
    second: Any = litellm.completion(**arguments(server, messages=[question, first, again], max_tokens=16))
    expected = plain(server, QUESTION, first.content, SECOND_QUESTION)
    assert second.choices[0].message.content == expected["text"]
    assert second.usage.prompt_tokens == expected["prompt_tokens"]


@pytest.mark.promise("F7")
def test_responses(server: RunningServer) -> None:
    at: dict[str, Any] = {"api_base": f"{server.url}/v1", "api_key": "none", "temperature": 0, "max_output_tokens": 16}
    response: Any = litellm.responses(model=f"openai/{server.base_model}", input=QUESTION, **at)
    assert response.output_text == plain(server, QUESTION)["text"]


def test_b_errors_have_litellms_types(server: RunningServer) -> None:
    with pytest.raises(litellm.exceptions.NotFoundError):
        litellm.completion(**arguments(server, model="smollm2-135m:nobody"))
    with pytest.raises(litellm.exceptions.BadRequestError, match="temperature"):
        litellm.completion(**arguments(server, temperature=9))
    with pytest.raises(litellm.exceptions.ContextWindowExceededError):
        litellm.completion(**arguments(server, messages=[{"role": "user", "content": "hello " * 5000}]))
