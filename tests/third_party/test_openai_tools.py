"""OpenAI's own package with tools: every `tool_choice`, the stream helper, and results that are sent back."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel

from tests.conftest import RunningServer
from tests.third_party.plain import TOOL_QUESTION

ASK: Any = [{"role": "user", "content": TOOL_QUESTION}]


class Weather(BaseModel):
    """How warm it is in a city."""

    city: Literal["Paris", "Rome"]


class Hours(BaseModel):
    """When a shop opens, and whether it does on Sundays."""

    opens: Literal[8, 9]
    sunday: bool


WEATHER: Any = pydantic_function_tool(Weather, name="weather")
TOOLS: Any = [WEATHER, pydantic_function_tool(Hours, name="hours")]
NAMED: Any = {"type": "function", "function": {"name": "hours"}}
ONE_ALLOWED: Any = [{"type": "function", "function": {"name": "weather"}}]
ALLOWED: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": ONE_ALLOWED}}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def fields(server: RunningServer, **changes: Any) -> dict[str, Any]:
    return {"model": server.base_model, "messages": ASK, "tools": TOOLS, "temperature": 0, "max_tokens": 64, **changes}


@pytest.mark.promise("F7")
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"tool_choice": "required", "parallel_tool_calls": False}, {"weather", "hours"}),
        ({"tool_choice": NAMED}, {"hours"}),
        ({"tool_choice": ALLOWED, "parallel_tool_calls": False}, {"weather"}),
    ],
    ids=["required", "named", "allowed"],
)
def test_a_forced_call_fits_its_schema_and_is_streamed_as_a_whole(
    server: RunningServer, client: openai.OpenAI, choice: dict[str, Any], names: set[str]
) -> None:
    completion = client.chat.completions.parse(**fields(server, **choice))
    message = completion.choices[0].message
    (call,) = message.tool_calls or []
    assert call.function.name in names
    assert isinstance(call.function.parsed_arguments, {"weather": Weather, "hours": Hours}[call.function.name])
    assert message.content is None
    assert completion.choices[0].finish_reason == "tool_calls"

    with client.chat.completions.stream(**fields(server, **choice)) as stream:
        deltas = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls is not None
    streamed = final.choices[0].message.tool_calls[0]
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    assert "".join(event.arguments_delta for event in deltas) == call.function.arguments
    assert final.choices[0].finish_reason == completion.choices[0].finish_reason
    assert not final.choices[0].message.content


@pytest.mark.promise("F7")
def test_a_result_is_sent_back_with_the_message_that_called(server: RunningServer, client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    completion = client.chat.completions.parse(**fields(server, tool_choice=named, tools=[WEATHER]))
    message = completion.choices[0].message
    (call,) = message.tool_calls or []
    used = []
    for result in ("18 degrees", json.dumps({"degrees": 18, "sky": "blue"})):
        dialog = [*ASK, message, {"role": "tool", "tool_call_id": call.id, "content": result}]
        final = client.chat.completions.create(**fields(server, messages=dialog, tools=[WEATHER], tool_choice="none"))
        assert final.choices[0].message.content
        assert not final.choices[0].message.tool_calls
        assert final.usage is not None
        used.append(final.usage.prompt_tokens)
    assert completion.usage is not None
    assert completion.usage.prompt_tokens < used[0] < used[1]


@pytest.mark.promise("F7")
def test_a_choice_of_none_or_auto_leaves_room_for_text(server: RunningServer, client: openai.OpenAI) -> None:
    texts = {}
    for tool_choice in ("none", "auto"):
        choice = client.chat.completions.create(**fields(server, tool_choice=tool_choice)).choices[0]
        texts[tool_choice] = choice.message.content
        if choice.message.tool_calls:
            assert tool_choice == "auto"
            assert choice.finish_reason == "tool_calls"
    assert texts["none"]


@pytest.mark.promise("F7")
def test_b_a_tool_that_was_not_sent_cannot_be_chosen(server: RunningServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as exc_info:
        client.chat.completions.create(**fields(server, tool_choice=NAMED, tools=[WEATHER]))
    assert str(exc_info.value.param).startswith("tool_choice")
    assert "hours" in str(exc_info.value)
    with pytest.raises(openai.BadRequestError) as orphan:
        client.chat.completions.create(
            **fields(server, messages=[*ASK, {"role": "tool", "tool_call_id": "call_0", "content": "18 degrees"}])
        )
    assert str(orphan.value.param).startswith("messages")
