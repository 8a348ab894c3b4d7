"""OpenAI's own package on /v1/responses: create, stream, parse, tools, stored responses and their items."""

from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel

from tests.conftest import RunningServer
from tests.third_party.plain import QUESTION, SECOND_QUESTION, TOOL_QUESTION, plain

BRIEF: dict[str, Any] = {"temperature": 0, "max_output_tokens": 16}


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    is_capital: bool


class Weather(BaseModel):
    """How warm it is in a city."""

    city: Literal["Paris", "Rome"]


WEATHER: Any = {"type": "function", **pydantic_function_tool(Weather, name="weather")["function"]}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.promise("F7")
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
def test_whole_and_streamed_are_the_plain_answer(server: RunningServer, client: openai.OpenAI, adapter: bool) -> None:
    model = server.adapter if adapter else server.base_model
    response = client.responses.create(model=model, input=QUESTION, **BRIEF)
    expected = plain(server, QUESTION, model=model)
    assert response.output_text == expected["text"]
    assert response.usage is not None
    assert response.usage.input_tokens == expected["prompt_tokens"]
    with client.responses.stream(model=model, input=QUESTION, **BRIEF) as stream:
        events = list(stream)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    final: Any = events[-1]
    assert "".join(deltas) == final.response.output_text == expected["text"]
    assert final.type == f"response.{response.status}"


@pytest.mark.promise("F7")
def test_an_answer_that_is_cut_off_says_so(server: RunningServer, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": server.base_model, "input": QUESTION, "temperature": 0, "max_output_tokens": 2}
    response = client.responses.create(**fields)
    *_, last = client.responses.create(**fields, stream=True)
    for cut_off in (response, last.response):
        assert cut_off.status == "incomplete"
        assert cut_off.incomplete_details.reason == "max_output_tokens"
        assert cut_off.usage.output_tokens == 2


@pytest.mark.promise("F7")
def test_a_second_turn_by_id_by_items_and_by_messages(server: RunningServer, client: openai.OpenAI) -> None:
    first = client.responses.create(model=server.base_model, input=QUESTION, **BRIEF)
    expected = plain(server, QUESTION, first.output_text, SECOND_QUESTION)["text"]
    question: Any = {"role": "user", "content": QUESTION}
    second: Any = {"role": "user", "content": SECOND_QUESTION}
    by_id = client.responses.create(
        model=server.base_model, previous_response_id=first.id, input=SECOND_QUESTION, **BRIEF
    )
    items: Any = [question, *first.output, second]
    by_items = client.responses.create(model=server.base_model, input=items, store=False, **BRIEF)
    messages: Any = [question, {"role": "assistant", "content": first.output_text}, second]
    by_messages = client.responses.create(model=server.base_model, input=messages, **BRIEF)
    assert [by_id.output_text, by_items.output_text, by_messages.output_text] == [expected] * 3
    assert by_id.previous_response_id == first.id


@pytest.mark.promise("F7")
def test_a_schema_is_kept(server: RunningServer, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": server.base_model, "input": QUESTION, "temperature": 0, "max_output_tokens": 64}
    parsed = client.responses.parse(**fields, text_format=City)
    assert isinstance(parsed.output_parsed, City)
    assert parsed.status == "completed"
    with client.responses.stream(**fields, text_format=City) as stream:
        stream.until_done()
        assert stream.get_final_response().output_parsed == parsed.output_parsed


@pytest.mark.promise("F7")
def test_a_tool_is_called_and_its_result_continues_the_response(server: RunningServer, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": server.base_model, "temperature": 0, "max_output_tokens": 64}
    fields["tools"] = [WEATHER]
    named: Any = {"type": "function", "name": "weather"}
    for choice in ({"tool_choice": "required", "parallel_tool_calls": False}, {"tool_choice": named}):
        response: Any = client.responses.parse(**fields, input=TOOL_QUESTION, **choice)  # type: ignore[call-overload]
        (call,) = response.output
        assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
        Weather.model_validate_json(call.arguments)
    with client.responses.stream(**fields, input=TOOL_QUESTION, tool_choice=named) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments

    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"}
    by_id = client.responses.create(**fields, input=[result], previous_response_id=response.id, tool_choice="none")
    items: Any = [{"role": "user", "content": TOOL_QUESTION}, call.to_dict(), result]
    by_items = client.responses.create(**fields, input=items, tool_choice="none")
    assert by_id.output_text
    assert by_id.output_text == by_items.output_text
    assert by_id.usage is not None
    assert by_id.usage.input_tokens > response.usage.input_tokens


@pytest.mark.promise("F7")
def test_a_stored_response_is_retrieved_listed_and_deleted(server: RunningServer, client: openai.OpenAI) -> None:
    response = client.responses.create(model=server.base_model, input=QUESTION, instructions="Be brief.", **BRIEF)
    assert client.responses.retrieve(response.id) == response
    (item,) = client.responses.input_items.list(response.id)
    assert item.to_dict()["content"] == [{"type": "input_text", "text": QUESTION}]
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    unstored = client.responses.create(model=server.base_model, input=QUESTION, store=False, **BRIEF)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)
    with pytest.raises(openai.APIStatusError) as exc_info:
        client.responses.create(model=server.base_model, previous_response_id=unstored.id, input="Go on.", **BRIEF)
    assert exc_info.value.status_code in (400, 404)
    assert exc_info.value.body["param"] == "previous_response_id"  # type: ignore[index]
